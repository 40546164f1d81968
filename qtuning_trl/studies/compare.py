"""Comparisons: a grid of pruners x budgets x seeds over one recipe, its results, and their statistics."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .. import pruners
from ..recipe_files import load_recipe
from ..records.parts import write_whole

try:
    from scipy import stats
except ImportError:
    raise ImportError("comparisons need scipy, which is not installed: pip install 'qtuning-trl[compare]'.") from None

RESULT_NAME = "result.json"
FAILURE_NAME = "failure.txt"
RECIPE_NAME = "run.yaml"
ZERO_SHOT, FULL_DATA = "zero-shot", "full data"
FULL_BUDGET = "100x100"
# Figures of a run, and whether they are shown in per cent.
METRICS = {"accuracy": "accuracy", "eval_loss": "held-out loss (nats)"}


@dataclass(frozen=True)
class Run:
    """
    One training run of the grid.

    Args:
        pruner (`str`): The row it belongs to, with its budget.
        budget (`str`): Samples x tokens to keep, in per cent.
        seed (`int`): Seed of the run.
        options (`dict`): What it changes in the recipe.
        tokens (`float`, *optional*): Share of the answer tokens that it is to be trained on, in per cent, if the
            comparison fixes that.
    """

    pruner: str
    budget: str
    seed: int
    options: dict[str, Any] = field(hash=False)
    tokens: float | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        text = f"{self.pruner} {self.budget} seed {self.seed}"
        return "".join(character if character.isalnum() or character == "." else "-" for character in text)

    @property
    def cost(self) -> float:
        """Estimated time in runs on the full data: scoring takes a third of training (docs/benchmarks.md)."""
        if self.pruner == ZERO_SHOT:
            return 0.0
        if self.pruner == FULL_DATA:
            return 1.0
        scores = "scores" in pruners.sample_pruner(self.options.get("sample_pruner", "q_tuning")).needs
        return (1 / 3 if scores else 0.0) + float(self.budget.split("x")[0]) / 100


@dataclass
class Comparison:
    """
    What `compare.yaml` says.

    Args:
        recipe (`str`): Recipe that every run starts from; relative to the file.
        pruners (`list`): Rows to compare: a name such as `q_tuning`, `random + random` (sample pruner + token pruner),
            or a mapping with a `name`, options of `qtuning sft` and, if they differ, `budgets` of its own.
        budgets (`list[str]`, *optional*): Samples x tokens to keep, in per cent.
        tokens (`list[float]`, *optional*): Instead, shares of the answer tokens to train on, in per cent: each row gets
            the `sample_ratio` that its `token_ratio` (0.5; 1 where no token is pruned) needs for that, unless it names
            one itself, and `token_budget: pool`, which holds the share. A row may have `tokens` of its own.
        seeds (`list[int]`): At least two, for an interval.
        output_dir (`str`): Where the runs and the table go.
        options (`dict`): Options of `qtuning sft` for every run.
        accuracy (`str`, *optional*): `module:function`, called with the trainer, that returns the share of right
            answers on held-out tasks; or several figures by name, of which `accuracy` is shown.
        title (`str`, *optional*): What the table is headed with; the recipe's name by default.
    """

    recipe: str
    pruners: list[Any]
    seeds: list[int]
    output_dir: str
    budgets: list[str] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    accuracy: str | None = None
    title: str | None = None

    def __post_init__(self):
        self.title = self.title or Path(self.recipe).stem

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the recipe says, with those that it builds on; read once for all runs."""
        return load_recipe(self.recipe)

    def runs(self) -> list[Run]:
        """Every run of the grid, seed by seed, so that an early look sees all rows; the two references come first."""
        rows: list[tuple[str, str, dict[str, Any], float | None]] = [
            (ZERO_SHOT, FULL_BUDGET, {"budget": FULL_BUDGET}, None),
            (FULL_DATA, FULL_BUDGET, {"budget": FULL_BUDGET}, None),
        ]
        for pruner in self.pruners:
            name, options = pruner_options(pruner)
            budgets, tokens = options.pop("budgets", self.budgets), options.pop("tokens", self.tokens)
            if tokens:
                rows += [(name, *at_equal_tokens(name, options, share), share) for share in tokens]
            else:
                rows += [(name, budget, {**options, "budget": budget}, None) for budget in budgets]
        return [Run(row, budget, seed, options, share) for seed in self.seeds for row, budget, options, share in rows]


