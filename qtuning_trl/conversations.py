"""Conversations as they come, ShareGPT's and OpenAI's, with tool calls, tools, a system column, in TRL's form."""

import json
from typing import Any

Row = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Columns beside a conversation, or beside an instruction, that belong to it.
SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY_COLUMN = "history"
TOOLS_COLUMN = "tools"
_RENAMED = {"role", "from", "content", "value", "tool_calls", "function_call"}


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, with OpenAI's keys (`role`) or ShareGPT's (`from`)."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def normalize_messages(turns: Any) -> list[Row]:
    """
    A conversation in TRL's form, from ShareGPT's (`from`, `value`) or OpenAI's (`role`, `content`).

    Tool calls become `tool_calls` with their arguments as a mapping, which is what chat templates write down; so does
    the text of ShareGPT's `function_call`. Other keys of a turn (`name`, `reasoning_content`) stay.

    Raises:
        `ValueError`: If this is no list of turns, or a turn has another role than those of a user, an assistant, a tool
            or the system, or a tool call that cannot be read.
    """
    if turns is None:
        return []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"`messages_column` holds {str(turns)[:60]!r}, which is no list of turns: name a column of conversations, "
            "or use `prompt_template` and `completion_template` for columns of text."
        )
    return [_message(turn) for turn in turns]


def _message(turn: Row) -> Row:
    role = turn.get("role") or turn.get("from")
    text = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if role not in ROLES:
        raise ValueError(
            f"`messages_column` holds a turn with the role {role!r}: remove such conversations, or name the role "
            f"one of {', '.join(ROLES)}."
        )
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "function_call":
        calls, text = text, None
    message: Row = {"role": ROLES[role], "content": _plain_text(text)}
    if calls:
        message["tool_calls"] = _tool_calls(calls)
    return message | {key: value for key, value in turn.items() if key not in _RENAMED and value is not None}


def _plain_text(content: Any) -> str:
    """A turn's text; OpenAI's may come in parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(
                "`messages_column` holds a turn with parts that are no text: remove such conversations, since Q-Tuning "
                "does not prune vision data."
            )
        return "".join(part["text"] for part in content)
    return "" if content is None else str(content)


def _tool_calls(calls: Any) -> list[Row]:
    calls = _parsed(calls, "a tool call")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not function.get("name"):
            raise ValueError(
                f"`messages_column` holds the tool call {str(call)[:60]!r}, which names no function: give it a `name` "
                "and `arguments`, or remove such conversations."
            )
        arguments = _parsed(function.get("arguments") or {}, "the arguments of a tool call")
        ident = {"id": call["id"]} if call.get("id") else {}
        named = {"name": function["name"], "arguments": without_nulls(arguments)}
        found.append({**ident, "type": "function", "function": named})
    return found


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(
            f"`messages_column` holds {value[:60]!r} as {what}, which is no JSON: correct or remove such conversations."
        ) from None


def without_nulls(value: Any) -> Any:
    """
    A value without the keys that hold nothing.

    Arrow gives the mappings of a column the keys of all of them: of a call with `city` and one with `zip` each would
    have both, one of them null, and the model would learn to write the nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def tools_as_json(tools: Any) -> str | None:
    """
    A row's tools as the JSON text that TRL reads, each in the form of OpenAI's; `None` if there are none.

    Raises:
        `ValueError`: If it is a text that is no JSON.
    """
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    try:
        read = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError:
        raise ValueError(
            f"`{TOOLS_COLUMN}` holds {tools[:60]!r}, which is no JSON: give the tools as a list, or remove the column."
        ) from None
    read = [tool if "function" in tool else {"type": "function", "function": tool} for tool in without_nulls(read)]
    return json.dumps(read, ensure_ascii=False) if read else None


def with_system(messages: list[Row], system: Any) -> list[Row]:
    """The conversation, after a system turn with the text of a system column, unless it brings one of its own."""
    if not system or not str(system).strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": str(system)}, *messages]


def past_turns(history: Any) -> list[Row]:
    """Alpaca's `history`, pairs of an instruction and its answer, as turns."""
    turns = []
    for question, answer in history or []:
        turns += [{"role": "user", "content": question or ""}, {"role": "assistant", "content": answer or ""}]
    return turns
