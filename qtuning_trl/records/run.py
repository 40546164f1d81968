"""What a run counted and how long it took: the logged metrics and `qtuning_summary.json`."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..method import SampleSelection
from ..step.sample import Sample, answer_lengths

if TYPE_CHECKING:
    from ..config import QTuningSFTConfig
    from ..step.scoring import ScoredPool
    from ..step.selection import Group, Selection

SUMMARY_NAME = "qtuning_summary.json"
PHASES = ("scoring", "selection", "collation", "training")
QUADRANTS = {1: "q1", 2: "q2", 3: "q3", 4: "q4", 0: "between"}
COUNTS = (
    "pool_samples",
    "kept_samples",
    "pool_answer_tokens",
    "kept_answer_tokens",
    *QUADRANTS.values(),
    "filled",
    *(f"filled_{name}" for name in QUADRANTS.values()),
    "trimmed",
    "unscorable_samples",
    "scored_samples",
    "stale_scores",
)
THRESHOLDS = ("perplexity_low", "perplexity_high", "entropy_low", "entropy_high")
PACKAGES = ("qtuning-trl", "trl", "transformers", "peft", "accelerate", "datasets", "torch", "bitsandbytes")


def synchronize() -> None:
    """Wait for the accelerator, if there is one, so that a clock read next means what it says."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> dict[str, Any]:
    """Peak memory of this process so far, in bytes: the accelerator's if there is one, else the resident set size."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "bytes": torch.cuda.max_memory_allocated()}
    if sys.platform == "win32":  # which has no `resource`
        import psutil

        return {"device": "cpu", "bytes": psutil.Process().memory_info().peak_wset}
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": "cpu", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ImportError:
            continue
    return found


@dataclass
class StepCounts:
    """
    What one optimizer step selected from what: sums, so that those of several processes add up.

    Args:
        counts (`dict[str, float]`): Sums over candidates (`COUNTS`).
        thresholds (`dict[str, float]`): Sums over the `compared` groups of candidates (`THRESHOLDS`).
        compared (`int`): Groups of candidates compared with each other.
        nll, entropy (`float`): Sums over the answer tokens of the samples with a score, in nats.
        scored_tokens (`int`): Those answer tokens.
        scored (`bool`): Whether the candidates were scored; a run that keeps everything does not.
        groups (`dict[str, dict[str, int]]`): Candidates and survivors by the value of `group_column`.
    """

    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    thresholds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(THRESHOLDS, 0.0))
    compared: int = 0
    nll: float = 0.0
    entropy: float = 0.0
    scored_tokens: int = 0
    scored: bool = True
    groups: dict[str, dict[str, int]] = field(default_factory=dict)

    def add_selection(self, selection: SampleSelection) -> None:
        """Count the samples of one group of candidates."""
        self.counts["kept_samples"] += int(selection.keep.sum())
        if not self.scored:
            return
        self.compared += 1
        self.counts["filled"] += int(selection.filled.sum())
        self.counts["trimmed"] += int(selection.trimmed.sum())
        for number, name in QUADRANTS.items():
            inside = selection.quadrant == number
            self.counts[name] += int(inside.sum())
            self.counts[f"filled_{name}"] += int((inside & selection.filled).sum())
        for name in THRESHOLDS:
            self.thresholds[name] += getattr(selection, name)

    def add_groups(self, values: list[Any], what: str) -> None:
        """Count samples (`"candidates"` or `"kept"`) by the value of `group_column`."""
        for value in values:
            self.groups.setdefault(str(value), {"candidates": 0, "kept": 0})[what] += 1

    def __add__(self, other: "StepCounts") -> "StepCounts":
        """The counts of two processes together."""
        total = StepCounts(
            counts={name: self.counts[name] + other.counts[name] for name in COUNTS},
            thresholds={name: self.thresholds[name] + other.thresholds[name] for name in THRESHOLDS},
            compared=self.compared + other.compared,
            nll=self.nll + other.nll,
            entropy=self.entropy + other.entropy,
            scored_tokens=self.scored_tokens + other.scored_tokens,
            scored=self.scored,
        )
        add_to_groups(total.groups, self.groups)
        add_to_groups(total.groups, other.groups)
        return total

    def metrics(self) -> dict[str, float]:
        """What is logged: counts, mean thresholds, and the scored samples' NLL and entropy per answer token (nats)."""
        metrics = dict(self.counts)
        tokens = self.scored_tokens
        if self.compared:
            metrics |= {name: total / self.compared for name, total in self.thresholds.items()}
        if self.scored and tokens:
            metrics |= {"pool_nll": self.nll / tokens, "pool_entropy": self.entropy / tokens}
        decisions = self.counts["scored_samples"] + self.counts["stale_scores"]
        if self.scored and decisions:
            metrics["stale_share"] = self.counts["stale_scores"] / decisions
        return metrics


