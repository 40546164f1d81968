"""
Scoring a whole data set without training, in memory that does not grow with it: the parts of `qtuning score`.

In the order of a run: a part of the rows goes through the model ([`score_rows`]) and is saved ([`PartialScores`]); when
all parts are there, stage 1 runs over two numbers a row ([`select_rows`]), stage 2 row by row ([`finished_rows`]), and
the result is written ([`write_rows`]).
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from ..method import sample_statistics, select_samples, token_keep_mask, token_scores
from ..step.sample import (
    SAMPLE_ID,
    Document,
    answer_lengths,
    answer_mask,
    protected_mask,
    prune_document,
    split_documents,
)
from ..step.scoring import score_documents, scoring_batches

# Tokens scored at once where nothing else is said: on a CPU, and on a GPU to begin with.
CPU_TOKENS = 4096
GPU_TOKENS = 16384

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
}
COLUMNS = ("all", "tokens", "original")
FORMATS = ("parquet", "jsonl", "dataset")

Forward = Callable[[list[Document]], tuple[Tensor, Tensor]]


# The forward pass


class BatchSize:
    """
    How many tokens are scored at once, padding included: halved when they do not fit, doubled while they do on a GPU.

    Args:
        tokens (`int`, *optional*): The most to score at once. If `None`, the most that fit into the GPU; `CPU_TOKENS`
            elsewhere.
        device (`torch.device`): Where the model is.
    """

    def __init__(self, tokens: int | None, device: torch.device):
        self.grows = tokens is None and device.type == "cuda"
        self.tokens = tokens or (GPU_TOKENS if self.grows else CPU_TOKENS)

    def batches(self, lengths: list[int], padding_free: bool) -> Iterator[list[int]]:
        """Indices into `lengths`, batch by batch, longest first; the size may change between two batches."""
        todo = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        while todo:
            tokens = self.tokens
            for batch in scoring_batches([lengths[index] for index in todo], tokens, padding_free):
                yield todo[: len(batch)]
                todo = todo[len(batch) :]
                if self.grows and todo:
                    self.tokens *= 2
                if self.tokens != tokens:
                    break

    def run(self, forward: Forward, documents: list[Document]) -> tuple[Tensor, Tensor]:
        """
        `forward(documents)`, in halves if they do not fit.

        Raises:
            `ValueError`: If a single document does not fit.
        """
        try:
            return forward(documents)
        except torch.OutOfMemoryError:
            longest = max(len(document["input_ids"]) for document in documents)
        # Only here, where the failed forward's tensors are gone with its traceback.
        torch.cuda.empty_cache()
        if len(documents) == 1:
            raise ValueError(
                f"`max_length`: a single row of {longest} tokens does not fit into memory; lower `max_length`, or load "
                "the model with `load_in_4bit`."
            )
        self.grows = False
        self.tokens = max(longest * len(documents) // 2, 1)
        half = len(documents) // 2
        parts = [self.run(forward, documents[:half]), self.run(forward, documents[half:])]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def score_rows(
    documents: list[Document],
    forward: Forward,
    size: BatchSize,
    padding_free: bool,
    on_scored: Callable[[int], None] = lambda rows: None,
) -> pa.Table:
    """
    Scores of a part of the rows.

    Args:
        documents (`list[Document]`): Rows, each with at least one answer token.
        forward (`Callable`): As of [`score_documents`].
        size ([`BatchSize`]): How many tokens to score at once.
        padding_free (`bool`): Whether a batch is flattened, so that padding costs nothing.
        on_scored (`Callable`): Called with the number of rows of each batch after it.

    Returns:
        `pa.Table`: `row` (the sample id), `perplexity`, `entropy` (nats), and `nll` of its answer tokens (nats).

    Raises:
        `FloatingPointError`: If a score is NaN or infinite.
    """

    def run(batch: list[Document]) -> tuple[Tensor, Tensor]:
        values = size.run(forward, batch)
        on_scored(len(batch))
        return values

    batches = size.batches([len(document["input_ids"]) for document in documents], padding_free)
    values = score_documents(documents, answer_mask(documents), batches, run)
    perplexity, entropy = sample_statistics(values.nll, values.entropy, values.answer_mask)
    broken = ~(perplexity.isfinite() & entropy.isfinite())
    if bool(broken.any()):
        raise FloatingPointError(
            f"{int(broken.sum())} of {len(broken)} rows have a NaN or infinite score, row {_first(documents, broken)} "
            "first: check the model, and load it with `dtype` bfloat16 or float32."
        )
    return pa.table(
        {
            "row": pa.array([document[SAMPLE_ID] for document in documents], pa.int64()),
            "perplexity": perplexity.numpy(),
            "entropy": entropy.numpy(),
            "nll": pa.array([values.row(index)[0] for index in range(len(documents))], pa.list_(pa.float32())),
        }
    )


def _first(documents: list[Document], chosen: Tensor) -> int:
    return documents[int(chosen.nonzero()[0])][SAMPLE_ID]


def scorable_rows(prepared: Dataset, rows: slice) -> list[Document]:
    """Rows of a prepared training set as documents, without those that have no answer token."""
    part = prepared[rows]
    columns = (part["input_ids"], part["labels"], part[SAMPLE_ID])
    documents = [
        document
        for ids, labels, row in zip(*columns, strict=True)
        for document in split_documents({"input_ids": ids, "labels": labels, SAMPLE_ID: row})
    ]
    return [doc for doc, length in zip(documents, answer_lengths(documents), strict=True) if length > 0]


# What a killed run leaves


def fingerprint(prepared: Dataset, rows: int = 1000) -> str:
    """A hash of the tokens and labels of rows spread over the data set, to tell whether they are still the same."""
    chosen = np.linspace(0, len(prepared) - 1, min(rows, len(prepared)), dtype=np.int64)
    part = prepared[chosen.tolist()]
    digest = blake2b(digest_size=16)
    for name in ("input_ids", "labels"):
        for values in part[name]:
            digest.update(np.asarray(values, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


class PartialScores:
    """
    The folder of a run that is not finished: its settings, and the scores of the parts that are done.

    Args:
        folder (`Path`): `<output>.partial`.
        settings (`dict`): What the scores depend on, as JSON can hold it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def open(self) -> None:
        """
        Begin the folder, or go on with it.

        Raises:
            `ValueError`: If it is that of a run with other settings, or no such folder at all.
        """
        refuse_foreign_folder(self.folder)
        file = self.folder / "settings.json"
        if not file.exists():
            if any(self.folder.glob("scores-*.parquet")):
                raise ValueError(
                    f"'{self.folder}' holds scores without their settings.json: remove the folder to start anew, or "
                    "give another `output`."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(file, lambda path: path.write_text(json.dumps(self.settings, indent=2), encoding="utf-8"))
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        differing = [name for name, value in self.settings.items() if found.get(name) != value]
        if differing:
            name = differing[0]
            raise ValueError(
                f"'{self.folder}' holds scores of a run whose `{name}` was {found.get(name)!r} and not "
                f"{self.settings[name]!r}: set it to that, remove the folder to start anew, or give another `output`."
            )

    def _file(self, part: int) -> Path:
        return self.folder / f"scores-{part:06}.parquet"

    def missing(self, parts: int) -> list[int]:
        """Parts that are still to be scored."""
        return [part for part in range(parts) if not self._file(part).exists()]

    def write(self, part: int, scores: pa.Table) -> None:
        """Save the scores of a part: the whole file or none."""
        _write_whole(self._file(part), lambda path: pq.write_table(scores, path))

    def read(self, part: int, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(self._file(part), columns=columns)

    def statistics(self, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Perplexity and entropy of all rows, part by part: float64 of shape `(rows,)`, 16 bytes a row together."""
        tables = [self.read(part, ["perplexity", "entropy"]) for part in range(parts)]
        perplexity, entropy = (np.concatenate([table[axis].to_numpy() for table in tables]) for axis in (0, 1))
        return perplexity, entropy


def refuse_foreign_folder(folder: Path) -> None:
    """Raise a `ValueError` if a folder (or file) of this name holds something else than the parts of a run."""
    foreign = folder.is_file() or any(
        not path.name.startswith(("scores-", "settings.json", "rows.", "result")) for path in folder.glob("*")
    )
    if foreign:
        raise ValueError(
            f"'{folder}' exists and is no folder of an interrupted `qtuning score`: move it away, or give another "
            "`output`."
        )


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first, so that a kill leaves no half of it."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, file)


# Both stages of the method


@dataclass(frozen=True)
class Decisions:
    """
    What stage 1 decided, row by row.

    Args:
        quadrant (`np.ndarray` of shape `(rows,)`, int8): 1 to 4; 0 between the thresholds.
        keep (`np.ndarray` of shape `(rows,)`, bool): The survivors.
        prune_tokens (`np.ndarray` of shape `(rows,)`, bool): Survivors whose answer tokens stage 2 prunes.
    """

    quadrant: np.ndarray
    keep: np.ndarray
    prune_tokens: np.ndarray

    def rows(self, rows: slice) -> "Decisions":
        return Decisions(self.quadrant[rows], self.keep[rows], self.prune_tokens[rows])


def select_rows(
    perplexity: np.ndarray, entropy: np.ndarray, sample_ratio: float, pool: int | None = None, seed: int = 0
) -> Decisions:
    """
    Stage 1 (Algorithm 1) over a data set.

    Args:
        perplexity, entropy (`np.ndarray` of shape `(rows,)`, float64): The statistics of [`PartialScores`].
        sample_ratio (`float`): r_sample, in (0, 1].
        pool (`int`, *optional*): Rows compared with each other, drawn at random; at most so many, in pools of even
            size. If `None`, all of them.
        seed (`int`): Of the draw.

    Returns:
        [`Decisions`]
    """
    size = len(perplexity)
    decisions = Decisions(np.zeros(size, np.int8), np.zeros(size, bool), np.zeros(size, bool))
    pools = [np.arange(size)]
    if pool is not None and pool < size:
        pools = np.array_split(np.random.default_rng(seed).permutation(size), math.ceil(size / pool))
    for drawn in pools:
        rows = np.sort(drawn)  # ties go to the earlier row
        selection = select_samples(torch.from_numpy(perplexity[rows]), torch.from_numpy(entropy[rows]), sample_ratio)
        decisions.quadrant[rows] = selection.quadrant.numpy()
        decisions.keep[rows] = selection.keep.numpy()
        decisions.prune_tokens[rows] = selection.prune_tokens.numpy()
    return decisions


@dataclass(frozen=True)
class TokenPruning:
    """
    How stage 2 prunes tokens: the options of [`QTuningSFTConfig`] of the same names.

    Args:
        token_ratio (`float`): r_token.
        neighbor_weight (`float`): lambda of eq. 7.
        drop (`bool`): Whether pruned tokens leave the sequence, or only get the label -100.
        protected_ids (`set[int]`): Tokens that are never pruned.
    """

    token_ratio: float
    neighbor_weight: float
    drop: bool
    protected_ids: set[int]

    def apply(self, documents: list[Document], nll: list[np.ndarray]) -> list[Document]:
        """Documents without their pruned tokens; `nll` holds that of each document's answer tokens, in nats."""
        if not documents or self.token_ratio == 1.0:
            return documents
        mask = answer_mask(documents)
        values = torch.zeros(mask.shape, dtype=torch.float64)
        values[mask] = torch.from_numpy(np.concatenate(nll)).double()
        scores = token_scores(values.exp(), mask, self.neighbor_weight)
        protected = protected_mask(documents, self.protected_ids, mask.shape)
        keep = token_keep_mask(scores, mask, self.token_ratio, protected).numpy()
        return [prune_document(doc, row, self.drop) for doc, row in zip(documents, keep, strict=True)]


# The result


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


def finished_rows(
    documents: list[Document],
    scores: pa.Table,
    decisions: Decisions,
    pruning: TokenPruning,
    original: Dataset,
    columns: str,
    kept_only: bool,
) -> pa.Table:
    """
    Rows of the result, those of one part.

    Args:
        documents (`list[Document]`): The part's rows that have an answer token.
        scores (`pa.Table`): Their scores.
        decisions ([`Decisions`]): Theirs.
        pruning ([`TokenPruning`]): Stage 2, for those whose tokens are pruned.
        original (`Dataset`): The data set, whose row numbers are the documents' sample ids.
        columns (`str`): As of [`output_features`].
        kept_only (`bool`): Leave out rows that are not kept.
    """
    pruned = np.flatnonzero(decisions.prune_tokens).tolist()
    nll = scores.column("nll").take(pa.array(pruned, pa.int64()))
    shortened = pruning.apply(
        [documents[index] for index in pruned], [np.asarray(row.as_py(), np.float32) for row in nll]
    )
    documents = list(documents)
    for index, document in zip(pruned, shortened, strict=True):
        documents[index] = document

    chosen = np.flatnonzero(decisions.keep) if kept_only else np.arange(len(documents))
    documents = [documents[index] for index in chosen]
    rows = [document[SAMPLE_ID] for document in documents]
    ids = [document["input_ids"] for document in documents]
    values: dict[str, Any] = {
        SAMPLE_ID: rows,
        **{name: scores.column(name).take(pa.array(chosen)) for name in ("perplexity", "entropy")},
        "quadrant": decisions.quadrant[chosen],
        "keep": decisions.keep[chosen],
        "input_ids": ids,
        "attention_mask": [np.ones(len(row), np.int8) for row in ids],
        "labels": [document["labels"] for document in documents],
    }
    taken = own_columns(original.features, columns)
    if taken:
        own = original.select_columns(taken).with_format("arrow")[rows]
        values |= {name: own.column(name) for name in taken}
    schema = output_features(original.features, columns).arrow_schema
    arrays = [_as_array(values[name], schema.field(name).type) for name in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)


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
    rows_file, result = scratch / "rows.arrow", scratch / "result"
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
    os.replace(result, output)
    return dataset
