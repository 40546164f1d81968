"""
What a step carries between processes, and what reused scores take: counted, with objects as a step makes them.

```bash
python tests/benchmarks/processes.py --ranks 2 8 64 --candidates 64 --tokens 256 --answer 128
```
"""

import argparse
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import torch

from qtuning_trl.records.run import StepCounts
from qtuning_trl.step.sample import Sample
from qtuning_trl.step.score_cache import Score, ScoreCache


def sample(number: int, tokens: int, answer: int) -> Sample:
    ids = np.arange(tokens) + number
    return Sample(ids, np.where(np.arange(tokens) < tokens - answer, -100, ids), sample_id=number)


def score(answer: int) -> Score:
    return Score(np.random.rand(answer).astype(np.float32), np.random.rand(answer).astype(np.float32), 0, 0)


def carried(candidates: int, tokens: int, answer: int, kept: float) -> dict[str, int]:
    """Bytes that a process sends in a step, by what it is."""
    columns = {name: torch.rand(candidates, dtype=torch.float64) for name in ("perplexity", "entropy")}
    columns["lengths"] = torch.full((candidates,), answer)
    pruned = torch.rand(round(kept * candidates) * answer, dtype=torch.float64)  # all of them, at most
    survivors = [replace(sample(number, tokens, answer)) for number in range(round(kept * candidates))]
    return {
        "counts": len(pickle.dumps(StepCounts())),
        "statistics (`all_processes`)": len(pickle.dumps((columns, candidates))),
        "survivors (`all_processes`)": len(pickle.dumps(survivors)),
        "token scores (`token_budget: pool`)": len(pickle.dumps((pruned, pruned > 2))),
        "new scores (`score_reuse_*`)": len(pickle.dumps({number: score(answer) for number in range(candidates)})),
    }


def cache_bytes(samples: int, answer: int) -> float:
    """Memory of a reused score, in bytes a sample."""
    cache = ScoreCache(2, None)
    tracemalloc.start()
    for number in range(samples):
        cache.scores[number + 1000] = score(answer)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--candidates", type=int, default=64, help="of a process and step")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--kept", type=float, default=0.25)
    arguments = parser.parse_args()
    sizes = carried(arguments.candidates, arguments.tokens, arguments.answer, arguments.kept)
    for name, size in sizes.items():
        received = ", ".join(f"{ranks} ranks {ranks * size / 2**20:.3f} MiB" for ranks in arguments.ranks)
        print(f"{name}: {size:,} bytes sent; each receives, with {received}")
    for answer in (16, arguments.answer):
        each = cache_bytes(20_000, answer)
        ten_million = each * 1e7 / 2**30
        print(f"reused score of {answer} answer tokens: {each:.0f} bytes; ten million: {ten_million:.1f} GiB a process")


if __name__ == "__main__":
    main()
