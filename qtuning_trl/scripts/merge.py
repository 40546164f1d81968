"""
Merge a run's adapter into its base model: one model in safetensors, which every program that runs models takes.

```bash
qtuning merge runs/my-run
qtuning merge runs/my-run --output my-model --dtype bfloat16
```

The adapter of a QLoRA run is merged into the base model as it was before it was quantized.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from ..cli import EPILOG

DEFAULT_NAME = "merged"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    """The options of `qtuning merge`."""
    parser = argparse.ArgumentParser(
        prog="qtuning merge", description=(__doc__ or "").strip().split("\n")[0], epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="output_dir of a run with an adapter, or a checkpoint in it")
    parser.add_argument("--output", metavar="FOLDER", help=f"where the model goes (default: {DEFAULT_NAME} in RUN)")
    parser.add_argument("--base", metavar="MODEL", help="the base model, if it is elsewhere than the adapter says")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the merged weights; `auto` is the base model's own"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """`qtuning merge`: merge, and say where the model is; raises what [`merge`] raises."""
    options = make_parser().parse_args(list(argv))
    output = merge(options.run, options.output, options.base, options.dtype)
    folder = quote(str(output))
    print(f"Model saved to {output}\nNext:\n  qtuning eval --model {folder}\n  vllm serve {folder}")
    return 0


def merge(run: str, output: str | None = None, base: str | None = None, dtype: str = "auto") -> Path:
    """
    Merge an adapter into its base model and save the model with the run's tokenizer.

    Args:
        run (`str`): Folder that holds the adapter.
        output (`str`, *optional*): Folder of the model; by default `merged` in the run's.
        base (`str`, *optional*): Name or path of the base model; by default what the adapter names.
        dtype (`str`): Of the merged weights; `'auto'` is the base model's own.

    Returns:
        `Path`: Folder of the model. It appears whole or not at all.

    Raises:
        `ValueError`: If the folder holds no adapter that can be merged, or the output is there already.
    """
    folder = Path(run).expanduser()
    target = Path(output).expanduser() if output else folder / DEFAULT_NAME
    config = _adapter_config(run, folder)
    if target.exists():
        raise ValueError(f"`--output` is '{target}', which is there already: give another folder, or remove it.")
    revision = None if base else config.get("revision")
    base = base or str(config["base_model_name_or_path"])
    model, tokenizer = _merged(folder, base, revision, dtype)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


def _adapter_config(run: str, folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if (folder / "config.json").is_file():
        raise ValueError(f"`RUN` is {run!r}, which holds a whole model: there is nothing to merge, use it as it is.")
    raise ValueError(f"`RUN` is {run!r}, which holds no adapter: give the output_dir of a run that trained one.")


def _merged(folder: Path, base: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model is {base!r}, which cannot be loaded ({str(error).split('. ')[0].split(chr(10))[0]}): give "
            "its name or folder as `--base`."
        ) from error
    if getattr(model, "is_quantized", False):
        raise ValueError(f"the base model is {base!r}, which is quantized: give one that is not as `--base`.")
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))  # the run added tokens, whose rows the adapter brings
    adapted = PeftModel.from_pretrained(model, str(folder))
    _untie_adapted(adapted.get_base_model())
    return adapted.merge_and_unload(safe_merge=True), tokenizer


def _untie_adapted(model: Any) -> None:
    """
    Give the head weights of its own where an adapter changes the embeddings or the head, and they are one tensor: what
    is merged into the one would change the other, of which PEFT only warns.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = any(isinstance(end, LoraLayer) for end in (embeddings, head))
    if adapted and head is not None and head.weight is embeddings.weight:
        own: Any = head.get_base_layer() if isinstance(head, LoraLayer) else head
        own.weight = nn.Parameter(own.weight.detach().clone())
        model.config.tie_word_embeddings = False