def count_step(
    args: "QTuningSFTConfig",
    groups: list[list[Sample]],
    candidates: list[list[Sample]],
    pool: "ScoredPool",
    selection: "Selection",
) -> StepCounts:
    """The counts of a step on this process: drawn `groups`, their `candidates`, those with a score, what was left."""
    step = StepCounts(scored=pool.values is not None)
    if pool.values is not None:
        step.nll, step.entropy = float(pool.values.nll.sum()), float(pool.values.entropy.sum())
        step.scored_tokens = int(pool.values.answer_mask.sum())
        step.counts["stale_scores"] = pool.stale
        step.counts["scored_samples"] = sum(map(len, pool.groups)) - pool.stale
    elif "scores" in args.token_needs and not args.prunes_in_loss:
        step.counts["scored_samples"] = len(selection.survivors)
    step.counts["pool_samples"] = sum(map(len, candidates))
    step.counts["unscorable_samples"] = sum(map(len, groups)) - sum(map(len, candidates))
    step.counts["pool_answer_tokens"] = sum(group.answer_tokens for group in selection.groups)
    step.counts["kept_answer_tokens"] = sum(answer_lengths(selection.survivors))
    for group in selection.groups:
        step.add_selection(group.decided)
    if args.group_column is not None:
        step.add_groups([sample.group for group in candidates for sample in group], "candidates")
        step.add_groups([sample.group for sample in selection.survivors], "kept")
    return step


def count_unpruned_step(batches: list[dict[str, Any]]) -> StepCounts:
    """The counts of a step of TRL's own, which keeps everything."""
    step = StepCounts(scored=False)
    for batch in batches:
        samples = len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["labels"])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        for name in ("pool", "kept"):
            step.counts[f"{name}_samples"] += samples
            step.counts[f"{name}_answer_tokens"] += tokens
    return step


def pool_columns(selection: "Selection") -> dict[str, Any] | None:
    """The scored candidates of a step, as `plot_eu_plane` takes them; the thresholds are those of the latest group."""
    pool: dict[str, Any] = {}
    for group in selection.groups:
        if group.perplexity is not None:
            columns = {**group_columns(group), "filled": group.decided.filled.tolist()}
            pool = {name: [*pool.get(name, []), *column] for name, column in columns.items()}
            pool["thresholds"] = {name: getattr(group.decided, name) for name in THRESHOLDS}
    return pool or None


def group_columns(group: "Group") -> dict[str, list[Any]]:
    """Scored candidates that were compared with each other, and what was decided about each."""
    assert group.perplexity is not None
    assert group.entropy is not None
    return {
        "sample_id": [sample.sample_id for sample in group.samples],
        "perplexity": group.perplexity.tolist(),
        "entropy": group.entropy.tolist(),
        "quadrant": group.decided.quadrant.tolist(),
        "kept": group.decided.keep.tolist(),
        "group": [sample.group for sample in group.samples],
    }


def add_to_groups(total: dict[str, dict[str, int]], groups: dict[str, dict[str, int]]) -> None:
    """Add candidates and survivors by group to the counts in `total`, in place."""
    for value, counts in groups.items():
        into = total.setdefault(value, {"candidates": 0, "kept": 0})
        for name, count in counts.items():
            into[name] += count


