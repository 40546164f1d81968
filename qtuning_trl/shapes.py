"""Shapes of data sets: which sets of columns are known, which are refused by name, and what to do about the others."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .conversations import ROLES, is_conversation

Row = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """
    A known set of columns that hold a question and its answer.

    Args:
        name (`str`): What it is called.
        prompt, answer (`str`): Columns that it must have.
        context (`str`, *optional*): Column that belongs to the prompt, and that it may have.
        recipe (`str`, *optional*): The shipped recipe that fits.
    """

    name: str
    prompt: str
    answer: str
    context: str | None = None
    recipe: str | None = None

    def fits(self, columns: list[str]) -> bool:
        return {self.prompt, self.answer} <= set(columns)

    def templates(self, columns: list[str]) -> tuple[str, str]:
        """Templates of the user's turn and of the answer."""
        context = f"\n{{{self.context}}}" if self.context in columns else ""
        return f"{{{self.prompt}}}{context}", f"{{{self.answer}}}"


PAIRS = (
    Pairs("Alpaca's", "instruction", "output", "input", "data/local_instruction"),
    Pairs("Dolly's", "instruction", "response", "context"),
    Pairs("a question and its answer", "question", "answer", "context", "data/local_question_answer"),
    Pairs("a question and its answer", "question", "response"),
    Pairs("a question and its answer", "query", "response"),
    Pairs("a question and its answer", "query", "answer"),
    Pairs("a question and its answer", "problem", "solution"),
    Pairs("a prompt and its completion", "prompt", "response"),
    Pairs("a prompt and its completion", "prompt", "output"),
    Pairs("a prompt and its completion", "prompt", "completion"),
    Pairs("a prompt and its completion", "input", "output"),
)


def known_pairs(columns: list[str]) -> Pairs | None:
    return next((pairs for pairs in PAIRS if pairs.fits(columns)), None)


def context_left_out(columns: list[str], used: Collection[str]) -> list[str]:
    """The column beside an instruction (Alpaca's `input`, Dolly's `context`) that templates of it do not name."""
    if "instruction" not in used:
        return []
    beside = [pairs.context for pairs in PAIRS if pairs.prompt == "instruction" and pairs.fits(columns)]
    return [name for name in beside if name in columns and name not in used]


def conversation_column(first: Row) -> str | None:
    """The column of conversations of a data set without options, by its first row; TRL's own name wins."""
    if "prompt" in first and "completion" in first:
        return None
    found = [name for name, value in first.items() if is_conversation(value)]
    return "messages" if "messages" in found else next(iter(found), None)


def refuse_preferences(first: Row, counted: tuple[str | None, ...] = ()) -> None:
    """
    Raise a `ValueError` for a data set of preferences, which would be trained on as if all its answers were good.

    Args:
        first (`dict`): A row.
        counted (`tuple[str]`): Columns that an option names.
    """
    if {"chosen", "rejected"} <= first.keys():
        raise ValueError(
            "`train_dataset` has the columns 'chosen' and 'rejected', which are preferences (DPO): train on them by "
            "TRL's DPOTrainer, or keep the chosen answers alone (`completion_template` '{chosen}', without `rejected`)."
        )
    for name in ("label", "kto_tag"):
        if isinstance(first.get(name), bool) and name not in counted and "input_ids" not in first:
            raise ValueError(
                f"`train_dataset` has the column {name!r} of true and false, which are preferences (KTO): train on "
                "them by TRL's KTOTrainer, or keep the rows that are true and remove the column."
            )


def refuse_unknown_columns(first: Row, text_field: str) -> None:
    """Raise a `ValueError` that says what to do about columns that TRL does not train on."""
    columns = list(first)
    if "input_ids" in first or text_field in first or {"prompt", "completion"} <= first.keys():
        return
    column = conversation_column(first)
    if column is not None:
        _refuse_foreign_turns(column, first[column])
        return
    if "messages" in first:
        return
    has = f"`train_dataset` has the columns {', '.join(columns)}"
    pairs = known_pairs(columns)
    if pairs is not None:
        prompt, answer = pairs.templates(columns)
        plain = f"`prompt_template` and `completion_template`, such as {prompt!r} and {answer!r},"
        if pairs.recipe:
            plain = f"`--config {pairs.recipe}`"
        raise ValueError(
            f"{has}, which are {pairs.name}: set `as_messages` to true (`--as_messages true`) for a model with a chat "
            f"template, or give {plain} for one without."
        )
    raise ValueError(
        f"{has}, none of which TRL trains on: build a prompt and a completion from them (`prompt_template`, "
        "`completion_template`), name the column of whole texts (`dataset_text_field`) or of conversations "
        "(`messages_column`), or rename them to fit a recipe: `--config data/local_instruction` (instruction, input, "
        "output), `data/local_question_answer` (question, answer), `data/local_conversations` (conversations)."
    )


def _refuse_foreign_turns(column: str, turns: list[Row]) -> None:
    """TRL renames ShareGPT's keys and leaves its roles, which chat templates do not know."""
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        if column != "messages" or (ROLES.get(str(role)) != role and role in ROLES):
            raise ValueError(
                f"`train_dataset` has the column {column!r} of conversations with the role {role!r}: map it by "
                f"`qtuning_trl.data.map_columns(dataset, messages_column={column!r})`, as `qtuning sft` does, since "
                "TRL does not rename roles."
            )