def at_equal_tokens(name: str, options: dict[str, Any], tokens: float) -> tuple[str, dict[str, Any]]:
    """
    Budget and options of a row that is to be trained on a share of the answer tokens.

    Args:
        name (`str`): The row.
        options (`dict`): Its options.
        tokens (`float`): The share, in per cent.

    Raises:
        `ValueError`: If it would take more samples than there are.
    """
    whole = options.get("token_pruner") == "none"
    token_ratio = 1.0 if whole else options.get("token_ratio", 0.5)
    sample_ratio = options.get("sample_ratio", tokens / 100 / token_ratio)
    if not 0 < sample_ratio <= 1:
        raise ValueError(
            f"`tokens` is {tokens} and {name!r} has a `token_ratio` of {token_ratio}: {sample_ratio:g} of the samples "
            "would be needed; give it a higher `token_ratio`, or lower `tokens`."
        )
    budget = f"{100 * sample_ratio:.6g}x{100 * token_ratio:.6g}"
    others = {name: value for name, value in options.items() if name not in ("sample_ratio", "token_ratio")}
    return budget, {"token_budget": "pool", **others, "budget": budget}


def load_comparison(path: str | Path) -> Comparison:
    """
    Read `compare.yaml`.

    Raises:
        `ValueError`: If it cannot be read, lacks a key or has an unknown one; in one sentence.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`--config` is '{path}': give the path of a comparison ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` is '{path}': no YAML file ({' '.join(str(error).split())}).") from None
    fields = Comparison.__dataclass_fields__
    if not isinstance(content, dict):
        raise ValueError(f"`--config` is '{path}': give a YAML file with the keys {', '.join(fields)}.")
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise ValueError(f"`{unknown[0]}` in {path} is no key of a comparison: use {', '.join(fields)}.")
    missing = [name for name in ("recipe", "pruners", "seeds", "output_dir") if not content.get(name)]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing in {path}: give it a value.")
    if bool(content.get("budgets")) == bool(content.get("tokens")):
        raise ValueError(f"`budgets` or `tokens` in {path}: give one of them, samples x tokens or tokens alone.")
    for name in ("pruners", "budgets", "tokens", "seeds"):
        if content.get(name) is not None and not isinstance(content[name], list):
            raise ValueError(f"`{name}` in {path} is {content[name]!r}: give a list, such as [{content[name]}].")
    wrong = [share for share in content.get("tokens") or [] if type(share) not in (int, float) or not 0 < share <= 100]
    if wrong:
        raise ValueError(
            f"`tokens` in {path} has {wrong[0]!r}: give shares of the answer tokens, in per cent, like 12.5."
        )
    wrong = [seed for seed in content["seeds"] if type(seed) is not int]
    if wrong:
        raise ValueError(f"`seeds` in {path} has {wrong[0]!r}: give whole numbers.")
    comparison = Comparison(**{name: value for name, value in content.items() if value is not None})
    if not Path(comparison.recipe).exists():
        comparison.recipe = str(path.parent / comparison.recipe)
    if not Path(comparison.recipe).is_file():
        raise ValueError(f"`recipe` in {path} is {content['recipe']!r}: no such file; give the path of a recipe.")
    if len(set(comparison.seeds)) != len(comparison.seeds):
        raise ValueError(f"`seeds` in {path} is {comparison.seeds}: give each seed once.")
    names = [run.name for run in comparison.runs()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`pruners` in {path} has two rows for {twice[0]!r}: give one of them another `name`.")
    return comparison


def pruner_options(pruner: Any) -> tuple[str, dict[str, Any]]:
    """
    Name and options of an entry of `pruners`.

    Raises:
        `ValueError`: If it is neither a name nor a mapping with one.
    """
    if isinstance(pruner, str):
        sample, _, token = (part.strip() for part in pruner.partition("+"))
        return pruner, {"sample_pruner": sample, "token_pruner": token or "q_tuning"}
    if isinstance(pruner, dict) and isinstance(pruner.get("name"), str):
        return pruner["name"], {name: value for name, value in pruner.items() if name != "name"}
    raise ValueError(
        f"`pruners` has the entry {pruner!r}: give a name such as 'random + random', or a mapping with a `name` and "
        "options."
    )


# Results


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a run whole or not at all, so that a killed run is repeated."""
    write_whole(folder / RESULT_NAME, json.dumps(result, indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run; `None` if it has none, or a damaged one, so that it is repeated."""
    try:
        return json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_results(folder: Path, runs: Iterable[Run]) -> dict[Run, dict[str, Any]]:
    """Results of the finished runs; of a failed one `{"failure": why}`."""
    found: dict[Run, dict[str, Any]] = {}
    for run in runs:
        result = read_result(folder / run.name)
        if result is not None:
            found[run] = result
        elif (folder / run.name / FAILURE_NAME).is_file():
            found[run] = {"failure": (folder / run.name / FAILURE_NAME).read_text(encoding="utf-8").strip()}
    return found


@dataclass
class Estimate:
    """Mean over seeds and half the width of its 95% interval (Student's t); no interval from a single seed."""

    mean: float
    half_width: float | None
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        mean = statistics.mean(values)
        if len(values) < 2:
            return cls(mean, None, values)
        error = stats.sem(values)
        return cls(mean, float(stats.t.ppf(0.975, len(values) - 1) * error), values)


def paired_p_value(values: dict[int, float], reference: dict[int, float]) -> float | None:
    """p of the paired t test over the seeds that both have; `None` for fewer than two, or if no pair differs."""
    pairs = _pairs(values, reference)
    if len(pairs) < 2 or all(a == b for a, b in pairs):
        return None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def _pairs(values: dict[int, float], reference: dict[int, float]) -> list[tuple[float, float]]:
    return [(values[seed], reference[seed]) for seed in sorted(set(values) & set(reference))]


def summarize(results: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One row a pruner and budget, in the order of the grid.

    Returns:
        `list[dict]`: `pruner`, `budget`, `seeds` (finished), `failures`, `tokens_asked` where the share is fixed; for
        each metric that was measured an [`Estimate`], the p value of the paired test against full data and whether it
        is the higher of the two on their common seeds; medians of `kept_samples`, `kept_tokens` (shares), `seconds`,
        `seconds_selecting`, `peak_bytes`.
    """
    rows: dict[tuple[str, str, float | None], dict[int, dict[str, Any]]] = {}
    for run, result in results.items():
        rows.setdefault((run.pruner, run.budget, run.tokens), {})[run.seed] = result
    full = rows.get((FULL_DATA, FULL_BUDGET, None), {})
    table = []
    for (pruner, budget, tokens), by_seed in rows.items():
        done = {seed: result for seed, result in by_seed.items() if "failure" not in result}
        failures = [f"seed {seed}: {result['failure']}" for seed, result in by_seed.items() if "failure" in result]
        row: dict[str, Any] = {"pruner": pruner, "budget": budget, "seeds": sorted(done), "failures": failures}
        for metric in METRICS:
            values = {seed: result[metric] for seed, result in done.items() if result.get(metric) is not None}
            if not values:
                continue
            row[metric] = Estimate.of(list(values.values()))
            if pruner != FULL_DATA:
                reference = {seed: r[metric] for seed, r in full.items() if r.get(metric) is not None}
                row[f"{metric}_p"] = paired_p_value(values, reference)
                row[f"{metric}_higher"] = sum(a - b for a, b in _pairs(values, reference)) > 0
        if tokens is not None:
            row["tokens_asked"] = tokens / 100
        for name in ("kept_samples", "kept_tokens", "seconds", "seconds_selecting", "peak_bytes"):
            figures = [result[name] for result in done.values() if result.get(name) is not None]
            row[name] = statistics.median(figures) if figures else None
        table.append(row)
    return table


# Tables


def table_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table that is shown and written."""
    metrics = [metric for metric in METRICS if any(metric in row for row in rows)]
    headings = ["pruner", "budget", "seeds"]
    for metric in metrics:
        headings += [METRICS[metric], "p against full"]
    headings += ["samples", "tokens", "seconds", "selecting", "peak MiB"]
    cells = []
    for row in rows:
        line = [row["pruner"], "-" if row["pruner"] == ZERO_SHOT else row["budget"], str(len(row["seeds"]))]
        for metric in metrics:
            line += [
                _estimate(row.get(metric), percent=metric == "accuracy"),
                _verdict(row, metric),
            ]
        for name, form in (
            ("kept_samples", "{:.1%}"),
            ("kept_tokens", "{:.1%}"),
            ("seconds", "{:.1f}"),
            ("seconds_selecting", "{:.1f}"),
        ):
            line.append(_number(row[name], form) + (_far_from_asked(row) if name == "kept_tokens" else ""))
        line.append(_number(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20, "{:.0f}"))
        cells.append(line)
    return headings, cells


def _estimate(estimate: Estimate | None, percent: bool) -> str:
    if estimate is None:
        return "-"
    form = "{:.1%}" if percent else "{:.4f}"
    text = form.format(estimate.mean)
    return text if estimate.half_width is None else f"{text} ± {form.format(estimate.half_width)}"


def _verdict(row: dict[str, Any], metric: str) -> str:
    """The p value against full data; below 0.05, whether the row is better or worse."""
    p_value = row.get(f"{metric}_p")
    text = _number(p_value, "{:.3f}")
    if p_value is None or not p_value < 0.05:  # NaN, where a run has diverged
        return text
    return f"{text} {'better' if row[f'{metric}_higher'] == (metric == 'accuracy') else 'worse'}"


def _far_from_asked(row: dict[str, Any]) -> str:
    """A mark where the share of tokens is more than a tenth away from what the comparison fixes."""
    asked, reached = row.get("tokens_asked"), row["kept_tokens"]
    return "" if asked is None or reached is None or abs(reached - asked) <= 0.1 * asked else f" (asked: {asked:.2%})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The table as Markdown, with what failed below it."""
    headings, cells = table_cells(rows)
    lines = [f"## {title}", "", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    lines += [
        "",
        "Mean ± half of the 95% interval over seeds; p of a paired t test against full data on the same seeds.",
    ]
    failures = [f"- {row['pruner']} {row['budget']}, {failure}" for row in rows for failure in row["failures"]]
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join(lines) + "\n"


def to_json(comparison: Comparison, results: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """
    A comparison with plain values: its `title`, what its runs had in common, the `versions` they ran with, the `rows`
    of [`summarize`], and every run's own figures.
    """
    rows = [
        {name: vars(value) if isinstance(value, Estimate) else value for name, value in row.items()}
        for row in summarize(results)
    ]
    return {
        "title": comparison.title,
        "recipe": comparison.recipe,
        "options": comparison.options,
        "versions": next((result["versions"] for result in results.values() if "versions" in result), None),
        "rows": rows,
        "runs": [
            {
                **{name: getattr(run, name) for name in ("pruner", "budget", "seed", "options", "tokens")},
                **{name: value for name, value in result.items() if name != "versions"},
            }
            for run, result in results.items()
        ],
    }


def rows_from_json(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of [`summarize`], of the runs that [`to_json`] wrote."""
    names = ("pruner", "budget", "seed", "options", "tokens")
    return summarize({Run(**{name: run.get(name) for name in names}): run for run in content["runs"]})