class RunRecord(TrainerCallback, ExportableState):
    """
    Counts and seconds of a run: totals since its first step, its summary, and the steps since the last log.

    A callback, because the end of an optimizer step is known to callbacks only; exportable, so that the totals of an
    interrupted run go on when it is resumed (they travel in the checkpoint's `trainer_state.json`).
    """

    def __init__(self):
        self.totals = self._new_totals()
        self.window: list[dict[str, float]] = []
        self.last_step: dict[str, float] = {}  # metrics of the latest step, and its seconds by phase
        self._seconds: dict[str, float] = defaultdict(float)
        self._training_since: float | None = None

    @staticmethod
    def _new_totals() -> dict[str, Any]:
        return {
            "steps": 0,
            "counts": dict.fromkeys(COUNTS, 0),
            "seconds": dict.fromkeys(PHASES, 0.0),
            "groups": {},
        }

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"totals": self.totals}}

    # Events of the trainer

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.totals = self._new_totals()
        if state.global_step > 0:
            before = saved["attributes"]["totals"]
            # A checkpoint of an earlier version lacks counts that are new.
            self.totals = {**before, "counts": {**self.totals["counts"], **before["counts"]}}
        self.window.clear()

    def on_step_end(self, args, state, control, **kwargs):
        if self._training_since is None:
            return
        synchronize()
        self._seconds["training"] += time.perf_counter() - self._training_since
        self._training_since = None
        self.totals["steps"] += 1
        for phase in PHASES:
            self.totals["seconds"][phase] += self._seconds[phase]
        self.window[-1]["seconds_selecting"] = sum(self._seconds[phase] for phase in PHASES if phase != "training")
        self.window[-1]["seconds_training"] = self._seconds["training"]
        self.last_step = {**self.window[-1], **{f"seconds_{phase}": self._seconds[phase] for phase in PHASES}}
        self._seconds.clear()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            text = json.dumps(run_summary(self, args), indent=2)
            Path(args.output_dir, SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")

    # What the trainer reports

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a phase of the step."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def begin_training(self, step: StepCounts) -> None:
        """Take in what a step selected, of all processes; from here on the clock runs for training."""
        step = sum(gather_object([step]), start=StepCounts(scored=step.scored))
        for name in COUNTS:
            self.totals["counts"][name] += int(step.counts[name])
        add_to_groups(self.totals["groups"], step.groups)
        self.window.append(step.metrics())
        self._training_since = time.perf_counter()

    def pop_metrics(self) -> dict[str, float]:
        """
        Mean of each metric over the optimizer steps since the last call, and the shares of samples and of answer tokens
        that were kept in them; empty if there was none.
        """
        sums: dict[str, list[float]] = defaultdict(list)
        for step in self.window:
            for name, value in step.items():
                sums[name].append(value)
        self.window.clear()
        metrics = {name: sum(values) / len(values) for name, values in sums.items()}
        for what in ("samples", "answer_tokens"):
            if metrics.get(f"pool_{what}"):
                metrics[f"kept_{what}_share"] = metrics[f"kept_{what}"] / metrics[f"pool_{what}"]
        return {f"qtuning/{name}": value for name, value in metrics.items()}

    def summary(self) -> dict[str, Any]:
        """The run's totals: samples, answer tokens, quadrants, seconds by phase, peak memory (bytes), versions."""
        counts, seconds = self.totals["counts"], self.totals["seconds"]
        return {
            "steps": self.totals["steps"],
            **selected(counts),
            "unscorable": counts["unscorable_samples"],
            "scored": counts["scored_samples"],
            "stale_scores": counts["stale_scores"],
            "groups": self.totals["groups"],
            "seconds": {**seconds, "total": sum(seconds.values())},
            "peak_memory": peak_memory(),
            "versions": versions(),
        }


def ratio(part: int, whole: int) -> float | None:
    """The share of a part; `None` of nothing."""
    return part / whole if whole else None


def selected(counts: dict[str, int]) -> dict[str, Any]:
    """What was kept of what, by the names of `qtuning_summary.json`, from the sums of `COUNTS`."""
    return {
        "candidates": counts["pool_samples"],
        "kept": counts["kept_samples"],
        "sample_ratio_reached": ratio(counts["kept_samples"], counts["pool_samples"]),
        "answer_tokens": {
            "candidates": counts["pool_answer_tokens"],
            "kept": counts["kept_answer_tokens"],
            "ratio_reached": ratio(counts["kept_answer_tokens"], counts["pool_answer_tokens"]),
        },
        "quadrants": {name: counts[name] for name in QUADRANTS.values()},
        "filled": counts["filled"],
        # A record of an earlier version does not say where the fill came from.
        "filled_by_quadrant": {
            name: counts[f"filled_{name}"] for name in QUADRANTS.values() if f"filled_{name}" in counts
        },
        "trimmed": counts["trimmed"],
    }


def asked_shares(sample_ratio: float, token_ratio: float) -> dict[str, float]:
    """
    What a budget asks for: the shares of the samples and of all answer tokens.

    `25x50` is an eighth of the tokens, in the paper's words; with `token_budget` 'answer' what stays whole is on top.
    """
    return {"samples": sample_ratio, "answer_tokens": sample_ratio * token_ratio}


def run_summary(record: RunRecord, args: "QTuningSFTConfig") -> dict[str, Any]:
    """The run's totals so far and its configuration: the content of `qtuning_summary.json`."""
    config = json.loads(json.dumps(args.to_dict(), default=str))
    summary = record.summary()
    reached = {
        "samples": summary["sample_ratio_reached"],
        "answer_tokens": summary["answer_tokens"]["ratio_reached"],
    }
    shares = {
        what: {"asked": asked, "reached": reached[what]}
        for what, asked in asked_shares(args.sample_ratio, args.token_ratio).items()
    }
    return {**summary, "shares": shares, "num_processes": args.world_size, "config": config}
