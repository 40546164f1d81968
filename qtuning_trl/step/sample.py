"""A sample: its tokens and labels, taken out of a row of the train loader, and its answer without pruned tokens."""

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

SAMPLE_ID = "sample_id"
KEPT_MASK = "kept_mask"

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Sample:
    """
    One sample x + y, from the draw to the gradient; its length is that of its tokens.

    Args:
        input_ids, labels (`np.ndarray` of shape `(tokens,)`, int64): As TRL prepared them.
        sample_id (`int`): Its row number in the training set where the row holds it, else a hash of its tokens, which
            is the same wherever it turns up.
        group (`Any`, *optional*): Its value of `group_column`.
        column (`float` or `bool`, *optional*): Its value of `score_column`.
        weight (`float`): Weight of its loss.
        pruned (`bool`): Whether tokens of its answer were taken out.
        kept_mask (`np.ndarray` of shape `(answer tokens,)`, bool, *optional*): Which of them stayed, where stage 2 ran.
        token_weights (`np.ndarray` of shape `(answer tokens that stayed,)`, float64, *optional*): Weights of their
            losses, where the token pruner weights them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    sample_id: int
    group: Any = None
    column: Any = None
    weight: float = 1.0
    pruned: bool = False
    kept_mask: np.ndarray | None = None
    token_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class RawBatch:
    """
    The examples of one draw of the train loader, uncollated.

    An opaque object on purpose: accelerate moves lists and dicts to the device recursively, which takes 80 ms for 32 x
    2048 Python integers.
    """

    def __init__(self, examples: list[dict[str, Any]]):
        self.examples = examples


def number_rows(dataset: Dataset) -> Dataset:
    """
    The dataset with a column `sample_id`: its row numbers, or the user's own integers if it has such a column.

    Raises:
        `ValueError`: If the user's own are no integers.
    """
    if SAMPLE_ID not in dataset.column_names:
        return dataset.add_column(SAMPLE_ID, np.arange(len(dataset)))
    kind = dataset.features[SAMPLE_ID]
    if "int" not in getattr(kind, "dtype", "") or kind.dtype == "uint64":
        raise ValueError(
            f"`train_dataset` has the column {SAMPLE_ID!r} with values of type {kind}: rename it, or give "
            "signed integers that name the samples."
        )
    return dataset


def split_documents(
    example: dict[str, Any], group_column: str | None = None, score_column: str | None = None
) -> list[Sample]:
    """
    The samples of one row of the dataset: the row itself, or what `bfd` packing put together (`seq_lengths`).

    A packed row has no other columns, so its samples have no group and no score.
    """
    input_ids = np.asarray(example["input_ids"], dtype=np.int64)
    labels = np.asarray(example.get("labels", example["input_ids"]), dtype=np.int64)
    if "seq_lengths" in example:
        ends = np.cumsum(example["seq_lengths"])[:-1]
        pieces = zip(np.split(input_ids, ends), np.split(labels, ends), strict=True)
        return [Sample(*piece, _hash(*piece)) for piece in pieces]
    row = example.get(SAMPLE_ID)
    sample_id = _hash(input_ids, labels) if row is None else int(row)  # or a scalar, where the rows are tensors
    group = None if group_column is None else example[group_column]
    column = None if score_column is None else example[score_column]
    return [Sample(input_ids, labels, sample_id, group, column)]


def _hash(input_ids: np.ndarray, labels: np.ndarray) -> int:
    digest = blake2b(input_ids.tobytes() + labels.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # an int64 for datasets and parquet


def answer_lengths(documents: list[Sample]) -> list[int]:
    """Answer tokens |T(x)| of each document: labels that are trained on after the causal shift."""
    return [int((document.labels[1:] != IGNORE).sum()) for document in documents]


def whole_answer_lengths(documents: list[Sample]) -> list[int]:
    """Answer tokens of each document before stage 2."""
    now = answer_lengths(documents)
    return [size if doc.kept_mask is None else len(doc.kept_mask) for doc, size in zip(documents, now, strict=True)]


def loss_weights(documents: list[Sample]) -> Tensor:
    """Weights of the losses of their answer tokens, the sample's times the token's: shape `(answer tokens,)`."""
    weights = []
    for document, size in zip(documents, answer_lengths(documents), strict=True):
        of_tokens = torch.ones(size) if document.token_weights is None else torch.from_numpy(document.token_weights)
        weights.append(document.weight * of_tokens)
    return torch.cat(weights)


def sequence_tokens(documents: list[Sample]) -> int:
    """Tokens of prompts and answers that can be predicted: all but the first of each."""
    return sum(len(document) - 1 for document in documents)


def prompt_of(document: Sample) -> np.ndarray:
    """Tokens before the first that is trained on; all of them, if there is none."""
    answer = document.labels != IGNORE
    return document.input_ids[: int(answer.argmax()) if answer.any() else len(answer)]


def answer_mask(documents: list[Sample]) -> Tensor:
    """Answer tokens T(x), bool of shape `(documents, longest - 1)`: column j stands for token j + 1."""
    longest = max((len(document.labels) for document in documents), default=1)
    mask = np.zeros((len(documents), longest - 1), dtype=bool)
    for row, document in zip(mask, documents, strict=True):
        row[: len(document.labels) - 1] = document.labels[1:] != IGNORE
    return torch.from_numpy(mask)


def protected_mask(documents: list[Sample], token_ids: set[int], shape: torch.Size) -> Tensor:
    """Positions that hold one of `token_ids`, bool of the shape of `answer_mask`."""
    mask = np.zeros(shape, dtype=bool)
    wanted = np.fromiter(token_ids, dtype=np.int64)
    for row, document in zip(mask, documents, strict=True):
        row[: len(document.input_ids) - 1] = np.isin(document.input_ids[1:], wanted)
    return torch.from_numpy(mask)


def prune_document(document: Sample, keep: np.ndarray, drop: bool) -> Sample:
    """
    A copy of the sample without its pruned answer tokens.

    Args:
        document ([`Sample`]): The sample.
        keep (`np.ndarray` of shape `(at least tokens - 1,)`, bool or float64): The mask m, or weights of the losses,
            0 for pruned tokens; entry j stands for token j + 1.
        drop (`bool`): Take pruned tokens out of the sequence; otherwise only out of the loss (label -100).

    Returns:
        [`Sample`]: Prompt tokens are never touched.
    """
    labels = document.labels
    answer, weights = labels[1:] != IGNORE, keep[: len(labels) - 1]
    keep = weights != 0
    pruned = np.zeros(len(labels), dtype=bool)
    pruned[1:] = answer & ~keep
    document = replace(document, pruned=bool(pruned.any()), kept_mask=keep[answer])
    if weights.dtype != bool:
        document = replace(document, token_weights=weights[answer & keep])
    if drop:
        return replace(document, input_ids=document.input_ids[~pruned], labels=labels[~pruned])
    return replace(document, labels=np.where(pruned, IGNORE, labels))
