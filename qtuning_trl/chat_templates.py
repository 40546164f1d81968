"""Chat templates: which one a run trains with, and whether it writes down all that the conversations hold."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .config import QTuningSFTConfig

Row = dict[str, Any]
# Templates with generation markers, each of which writes what a model's own template without them writes.
MARKED = Path(__file__).parent / "marked_templates"
WHAT = {
    "system": "system turns",
    "tools": "the descriptions of tools",
    "tool_calls": "tool calls",
    "tool": "the answers of tools",
}


def template_of(tokenizer: Any, args: QTuningSFTConfig) -> str | None:
    """The chat template that TRL will write conversations down with; its `default`, where a tokenizer names several."""
    path = args.chat_template_path
    if path is not None and path.endswith((".jinja", ".j2")) and Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    if path is not None:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def settle_chat_template(tokenizer: PreTrainedTokenizerBase, args: QTuningSFTConfig, fallback: str | None) -> None:
    """
    Choose `chat_template_path` where it is not given: a model keeps its own template, and one without has `fallback`.

    For assistant-only loss, the own template is replaced by one with generation markers that writes the very same.

    Raises:
        `ValueError`: If assistant-only loss is asked for, and no such template is known.
    """
    if args.chat_template_path is None and template_of(tokenizer, args) is None:
        args.chat_template_path = fallback
    template = template_of(tokenizer, args)
    if template is None or not args.assistant_only_loss or has_generation_markers(template):
        return
    if args.chat_template_path is None and _known_to_trl(tokenizer):
        return
    for path in sorted(MARKED.glob("*.jinja")):
        if args.chat_template_path is None and _writes_the_same(tokenizer, path.read_text(encoding="utf-8")):
            args.chat_template_path = str(path)
            return
    named = args.chat_template_path or tokenizer.name_or_path
    raise ValueError(
        f"`assistant_only_loss` is true and the chat template of {named!r} has no generation markers: set "
        "`chat_template_path` to a copy of it with the assistant's turn between `{% generation %}` and "
        "`{% endgeneration %}` (recipes/smollm2_chat_template.jinja is one), or set `assistant_only_loss` to false."
    )


def _known_to_trl(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:
        return False


def _writes_the_same(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes conversations as the tokenizer's own does: with a system turn and without."""
    turns = [{"role": role, "content": text} for role, text in (("user", "u 1"), ("assistant", "a 2"))]
    own: dict[str, Any] = {"tokenize": False}
    other: dict[str, Any] = {**own, "chat_template": template}
    try:
        return all(
            tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **own)
            == tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **other)
            for messages in (turns, [{"role": "system", "content": "s 3"}, *turns, *turns])
            for prompt in (False, True)
        )
    except Exception:  # whatever a template raises
        return False


def refuse_lost_parts(tokenizer: Any, args: QTuningSFTConfig, first: dict[str, Row]) -> None:
    """
    Raise a `ValueError` if the chat template leaves out what the conversations hold.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        args ([`QTuningSFTConfig`]): The configuration.
        first (`dict`): By what conversations hold (`system`, `tools`, `tool_calls`, `tool`), the first row with it.
    """
    template = template_of(tokenizer, args)
    for what, row in first.items():
        messages = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        kwargs = {"chat_template": template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
        why = ""
        try:
            written = str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        except Exception as error:  # whatever a template raises
            written, why = "", f" ({' '.join(str(error).split()).rstrip('.')})"
        if not _words_of(what, messages, tools) <= set(_words(written)):
            name = args.chat_template_path or tokenizer.name_or_path
            raise ValueError(
                f"`train_dataset` holds {WHAT[what]}, which the chat template of {name!r} does not write down{why}: "
                "use a model whose template does, set `chat_template_path` to one that does, or remove these rows."
            )


def _words(text: Any) -> list[str]:
    """Words without what JSON escapes: a template may write a text as it is, or in quotes."""
    return re.findall(r"[^\W_]+", re.sub(r"\\[nt]|\\u[0-9a-f]{4}", " ", str(text)).casefold())


def _words_of(what: str, messages: list[Row], tools: Any) -> set[str]:
    if what == "tools":
        return {word for tool in tools or [] for word in _words(tool.get("function", tool).get("name"))}
    if what == "tool_calls":
        calls = [call["function"] for turn in messages for call in turn.get("tool_calls") or []]
        return {word for call in calls for part in (call["name"], *_leaves(call["arguments"])) for word in _words(part)}
    said = [turn.get("content") for turn in messages if turn["role"] == what]
    return {word for text in said if isinstance(text, str) for word in _words(text)}


def _leaves(value: Any) -> list[Any]:
    """Keys and values of the arguments of a call, but for true, false and null, which languages write differently."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *_leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) else []
