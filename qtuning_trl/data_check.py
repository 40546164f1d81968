"""What becomes of a training set on its way to the model: what is left out, what is cut off, and what is unusual."""

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from .config import QTuningSFTConfig
from .conversations import is_conversation
from .method import budget_size
from .step.sample import IGNORE

Row = dict[str, Any]
# Below this, four of five survivors are fill (docs/method.md, "The fill, and where it comes from").
SMALLEST_POOL = 16
SOUND_POOL = 32
CUT_WHOLE = "an answer that `max_length` cuts off as a whole"
END_WITHIN = 3  # labelled tokens at the end, since chat templates write a line break after the token that ends a turn


@dataclass
class DataCheck:
    """
    What was counted of a training set.

    Args:
        rows (`int`, *optional*): Rows given; `None` for a stream, of which nothing is counted.
        dropped (`Counter`): Rows that are not trained on, by reason.
        cut (`int`): Rows of which `max_length` cuts off a part of the answer.
        first (`dict`): By what a conversation holds (`system`, `tools`, `tool_calls`, `tool`), the first row with it.
        answer_lengths (`np.ndarray`): Answer tokens of each row that is trained on.
        endless (`int`): Of these, rows whose whole answer has no end token at its end.
        bare (`int`): Rows of whose answers `token_ratio` leaves no more tokens than they have special ones.
        labelled_whole (`bool`): Whether conversations are labelled as a whole, the user's turns too.
    """

    rows: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    first: dict[str, Row] = field(default_factory=dict)
    answer_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    endless: int = 0
    bare: int = 0
    labelled_whole: bool = False


# Before the rows are tokenized


class RowFacts:
    """
    What is wrong with a row, and what its conversation holds.

    A class and not a closure, so that its pickle, and with it the fingerprint of what is mapped by it, is stable.
    """

    def __init__(self, text_field: str):
        self.text_field = text_field

    def __call__(self, row: Row) -> Row:
        return {"problem": self.problem(row), "holds": sorted(held(row))}

    def is_whole(self, row: Row) -> bool:
        return not self.problem(row)

    def problem(self, row: Row) -> str:
        """Why a row cannot be trained on, as the end of `12 rows with ...`; empty if it can."""
        if "prompt" in row:
            if row["prompt"] is None:
                return "a null prompt"
            answer = row["completion"]
            return _void_turns(answer) if isinstance(answer, list) else _void_text(answer)
        if "messages" in row:
            return _void_turns(row["messages"])
        return _void_text(row[self.text_field])


def _void_text(text: Any) -> str:
    return "" if text is not None and str(text).strip() else "an empty answer"


def _void_turns(turns: Any) -> str:
    """A turn of an assistant that says nothing and calls nothing would be trained on its end token alone."""
    answers = [turn for turn in turns or [] if turn.get("role") == "assistant"]
    if not answers:
        return "no turn of an assistant"
    for turn in answers:
        said = [turn.get(key) for key in ("content", "reasoning_content", "thinking")]
        if not turn.get("tool_calls") and all(_void_text(text) for text in said):
            return "an empty answer"
    return ""


def held(row: Row) -> set[str]:
    """What a conversation holds that a chat template may leave out."""
    parts = [row.get("prompt"), row.get("completion")] if "prompt" in row else [row.get("messages")]
    turns = [turn for part in parts if is_conversation(part) for turn in part or []]
    found = {"system", "tool"} & {turn.get("role") for turn in turns}
    if any(turn.get("tool_calls") for turn in turns):
        found |= {"tool_calls"}
    return found | ({"tools"} if turns and row.get("tools") and row["tools"] != "[]" else set())


def _with_one_text(dataset: Any, first: Row, text_field: str) -> tuple[Any, Row]:
    """
    A data set, and its first row, with a text or a prompt and its completion, not both.

    Beside a prompt and its completion TRL 1.16 gives the end token to the text, which it does not train on, and of a
    prompt beside a text it looks for the completion.
    """
    both = "prompt" in first and text_field in first
    doubled = [text_field if "completion" in first else "prompt"] if both else []
    left = {name: value for name, value in first.items() if name not in doubled}
    return dataset.remove_columns(doubled) if doubled else dataset, left


