"""
Scoring a whole data set without training, in memory that does not grow with it: the parts of `qtuning score`.

In the order of a run: a part of the rows goes through the model ([`score_rows`]) and is saved ([`PartialScores`]); when
all parts are there, stage 1 runs over two numbers a row ([`select_rows`]), and stage 2 row by row ([`TokenPruning`]).
The result is put together in `scored_data.py`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor

from ..method import sample_statistics, select_samples, token_keep_mask, token_scores
from ..step.sample import (
    SAMPLE_ID,
    Sample,
    answer_lengths,
    answer_mask,
    protected_mask,
    prune_document,
    split_documents,
)
from ..step.scoring import is_out_of_memory, score_documents, scoring_batches

# Tokens scored at once where nothing else is said: on a CPU, and on a GPU to begin with.
CPU_TOKENS = 4096
GPU_TOKENS = 16384

Forward = Callable[[list[Sample]], tuple[Tensor, Tensor]]


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

    def run(self, forward: Forward, documents: list[Sample]) -> tuple[Tensor, Tensor]:
        """
        `forward(documents)`, in halves if they do not fit.

        Raises:
            `ValueError`: If a single document does not fit.
        """
        try:
            return forward(documents)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest = max(len(document.input_ids) for document in documents)
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
    documents: list[Sample],
    forward: Forward,
    size: BatchSize,
    padding_free: bool,
    on_scored: Callable[[int], None] = lambda rows: None,
) -> pa.Table:
    """
    Scores of a part of the rows.

    Args:
        documents (`list[Sample]`): Rows, each with at least one answer token.
        forward (`Callable`): As of [`score_documents`].
        size ([`BatchSize`]): How many tokens to score at once.
        padding_free (`bool`): Whether a batch is flattened, so that padding costs nothing.
        on_scored (`Callable`): Called with the number of rows of each batch after it.

    Returns:
        `pa.Table`: `row` (the sample id), `perplexity`, `entropy` (nats), and `nll` of its answer tokens (nats).

    Raises:
        `FloatingPointError`: If a score is NaN or infinite.
    """

    def run(batch: list[Sample]) -> tuple[Tensor, Tensor]:
        values = size.run(forward, batch)
        on_scored(len(batch))
        return values

    batches = size.batches([len(document.input_ids) for document in documents], padding_free)
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
            "row": pa.array([document.sample_id for document in documents], pa.int64()),
            "perplexity": perplexity.numpy(),
            "entropy": entropy.numpy(),
            "nll": pa.array([values.row(index)[0] for index in range(len(documents))], pa.list_(pa.float32())),
        }
    )


def _first(documents: list[Sample], chosen: Tensor) -> int:
    return documents[int(chosen.nonzero()[0])].sample_id


def scorable_rows(prepared: Dataset, rows: slice) -> list[Sample]:
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


def fingerprint(prepared: Dataset) -> str:
    """A hash of the tokens and labels of all rows, to tell whether they are still the same."""
    digest = blake2b(digest_size=16)
    table = prepared.select_columns(["input_ids", "labels"]).with_format("arrow")
    for start in range(0, len(prepared), 1000):
        for column in table[start : start + 1000].columns:
            for values in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(values.to_numpy().astype(np.int64).tobytes())
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

    def remove(self) -> None:
        """Remove the folder: all of it at once for those who look, so that no half of it is gone on with."""
        hidden = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        self.folder.rename(hidden)
        shutil.rmtree(hidden)


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
    perplexity: np.ndarray,
    entropy: np.ndarray,
    sample_ratio: float,
    pool: int | None = None,
    seed: int = 0,
    stop_at_budget: bool = True,
) -> Decisions:
    """
    Stage 1 (Algorithm 1) over a data set.

    Args:
        perplexity, entropy (`np.ndarray` of shape `(rows,)`, float64): The statistics of [`PartialScores`].
        sample_ratio (`float`): r_sample, in (0, 1].
        pool (`int`, *optional*): Rows compared with each other, drawn at random; at most so many, in pools of even
            size. If `None`, all of them.
        seed (`int`): Of the draw.
        stop_at_budget (`bool`): As of [`~qtuning_trl.method.select_samples`].

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
        axes = torch.from_numpy(perplexity[rows]), torch.from_numpy(entropy[rows])
        selection = select_samples(*axes, sample_ratio, stop_at_budget)
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

    def apply(self, documents: list[Sample], nll: list[np.ndarray]) -> list[Sample]:
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
