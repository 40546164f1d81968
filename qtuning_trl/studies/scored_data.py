"""The result of `qtuning score`: the data set's rows with their scores and without their pruned tokens."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..records.scored import PRUNED
from ..step.sample import IGNORE, SAMPLE_ID, Sample, answer_lengths
from .dataset_scoring import Decisions, TokenPruning

TOKEN_COLUMNS = {
    "input_ids": List(Value("int32")),
    "attention_mask": List(Value("int8")),
    "labels": List(Value("int32")),
}
SCORE_COLUMNS = {
    "perplexity": Value("float64"),
    "entropy": Value("float64"),
    "quadrant": Value("int8"),
    "keep": Value("bool"),
    "answer_tokens": Value("int32"),
    PRUNED: List(Value("int32")),
}
COLUMNS = ("all", "tokens", "original")
FORMATS = ("parquet", "jsonl", "dataset")
WRITTEN_NAME = "result.written"


def own_columns(own: Features, columns: str) -> list[str]:
    """Columns of the data set that the result takes over: by default all that are not replaced."""
    if columns == "all":
        return [name for name in own if name not in {**SCORE_COLUMNS, **TOKEN_COLUMNS}]
    return list(own) if columns == "original" else []


def output_features(own: Features, columns: str) -> Features:
    """
    Columns of the result and their types.

    Args:
        own (`Features`): The data set's.
        columns (`str`): `"all"` (the data set's own, `sample_id`, those of the scores, those that are trained on),
            `"tokens"` (those that are trained on) or `"original"` (the data set's own).
    """
    added: dict[str, Any] = {}
    if columns == "all":
        added = {**({} if SAMPLE_ID in own else {SAMPLE_ID: Value("int64")}), **SCORE_COLUMNS}
    if columns != "original":
        added |= TOKEN_COLUMNS
    return Features({**{name: own[name] for name in own_columns(own, columns)}, **added})


def pruned_rows(documents: list[Sample], scores: pa.Table, decisions: Decisions, pruning: TokenPruning) -> list[Sample]:
    """
    The rows of one part after stage 2, those without pruned tokens included.

    Args:
        documents (`list[Sample]`): The part's rows that have an answer token.
        scores (`pa.Table`): Their scores.
        decisions ([`Decisions`]): Theirs.
        pruning ([`TokenPruning`]): Stage 2, for those whose tokens are pruned.
    """
    pruned = np.flatnonzero(decisions.prune_tokens).tolist()
    nll = scores.column("nll").take(pa.array(pruned, pa.int64()))
    shortened = pruning.apply(
        [documents[index] for index in pruned], [np.asarray(row.as_py(), np.float32) for row in nll]
    )
    documents = list(documents)
    for index, document in zip(pruned, shortened, strict=True):
        documents[index] = document
    return documents


def finished_rows(
    whole: list[Sample],
    documents: list[Sample],
    scores: pa.Table,
    decisions: Decisions,
    original: Dataset,
    columns: str,
    kept_only: bool,
) -> pa.Table:
    """
    Rows of the result, those of one part.

    Args:
        whole (`list[Sample]`): The part's rows.
        documents (`list[Sample]`): The same, as [`pruned_rows`] left them.
        scores (`pa.Table`): Their scores.
        decisions ([`Decisions`]): Theirs.
        original (`Dataset`): The data set, whose row numbers are the documents' sample ids.
        columns (`str`): As of [`output_features`].
        kept_only (`bool`): Leave out rows that are not kept.
    """
    chosen = np.flatnonzero(decisions.keep) if kept_only else np.arange(len(documents))
    whole, documents = ([rows[index] for index in chosen] for rows in (whole, documents))
    rows = [document.sample_id for document in documents]
    ids = [document.input_ids for document in documents]
    values: dict[str, Any] = {
        SAMPLE_ID: rows,
        **{name: scores.column(name).take(pa.array(chosen)) for name in ("perplexity", "entropy")},
        "quadrant": decisions.quadrant[chosen],
        "keep": decisions.keep[chosen],
        "answer_tokens": answer_lengths(whole),
        PRUNED: [_pruned_positions(before, after) for before, after in zip(whole, documents, strict=True)],
        "input_ids": ids,
        "attention_mask": [np.ones(len(row), np.int8) for row in ids],
        "labels": [document.labels for document in documents],
    }
    taken = own_columns(original.features, columns)
    if taken:
        own = original.select_columns(taken).with_format("arrow")[rows]
        values |= {name: own.column(name) for name in taken}
    schema = output_features(original.features, columns).arrow_schema
    arrays = [_as_array(values[name], schema.field(name).type) for name in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)


def _pruned_positions(whole: Sample, document: Sample) -> np.ndarray:
    """Where a row lost the labels of its answer; nowhere, if its tokens were taken out."""
    if len(whole) != len(document):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero((whole.labels != IGNORE) & (document.labels == IGNORE))


def _as_array(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def write_rows(tables: Iterable[pa.Table], features: Features, output: Path, form: str, scratch: Path) -> Dataset:
    """
    Write the result, by way of one file of Arrow record batches, which every format is then made from piece by piece.

    Args:
        tables (`Iterable[pa.Table]`): Rows of the result, part by part.
        features (`Features`): Their columns.
        output (`Path`): A file, or a folder; it appears when it is complete.
        form (`str`): `"parquet"`, `"jsonl"` or `"dataset"` (`Dataset.save_to_disk`).
        scratch (`Path`): Folder for files that are not complete, on the same disk.

    Returns:
        `Dataset`: The result, mapped from `scratch`.
    """
    rows_file, result, written = scratch / "rows.arrow", scratch / "result", scratch / WRITTEN_NAME
    if is_written(output, scratch):
        _remove(output)
    written.unlink(missing_ok=True)
    if result.is_dir():  # of a run that was killed here
        shutil.rmtree(result)
    with pa.OSFile(str(rows_file), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for table in tables:
            # One record batch, and not one of each row: that is how rows come that were gathered by their numbers.
            writer.write_table(table.combine_chunks())
    dataset = Dataset.from_file(str(rows_file))
    if form == "dataset":
        dataset.save_to_disk(result)
    elif form == "parquet":
        dataset.to_parquet(result)
    else:
        dataset.to_json(result, lines=True, double_precision=15)  # 10 by default
    output.parent.mkdir(parents=True, exist_ok=True)
    written.touch()
    os.replace(result, output)
    return dataset


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_written(output: Path, scratch: Path) -> bool:
    """Whether `output` is the result of the run whose folder `scratch` is, killed between writing and clearing up."""
    return output.exists() and (scratch / WRITTEN_NAME).exists() and not (scratch / "result").exists()
