"""
Run as a process of its own: all of `qtuning score` but the model, on N rows; prints its peak of anonymous memory.

    python tests/score_memory.py FOLDER N
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars

from qtuning_trl.step.sample import Sample
from qtuning_trl.studies.dataset_scoring import (
    BatchSize,
    PartialScores,
    TokenPruning,
    scorable_rows,
    score_rows,
    select_rows,
)
from qtuning_trl.studies.scored_data import finished_rows, output_features, pruned_rows, write_rows

PART = 1000


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rows(count: int) -> Iterator[dict]:
    generator = np.random.default_rng(0)
    for row in range(count):
        ids = generator.integers(3, 40, generator.integers(8, 24)).tolist()
        yield {"input_ids": ids, "labels": [-100] * 4 + ids[4:], "sample_id": row, "text": f"row {row}"}


def forward(documents: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random values: what is measured here is what is done with them."""
    size = sum(int((document.labels[1:] != -100).sum()) for document in documents)
    return -torch.rand(size) * 5, torch.rand(size)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    disable_progress_bars()
    data = Dataset.from_generator(rows, gen_kwargs={"count": count}, cache_dir=str(folder / "cache"))
    original, prepared = data.select_columns(["text"]), data.select_columns(["input_ids", "labels", "sample_id"])
    partial = PartialScores(folder / "partial", {})
    partial.open()
    peaks = []
    parts = range(count // PART)
    for part in parts:
        documents = scorable_rows(prepared, slice(part * PART, (part + 1) * PART))
        partial.write(part, score_rows(documents, forward, BatchSize(None, torch.device("cpu")), padding_free=False))
        peaks.append(anonymous_bytes())
    decisions = select_rows(*partial.statistics(len(parts)), sample_ratio=0.25)
    pruning = TokenPruning(0.5, 0.5, drop=False, protected_ids={2})

    def tables() -> Iterator:
        for part in parts:
            place = slice(part * PART, (part + 1) * PART)
            whole = scorable_rows(prepared, place)
            scores, decided = partial.read(part), decisions.rows(place)
            documents = pruned_rows(whole, scores, decided, pruning)
            yield finished_rows(whole, documents, scores, decided, original, "all", False)
            peaks.append(anonymous_bytes())

    features = output_features(original.features, "all")
    result = write_rows(tables(), features, folder / "scored.parquet", "parquet", partial.folder)
    peaks.append(anonymous_bytes())
    assert sum(result.with_format("numpy")["keep"][:]) == count // 4
    print(max(peaks))


if __name__ == "__main__":
    main()