def drop_void_rows(dataset: Any, args: QTuningSFTConfig, name: str = "train_dataset") -> tuple[Any, DataCheck]:
    """
    A training set without the rows that have no answer, and what was counted.

    Rows that are tokenized are left as they are. A stream is filtered while it is read, and nothing of it is counted.
    Columns that TRL would mix up are left out, see [`_with_one_text`].

    Raises:
        `ValueError`: If no row is left.
    """
    check = DataCheck()
    if isinstance(dataset, Dataset):
        check.rows = len(dataset)
    first = next(iter(dataset))
    if "input_ids" in first or getattr(dataset, "format", {"type": None})["type"] == "custom":
        return dataset, check
    dataset, first = _with_one_text(dataset, first, args.dataset_text_field)
    facts = RowFacts(args.dataset_text_field)
    check.labelled_whole = is_conversation(first.get("messages")) and not args.assistant_only_loss
    if isinstance(dataset, IterableDataset):
        whole = dataset.filter(facts.is_whole)
        if next(iter(whole), None) is None:
            raise ValueError(f"`{name}` is streamed, and none of its rows has an answer: check its columns.")
        check.first = dict.fromkeys(held(first), first)
        return whole, check
    with args.main_process_first(desc="checking the rows"):
        found = dataset.map(
            facts, remove_columns=dataset.column_names, num_proc=args.dataset_num_proc, desc="Checking rows"
        )
    void = []
    for number, row in enumerate(found):
        if row["problem"]:
            void.append(number)
            check.dropped[row["problem"]] += 1
            continue
        for what in row["holds"]:
            if what not in check.first:
                check.first[what] = dataset[number]
    if len(void) == len(dataset):
        reasons = _listed(f"{count:,} {_rows(count)} with {reason}" for reason, count in check.dropped.items())
        raise ValueError(f"`{name}` has no row with an answer ({reasons}): check that the columns are the right ones.")
    if void:
        dataset = dataset.select(np.delete(np.arange(len(dataset)), void))
    return dataset, check


# After they are tokenized, before `max_length` cuts them


