"""Survivors into micro-batches: packed or not, as few as they need or small ones, on every process as many."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import QTuningSFTConfig
from .memory import MemoryBudget
from .sample import IGNORE, Sample, answer_lengths

RowT = TypeVar("RowT", bound=Sized)


@dataclass(frozen=True, eq=False)
class Row:
    """
    A row of a micro-batch; its length is that of its tokens.

    Args:
        samples (`list[Sample]`): Those in it, one after the other; a single one, unless rows are packed.
        packed (`bool`): Whether the collator is told where each sample ends.
    """

    samples: list[Sample]
    packed: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.samples))

    def as_example(self) -> dict[str, Any]:
        """The row as the collator takes it."""
        example: dict[str, Any] = {
            "input_ids": np.concatenate([sample.input_ids for sample in self.samples]),
            "labels": np.concatenate([sample.labels for sample in self.samples]),
        }
        return {**example, "seq_lengths": list(map(len, self.samples))} if self.packed else example


def dummy_sample(pad_token_id: int) -> Sample:
    """A sample without labels, which costs little and adds a differentiable zero: for a process that has none."""
    return Sample(np.array([pad_token_id] * 2), np.array([IGNORE] * 2), sample_id=-1)


def with_placeholders(micro_batches: list[dict[str, Any]], slots: int) -> list[dict[str, Any]]:
    """The micro-batches after entries for unused slots of the step: no tokens, so those count no FLOPs, no samples."""
    empty = torch.empty((1, 0), dtype=torch.int64)
    return [{"input_ids": empty, "labels": empty} for _ in range(slots - len(micro_batches))] + micro_batches


@dataclass(eq=False)
class Batcher:
    """Puts the survivors of a step into micro-batches."""

    args: QTuningSFTConfig
    accelerator: Accelerator
    collator: DataCollatorForLanguageModeling  # the trainer's, for training
    memory: MemoryBudget  # says how many tokens at a time go without checkpointing

    def collate(self, survivors: list[Sample], slots: int, batch_size: int) -> list[dict[str, Any]]:
        """
        The survivors in micro-batches, as few as they need or small ones; every process has as many, some dummies.

        Args:
            survivors (`list[Sample]`): Those of this process.
            slots (`int`): Micro-batches that the step has without pruning, the most there can be.
            batch_size (`int`): Rows of one of those.

        Returns:
            `list[dict]`: What the collator makes of each, with its `survivors` and whether to train it with
            `checkpointing`.
        """
        # Those that lost all their tokens have no gradient to give.
        survivors = [sample for sample, size in zip(survivors, answer_lengths(survivors), strict=True) if size > 0]
        distributed = self.accelerator.num_processes > 1
        if self.args.compares_processes:
            # One process may hold most survivors of the pool: deal them out, so that none waits for another.
            survivors = gather_object(survivors)
        rows = self._rows(survivors)
        if self.args.compares_processes:
            rows = sorted(rows, key=len, reverse=True)
            rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        parts = self._split(rows, slots, batch_size)
        if distributed and self.args.survivor_checkpointing == "true":
            parts = [(part, True) for part in split_evenly(rows, max(gather_object([len(parts)])))]
        elif distributed:
            parts += [([], True)] * (max(gather_object([len(parts)])) - len(parts))
        dummy = Row([dummy_sample(self.collator.pad_token_id)], packed=self.args.packing)
        return [
            {
                **self.collator([row.as_example() for row in part or [dummy]]),
                "survivors": [sample for row in part for sample in row.samples],
                "checkpointing": checkpointing,
            }
            for part, checkpointing in parts
        ]

    def _split(self, rows: list[Row], slots: int, batch_size: int) -> list[tuple[list[Row], bool]]:
        """The rows of this process in micro-batches, each with whether it is checkpointed."""
        count = min(max(len(rows) if self.args.micro_batches == "small" else -(-len(rows) // batch_size), 1), slots)
        if self.args.survivor_checkpointing == "true" or not self.args.gradient_checkpointing or not rows:
            return [(part, True) for part in split_evenly(rows, count)]
        most_rows = -(-len(rows) // count) if self.args.micro_batches == "small" else batch_size
        parts = split_survivors(list(map(len, rows)), most_rows, slots, self.memory.free_tokens)
        return [([rows[place] for place in part.places], part.checkpointing) for part in parts]

    def _rows(self, survivors: list[Sample]) -> list[Row]:
        if self.args.packing and self.args.max_length is not None:  # TRL packs with a `max_length` only
            return pack_rows(survivors, self.args.max_length)
        return [Row([sample]) for sample in survivors]


def pack_rows(documents: list[Sample], max_length: int) -> list[Row]:
    """
    Pack samples into rows of at most `max_length` tokens, best fit decreasing, as `bfd` packing does.

    No sample may be longer than that; TRL's packing has cut them.
    """
    rows: list[list[Sample]] = []
    free: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        length = len(document)
        fitting = [index for index, space in enumerate(free) if space >= length]
        if fitting:
            best = min(fitting, key=lambda index: free[index])
        else:
            best = len(rows)
            rows.append([])
            free.append(max_length)
        rows[best].append(document)
        free[best] -= length
    return [Row(row, packed=True) for row in rows]


def split_evenly(rows: Sequence[RowT], count: int) -> list[list[RowT]]:
    """
    Rows sorted by length, longest first, in `count` micro-batches whose sizes differ by one at most.

    Sorting wastes little on padding and does not change the gradient of the step; even sizes keep the peak memory low.
    """
    rows = sorted(rows, key=len, reverse=True)
    bounds = [round(index * len(rows) / count) for index in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]


class Part(NamedTuple):
    """Survivors of one micro-batch, by their places in the list of lengths, and whether they are checkpointed."""

    places: list[int]
    checkpointing: bool


def split_survivors(lengths: Sequence[int], most_rows: int, slots: int, free_tokens: int) -> list[Part]:
    """
    As few survivors as possible with gradient checkpointing, the others without, as many at a time as memory allows.

    Rows too long to go without it are checkpointed, in full micro-batches, and so are more of the longest where there
    would be more micro-batches than the step has slots.

    Args:
        lengths (`Sequence[int]`): Tokens of each survivor, `most_rows * slots` of them at most.
        most_rows (`int`): Rows of a micro-batch.
        slots (`int`): Micro-batches that the step has, the most there can be.
        free_tokens (`int`): Tokens, padding included, of a micro-batch without checkpointing.

    Returns:
        `list[Part]`: The micro-batches, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    too_long = sum(length > free_tokens for length in lengths)
    first = -(-too_long // most_rows) * most_rows
    for checkpointed in [too_long, *range(first, len(order) + most_rows, most_rows)]:
        parts = [
            Part(order[start : min(start + most_rows, checkpointed)], True)
            for start in range(0, min(checkpointed, len(order)), most_rows)
        ]
        parts += [Part(places, False) for places in _filled(order[checkpointed:], lengths, most_rows, free_tokens)]
        if len(parts) <= slots:
            return parts
    raise ValueError(f"{len(lengths)} survivors do not fit into {slots} micro-batches of {most_rows} rows.")


def _filled(order: list[int], lengths: Sequence[int], most_rows: int, tokens: int) -> list[list[int]]:
    """Places in order, a micro-batch filled until it has `most_rows` rows or another would exceed `tokens`."""
    batches: list[list[int]] = []
    for place in order:
        full = not batches or len(batches[-1]) == most_rows
        if full or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(place)
    return batches
