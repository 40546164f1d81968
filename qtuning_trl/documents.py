"""Documents: taking rows of the train loader apart, pruning their tokens, and putting survivors into micro-batches."""

from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

# One sample x + y: `input_ids` and `labels`, int64 arrays of shape (tokens,); its `sample_id`; `group` where the run
# counts by a column; `column`, its value of `score_column`; `weight` of its loss; `pruned` if tokens of its answer were
# taken out, and `kept_mask`, which of them stayed (bool, of shape (answer tokens,)).
Document = dict[str, Any]
NOT_FOR_THE_MODEL = ("sample_id", "group", "column", "weight", "pruned", "kept_mask", "documents")
SAMPLE_ID = "sample_id"
KEPT_MASK = "kept_mask"

IGNORE = -100


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
) -> list[Document]:
    """
    The documents of one row of the dataset: the row itself, or what `bfd` packing put together (`seq_lengths`).

    A packed row has no other columns, so its documents have no group and no score. A document's `sample_id` is its row
    number in the training set where the row holds it, else a hash of its tokens, which is the same wherever the
    document turns up.
    """
    input_ids = np.asarray(example["input_ids"], dtype=np.int64)
    labels = np.asarray(example.get("labels", example["input_ids"]), dtype=np.int64)
    if "seq_lengths" in example:
        ends = np.cumsum(example["seq_lengths"])[:-1]
        pieces = zip(np.split(input_ids, ends), np.split(labels, ends), strict=True)
        return [_with_id({"input_ids": ids, "labels": piece_labels}) for ids, piece_labels in pieces]
    document = _with_id({"input_ids": input_ids, "labels": labels}, example.get(SAMPLE_ID))
    if group_column is not None:
        document["group"] = example[group_column]
    if score_column is not None:
        document["column"] = example[score_column]
    return [document]


def _with_id(document: Document, row: int | None = None) -> Document:
    if row is None:
        tokens = document["input_ids"].tobytes() + document["labels"].tobytes()
        row = int.from_bytes(blake2b(tokens, digest_size=8).digest(), "big") >> 1  # an int64 for datasets and parquet
    return {**document, SAMPLE_ID: row}


def answer_lengths(documents: list[Document]) -> list[int]:
    """Answer tokens |T(x)| of each document: labels that are trained on after the causal shift."""
    return [int((document["labels"][1:] != IGNORE).sum()) for document in documents]


def sequence_tokens(documents: list[Document]) -> int:
    """Tokens of prompts and answers that can be predicted: all but the first of each document."""
    return sum(len(document["input_ids"]) - 1 for document in documents)


def prompt_of(document: Document) -> np.ndarray:
    """Tokens before the first that is trained on."""
    answer = document["labels"] != IGNORE
    return document["input_ids"][: int(answer.argmax()) if answer.any() else len(answer)]


def answer_mask(documents: list[Document]) -> Tensor:
    """Answer tokens T(x), bool of shape `(documents, longest - 1)`: column j stands for token j + 1."""
    longest = max((len(document["labels"]) for document in documents), default=1)
    mask = np.zeros((len(documents), longest - 1), dtype=bool)
    for row, document in zip(mask, documents, strict=True):
        row[: len(document["labels"]) - 1] = document["labels"][1:] != IGNORE
    return torch.from_numpy(mask)


def protected_mask(documents: list[Document], token_ids: set[int], shape: torch.Size) -> Tensor:
    """Positions that hold one of `token_ids`, bool of the shape of `answer_mask`."""
    mask = np.zeros(shape, dtype=bool)
    wanted = np.fromiter(token_ids, dtype=np.int64)
    for row, document in zip(mask, documents, strict=True):
        row[: len(document["input_ids"]) - 1] = np.isin(document["input_ids"][1:], wanted)
    return torch.from_numpy(mask)


def prune_document(document: Document, keep: np.ndarray, drop: bool) -> Document:
    """
    A copy of the document without its pruned answer tokens.

    Args:
        document (`Document`): The sample.
        keep (`np.ndarray` of shape `(at least tokens - 1,)`, bool): The mask m; entry j stands for token j + 1.
        drop (`bool`): Take pruned tokens out of the sequence; otherwise only out of the loss (label -100).

    Returns:
        `Document`: Prompt tokens are never touched.
    """
    labels = document["labels"]
    pruned = np.zeros(len(labels), dtype=bool)
    pruned[1:] = (labels[1:] != IGNORE) & ~keep[: len(labels) - 1]
    document = {**document, "pruned": bool(pruned.any())}
    if drop:
        return {**document, "input_ids": document["input_ids"][~pruned], "labels": labels[~pruned]}
    return {**document, "labels": np.where(pruned, IGNORE, labels)}


def pack_rows(documents: list[Document], max_length: int) -> list[Document]:
    """
    Pack documents into rows of at most `max_length` tokens, best fit decreasing, as `bfd` packing does.

    A row keeps its `documents`. No document may be longer than that; TRL's packing has cut them.
    """
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in sorted(documents, key=lambda document: -len(document["input_ids"])):
        length = len(document["input_ids"])
        fitting = [index for index, space in enumerate(free) if space >= length]
        if fitting:
            best = min(fitting, key=lambda index: free[index])
        else:
            best = len(rows)
            rows.append([])
            free.append(max_length)
        rows[best].append(document)
        free[best] -= length
    return [
        {
            "input_ids": np.concatenate([document["input_ids"] for document in row]),
            "labels": np.concatenate([document["labels"] for document in row]),
            "seq_lengths": [len(document["input_ids"]) for document in row],
            "documents": row,
        }
        for row in rows
    ]


def tokens_without_checkpointing(tokens: int, hidden_size: int, intermediate_size: int, num_layers: int) -> int:
    """
    Tokens of a micro-batch trained without checkpointing that keeps no more activations than `tokens` do with it.

    A layer of a Llama keeps about `10 * hidden_size + 4 * intermediate_size` values a token for its backward pass. With
    checkpointing all layers keep their input, and one of them at a time the rest.
    """
    inside = 10 * hidden_size + 4 * intermediate_size
    return int(tokens * (num_layers * hidden_size + inside) / (num_layers * inside))


def padded_tokens(rows: list[Document]) -> int:
    """Tokens of a micro-batch, padding included."""
    return len(rows) * max((len(row["input_ids"]) for row in rows), default=0)


def split_evenly(rows: list[Document], count: int) -> list[list[Document]]:
    """
    Rows sorted by length, longest first, in `count` micro-batches whose sizes differ by one at most.

    Sorting wastes little on padding and does not change the gradient of the step; even sizes keep the peak memory low.
    """
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    bounds = [round(index * len(rows) / count) for index in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]