def without_cuts(args: QTuningSFTConfig) -> QTuningSFTConfig:
    """The options for TRL's preparation up to the labels, with neither truncation nor shuffling."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def count_answers(check: DataCheck, dataset: Dataset, args: QTuningSFTConfig, special: set[int]) -> None:
    """
    Count what `max_length` cuts off, and what the answers are like.

    Args:
        check ([`DataCheck`]): Where the counts go.
        dataset (`Dataset`): `input_ids` and `labels` of whole rows.
        args ([`QTuningSFTConfig`]): The configuration.
        special (`set[int]`): Tokens that end a sequence or a turn, or otherwise carry structure.
    """
    wanted = np.fromiter(special, dtype=np.int64)
    lengths = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(dataset), 1000):
        table = dataset.with_format("arrow").select_columns(["labels"])[start : start + 1000]
        for chunk in table["labels"].chunks:
            lengths.append(_count_chunk(check, chunk, args, wanted))
    check.answer_lengths = np.concatenate(lengths)


def _count_chunk(check: DataCheck, chunk: pa.ListArray, args: QTuningSFTConfig, special: np.ndarray) -> np.ndarray:
    """Count some rows; returns the answer tokens that are left of each that is trained on."""
    offsets = chunk.offsets.to_numpy()
    labels = chunk.values[offsets[0] : offsets[-1]].to_numpy(zero_copy_only=False)
    starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    answer = labels != IGNORE
    answer[starts[starts < ends]] = False  # the first token of a row is not predicted
    is_special = answer & np.isin(labels, special)
    first, last = _window(starts, ends, args)
    whole, cut = _count_between(answer, starts, ends), _count_between(answer, first, last)
    for reason, rows in (
        ("no tokens", starts == ends),
        ("no labelled token", (whole == 0) & (starts < ends)),
        (CUT_WHOLE, (cut == 0) & (whole > 0)),
    ):
        if rows.any():
            check.dropped[reason] += int(rows.sum())
    left = cut > 0
    check.cut += int((left & (cut < whole)).sum())
    # Whether one of the last answer tokens of a row ends it; one more entry stands for rows that have none.
    tokens, ends_it = np.append(np.flatnonzero(answer), len(labels)), np.append(is_special, False)
    ended = np.zeros(len(starts), dtype=bool)
    after = np.cumsum(whole)
    for back in range(1, END_WITHIN + 1):
        ended |= (whole >= back) & ends_it[tokens[np.maximum(after - back, 0)]]
    check.endless += int((left & ~ended).sum())
    budget = np.maximum(1, np.floor(args.token_ratio * cut + 1e-9))  # `method.budget_size`
    check.bare += int((left & (budget <= _count_between(is_special, first, last))).sum())
    return cut[left]


def _window(starts: np.ndarray, ends: np.ndarray, args: QTuningSFTConfig) -> tuple[np.ndarray, np.ndarray]:
    """What TRL leaves of rows that can be predicted; `bfd_split` packing puts what is cut off into another row."""
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return starts, ends
    if args.truncation_mode == "keep_end" and not args.packing:
        cut = ends - args.max_length
        return np.where(cut > starts, cut + 1, starts), ends
    return starts, np.minimum(ends, starts + args.max_length)


def _count_between(mask: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[ends] - before[starts]


# What is said


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def _listed(parts: Any) -> str:
    return ", ".join(parts)


def group_size(args: QTuningSFTConfig, rows: int | None) -> int:
    """Candidates that are compared with each other."""
    size = args.per_device_train_batch_size * args.pool_factor
    if args.selection_scope != "micro_batch":
        size *= args.gradient_accumulation_steps
    if args.selection_scope == "all_processes":
        size *= args.world_size
    return size if rows is None else max(1, min(size, rows))


def step_sizes(args: QTuningSFTConfig, rows: int | None) -> tuple[int, int]:
    """Candidates and survivors of a full optimizer step on all processes."""
    slots = args.per_device_train_batch_size * args.pool_factor * args.gradient_accumulation_steps * args.world_size
    group = group_size(args, None)
    survivors = slots if args.sample_ratio == 1.0 else slots // group * budget_size(args.sample_ratio, group)
    if rows is not None and rows < slots:
        return rows, min(survivors, budget_size(args.sample_ratio, rows))
    return slots, survivors


def count_steps(args: QTuningSFTConfig, rows: int | None) -> int:
    """Optimizer steps of the run on so many rows, as `Trainer` counts them."""
    if args.max_steps > 0 or rows is None:
        return args.max_steps
    drawn = args.per_device_train_batch_size * args.pool_factor * args.world_size
    batches = rows // drawn if args.dataloader_drop_last else math.ceil(rows / drawn)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def one_line(check: DataCheck, args: QTuningSFTConfig, rows: int | None) -> str:
    """
    The check of the data in one line.

    Args:
        check ([`DataCheck`]): What was counted.
        args ([`QTuningSFTConfig`]): The configuration.
        rows (`int`, *optional*): Rows of the prepared training set (packed, where rows are packed).
    """
    steps = count_steps(args, rows)
    candidates, survivors = step_sizes(args, rows)
    what = "candidates" if not args.packing else "packed rows of candidates"
    of_step = (
        f"{steps:,} {'step' if steps == 1 else 'steps'} of {candidates:,} {what}, about {survivors:,} of them kept"
    )
    if check.rows is None:
        return f"Data: a stream, whose rows are not counted; {of_step}."
    parts = [f"{count:,} with {reason}" for reason, count in check.dropped.items()]
    dropped = f", {sum(check.dropped.values()):,} of them left out ({_listed(parts)})" if parts else ", none left out"
    cut = f", {check.cut:,} answers cut short by `max_length` {args.max_length}" if check.cut else ""
    return f"Data: {check.rows:,} {_rows(check.rows)}{dropped}{cut}; {of_step}."


def left_out(check: DataCheck, args: QTuningSFTConfig, name: str = "train_dataset") -> list[str]:
    """What is not trained on: a sentence for each reason."""
    found = []
    for reason, count in check.dropped.items():
        if reason == CUT_WHOLE:
            found.append(
                f"`max_length` is {args.max_length}: it cuts off the whole answer of {count} of {check.rows} rows, "
                "which are left out; raise it to train on them."
            )
        else:
            found.append(
                f"`{name}` has {count:,} of {check.rows:,} rows with {reason}, which are left out: give them an "
                "answer, or remove them."
            )
    return found


def unusual(check: DataCheck, args: QTuningSFTConfig, rows: int | None) -> list[str]:
    """What may be meant, but seldom is: a sentence each, with the remedy."""
    found = []
    counted = len(check.answer_lengths)
    if check.cut:
        found.append(
            f"`max_length` is {args.max_length}: it cuts short the answers of {check.cut:,} of {check.rows:,} rows, "
            "which then teach the model to break off or not to stop; raise it, or remove these rows."
        )
    if check.endless:
        found.append(
            f"{check.endless:,} of {counted:,} answers have no end token at their end, so the model may not learn to "
            "stop: use a chat template whose generation markers hold the end of the turn, or set `eos_token`."
        )
    if args.token_ratio < 1.0 and counted and check.bare > counted / 10:
        found.append(
            f"`token_ratio` is {args.token_ratio:g} and {check.bare:,} of {counted:,} answers are so short that only "
            f"their special tokens would be left (half have {int(np.median(check.answer_lengths))} tokens or fewer): "
            "set `token_ratio` to 1."
        )
    if check.labelled_whole:
        found.append(
            "Conversations are labelled as a whole, what the user says too: set `assistant_only_loss` to true to train "
            "on the answers alone."
        )
    return found + _small_pools(args, rows)


def _small_pools(args: QTuningSFTConfig, rows: int | None) -> list[str]:
    """A pool in which the corners of the EU plane hold next to nothing; packed rows hold several candidates each."""
    size = group_size(args, rows)
    kept = budget_size(args.sample_ratio, size)
    if args.sample_pruner != "q_tuning" or args.sample_ratio == 1.0 or args.packing:
        return []
    if size >= SMALLEST_POOL and kept >= 2:
        return []
    wanted = max(SOUND_POOL, math.ceil(2 / args.sample_ratio))
    if rows is not None and rows < wanted:
        remedy = f"give more rows, since {rows:,} are fewer than the {wanted} that a step should compare"
    else:
        factor = math.ceil(wanted * args.gradient_accumulation_steps / size)
        remedy = f"set `gradient_accumulation_steps` to {factor} for {wanted} candidates"
        if args.selection_scope == "micro_batch":
            remedy = f"set `selection_scope` to 'process', or `per_device_train_batch_size` to {wanted}"
    return [
        f"{kept:,} of {size:,} candidates {'is' if kept == 1 else 'are'} kept: a pool so small has hardly a sample in "
        f"the corners Q2 and Q4, and many survivors only fill up the budget; {remedy}."
    ]


def refuse_short_stream(dataset: Any, args: QTuningSFTConfig) -> None:
    """
    Raise a `ValueError` for a stream shorter than a batch that must be full, which `Trainer` would read forever.

    Args:
        dataset (`IterableDataset`): The training set as TRL prepared it.
        args ([`QTuningSFTConfig`]): The configuration.
    """
    if not args.dataloader_drop_last:
        return
    needed = args.per_device_train_batch_size * args.pool_factor * args.world_size
    rows = sum(1 for _ in dataset.take(needed))
    if rows < needed:
        raise ValueError(
            f"`train_dataset` is a stream of {rows:,} {_rows(rows)}, fewer than a batch "
            f"(`per_device_train_batch_size` {args.per_device_train_batch_size} x `pool_factor` {args.pool_factor} x "
            f"{args.world_size} processes), and `dataloader_drop_last` drops what is less: set it to false, lower "
            "these, or give more rows."
        )
