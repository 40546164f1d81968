"""Survivors into micro-batches: packed or not, as few as they need or small ones, on every process as many."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PretrainedConfig

from ..config import QTuningSFTConfig
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


def placeholder() -> dict[str, Tensor]:
    """An entry for an unused slot of the optimizer step: no tokens, so it counts no FLOPs and no samples."""
    empty = torch.empty((1, 0), dtype=torch.int64)
    return {"input_ids": empty, "labels": empty}


@dataclass(eq=False)
class Batcher:
    """Puts the survivors of a step into micro-batches."""

    args: QTuningSFTConfig
    accelerator: Accelerator
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]  # the trainer's, for training
    pad_token_id: int
    config: PretrainedConfig  # of the model, whose sizes tell what activations it keeps

    def collate(self, survivors: list[Sample], slots: int, full_tokens: int, batch_size: int) -> list[dict[str, Any]]:
        """
        The survivors in micro-batches, as few as they need or small ones; every process has as many, some dummies.

        Args:
            survivors (`list[Sample]`): Those of this process.
            slots (`int`): Micro-batches that the step has without pruning, the most there can be.
            full_tokens (`int`): Tokens of one of those.
            batch_size (`int`): Rows of one of those.

        Returns:
            `list[dict]`: What the collator makes of each, with its `survivors` and whether to train it with
            `checkpointing`.
        """
        # Those that lost all their tokens have no gradient to give.
        survivors = [sample for sample, size in zip(survivors, answer_lengths(survivors), strict=True) if size > 0]
        distributed = self.accelerator.num_processes > 1
        shared = distributed and self.args.selection_scope == "all_processes"
        if shared:
            # One process may hold most survivors of the pool: deal them out, so that none waits for another.
            survivors = gather_object(survivors)
        rows = self._rows(survivors)
        if shared:
            rows = sorted(rows, key=len, reverse=True)
            rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        count = -(-len(rows) // batch_size)
        if self.args.micro_batches == "small":
            count = len(rows)
        limit = full_tokens
        keep_activations = self.args.gradient_checkpointing and not self.args.survivor_checkpointing
        if keep_activations:
            limit = self._tokens_without_checkpointing(full_tokens)
            fitting = (
                n for n in range(max(count, 1), slots + 1) if max(map(padded_tokens, split_evenly(rows, n))) <= limit
            )
            count = next(fitting, count)
        if distributed:
            count = max(gather_object([count]))
        count = min(max(count, 1), slots)
        dummy = Row([dummy_sample(self.pad_token_id)], packed=self.args.packing)
        return [
            {
                **self.collator([row.as_example() for row in part or [dummy]]),
                "survivors": [sample for row in part for sample in row.samples],
                "checkpointing": not keep_activations or padded_tokens(part) > limit,
            }
            for part in split_evenly(rows, count)
        ]

    def _rows(self, survivors: list[Sample]) -> list[Row]:
        if self.args.packing and self.args.max_length is not None:  # TRL packs with a `max_length` only
            return pack_rows(survivors, self.args.max_length)
        return [Row([sample]) for sample in survivors]

    def _tokens_without_checkpointing(self, tokens: int) -> int:
        config = self.config.get_text_config()
        # GPT-2, BLOOM and others name no width of their MLP, which is the usual one.
        width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        experts = getattr(config, "num_experts_per_tok", None) or 1
        return tokens_without_checkpointing(tokens, config.hidden_size, width * experts, config.num_hidden_layers)


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


def tokens_without_checkpointing(tokens: int, hidden_size: int, intermediate_size: int, num_layers: int) -> int:
    """
    Tokens of a micro-batch trained without checkpointing that keeps no more activations than `tokens` do with it.

    A layer of a Llama keeps about `10 * hidden_size + 4 * intermediate_size` values a token for its backward pass. With
    checkpointing all layers keep their input, and one of them at a time the rest.
    """
    inside = 10 * hidden_size + 4 * intermediate_size
    return int(tokens * (num_layers * hidden_size + inside) / (num_layers * inside))


def padded_tokens(rows: Sequence[Sized]) -> int:
    """Tokens of a micro-batch, padding included."""
    return len(rows) * max(map(len, rows), default=0)


def split_evenly(rows: Sequence[RowT], count: int) -> list[list[RowT]]:
    """
    Rows sorted by length, longest first, in `count` micro-batches whose sizes differ by one at most.

    Sorting wastes little on padding and does not change the gradient of the step; even sizes keep the peak memory low.
    """
    rows = sorted(rows, key=len, reverse=True)
    bounds = [round(index * len(rows) / count) for index in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]
