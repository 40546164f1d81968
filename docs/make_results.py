"""
Make `docs/results.md`, and the README's table and picture, from the committed results of comparisons.

```bash
qtuning compare --config recipes/lab/compare_sums_2.yaml
cp runs/lab/results/sums_2/comparison.json docs/results/lab/sums_2.json
python docs/make_results.py           # --check: only say whether the pages are what the results make
```
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from qtuning_trl.studies.compare import FULL_DATA, ZERO_SHOT, Estimate, markdown, rows_from_json

DOCS = Path(__file__).parent
FOLDER = DOCS / "results" / "lab"
README = DOCS.parent / "README.md"
PICTURE = DOCS / "smollm2_seconds.png"
Curve = tuple[str, int, str, list[tuple[float, float]]]  # row, steps, style, and points: seconds and loss
BEGIN, END = "<!-- made by docs/make_results.py -->", "<!-- end -->"
# In the order of the page.
NAMES = (
    "smollm2_epochs",
    "smollm2_epochs_swapped",
    "smollm2_epochs_seconds",
    "smollm2_epochs_budgets",
    "smollm2_epochs_long",
    "smollm2_epochs_swapped_long",
    "smollm2_epochs_rates",
    "smollm2_squad_epochs",
    "smollm2_squad_epochs_swapped",
    "smollm2_squad_epochs_long",
    "smollm2_squad_epochs_rates",
    "smollm2_squad",
    "smollm2_gsm8k",
    "smollm2_gsm8k_swapped",
    "smollm2_seconds",
    "smollm2_rates",
    "sums_2_tokens",
    "sums_4_tokens",
    "gsm8k_tokens",
    "sums_2_stop",
    "sums_2_fill",
    "gsm8k_fill",
    "sums_2",
    "sums_4",
    "gsm8k",
    "gsm8k_variants",
    "sums_2_more_mislabelled",
    "sums_2_more_garbled",
    "sums_2_no_noise",
    "sums_2_variants",
    "sums_4_variants",
    "sums_2_more_garbled_variants",
    "sums_4_pools",
)
# The README's table: the study of the real model, and what it shows of it; the page has all rows.
README_STUDY, README_SWAPPED, README_SQUAD = "smollm2_epochs", "smollm2_epochs_swapped", "smollm2_squad_epochs"
README_LONG = "smollm2_epochs_long"
AT_ITS_RATE = "full data at 1e-3"  # the better one for full data there
README_ROWS = (
    ZERO_SHOT, FULL_DATA, "q_tuning", "q_tuning_code", "q_tuning + none", "random + none",
    "random + hardest", "q_tuning + importance (a quarter, none protected)",
    "random + importance (a quarter, none protected)",
)  # fmt: skip

INTRODUCTION = """# Results

For those who want every row of every comparison, with those that lost.

Made by `python docs/make_results.py` from [results/lab](results/lab), which hold every run; nothing here is written
by hand. [experiments.md](experiments.md) says what it means, on which machine and at which commit it ran, and what
else was tried.

What the rows are: a sample pruner and a token pruner ([pruners.md](pruners.md)); `q_tuning` alone is both its stages.
What the budget is: samples x tokens that are kept, in per cent. In the tables at equal tokens, as their titles say,
everybody is to train on the same share of the answer tokens (column `tokens`); in the older ones a token pruner of the
rivals prunes all survivors and Q-Tuning's Q2 alone, so that it trains on more tokens at the same budget. `perplexity`
tokens in the older ones are the easiest, which is the paper's wording and not its authors' code. All runs of a table
have the same number of optimizer steps, but for the one at equal seconds. `better` and `worse` stand where p < 0.05;
with so many rows, some are so by chance. Seconds and memory are those of a shared machine: a hint, no benchmark.

The laboratory's base models, its data and the noise planted in them are made by `python -m qtuning_trl.demo.lab`, those
of SmolLM2's study by `python recipes/lab/smollm2_study.py`; each table's comparison is in
[recipes/lab](../recipes/lab), `qtuning compare --config recipes/lab/compare_NAME.yaml`.
"""


def load(name: str) -> dict[str, Any]:
    """A comparison as `qtuning compare` wrote it."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def page(contents: dict[str, dict[str, Any]]) -> str:
    """`docs/results.md`."""
    parts = [INTRODUCTION]
    for name, content in contents.items():
        parts.append(markdown(rows_from_json(content), f"{content['title']} ({name})"))
        parts += [table for table in (figures_table(content), kinds_table(content)) if table]
    return "\n".join(parts)


def kinds_table(content: dict[str, Any]) -> str | None:
    """What share of each kind of row survived, over all seeds; `None` if the runs did not count kinds."""
    kept: dict[tuple[str, str], dict[str, list[int]]] = {}
    for run in content["runs"]:
        for kind, counts in (run.get("groups") or {}).items():
            if run["pruner"] not in (ZERO_SHOT, FULL_DATA):
                counted = kept.setdefault((run["pruner"], run["budget"]), {}).setdefault(kind, [0, 0])
                counted[0] += counts["kept"]
                counted[1] += counts["candidates"]
    if not kept:
        return None
    kinds = sorted({kind for counts in kept.values() for kind in counts})
    lines = [
        "Share of each kind of row that was kept:", "",
        f"| pruner | budget | {' | '.join(kinds)} |", f"|{'---|' * (len(kinds) + 2)}",
    ]  # fmt: skip
    for (pruner, budget), counts in kept.items():
        cells = [f"{counts[kind][0] / counts[kind][1]:.1%}" if kind in counts else "-" for kind in kinds]
        lines.append(f"| {pruner} | {budget} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures_table(content: dict[str, Any]) -> str | None:
    """Whatever else was measured, means over seeds; `None` if nothing was."""
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in content["runs"]:
        figures = {name: value for name, value in (run.get("figures") or {}).items() if not name.startswith("eval_")}
        if figures:
            figures["CPU seconds"] = run["cpu_seconds"]
            measured.setdefault((run["pruner"], run["budget"]), []).append(figures)
    if not measured:
        return None
    names = list(dict.fromkeys(name for runs in measured.values() for run in runs for name in run))
    headings = ["pruner", "budget", *(name.replace("_", " ") for name in names)]
    lines = [
        "What else was measured, means over seeds (shares, and nats a token):", "",
        f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}",
    ]  # fmt: skip
    for (pruner, budget), runs in measured.items():
        cells = []
        for name in names:
            measuring = [run for run in runs if name in run]  # earlier runs measured less
            form = "{:.0f}" if name == "CPU seconds" else "{:.3f}"
            cells.append(form.format(mean(measuring, name)) if measuring else "-")
        lines.append(f"| {pruner} | {budget} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme_table(contents: dict[str, dict[str, Any]]) -> str:
    """The README's table: the real model on two tasks, in twice the steps, and with a fifth of the answers swapped."""
    lines = [
        "| samples + tokens | answer tokens | CPU seconds | loss | calculations | six epochs: loss | 20% swapped: loss "
        "| SQuAD: loss | exact match |",
        f"|{'---|' * 9}",
    ]
    for pruner in README_ROWS:
        runs, swapped, squad = (
            runs_of(contents[name], pruner) for name in (README_STUDY, README_SWAPPED, README_SQUAD)
        )
        longer = runs_of(contents[README_LONG], AT_ITS_RATE if pruner == FULL_DATA else pruner)
        cells = [
            "-" if pruner == ZERO_SHOT else f"{mean(runs, 'kept_tokens'):.1%}",
            f"{mean(runs, 'cpu_seconds'):.0f}",
            shown([run["eval_loss"] for run in runs]),
            shown([run["figures"]["calculations"] for run in runs], share=True),
            *(shown([run["eval_loss"] for run in other]) for other in (longer, swapped, squad)),
            shown([run["accuracy"] for run in squad], share=True),
        ]
        lines.append(f"| {pruner} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means and half of the 95% interval over seeds (no interval: one); losses in nats a token; *calculations*:",
        "those of `<<48/2=24>>` whose result is the first choice. In six epochs full data has 1e-3, its better rate.",
    ]
    return "\n".join(lines)


def runs_of(content: dict[str, Any], pruner: str) -> list[dict[str, Any]]:
    """The runs of a row."""
    return [run for run in content["runs"] if run["pruner"] == pruner]


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Of what each of these has."""
    return sum(run[key] for run in runs) / len(runs)


def seconds_curves(contents: dict[str, dict[str, Any]]) -> list[Curve]:
    """Held-out loss by CPU seconds, means over seeds: of the README's rows, and, dashed, in twice the steps."""
    start = runs_of(contents[README_STUDY], ZERO_SHOT)[0]["eval_loss"]
    curves = []
    for name, style in ((README_STUDY, "-"), (README_LONG, "--")):
        for pruner in (*README_ROWS, AT_ITS_RATE):
            runs = runs_of(contents[name], pruner)
            if runs and pruner != ZERO_SHOT:
                points = [(0.0, start)]
                for at_once in zip(*(run["curve"] for run in runs), strict=True):
                    points.append((mean(list(at_once), "cpu_seconds"), mean(list(at_once), "eval_loss")))
                curves.append((pruner, runs[0]["steps"], style, points))
    return curves


def draw_seconds(curves: list[Curve], path: Path) -> None:
    """The README's picture; the file says what it was drawn from."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    colors = {FULL_DATA: "black", AT_ITS_RATE: "grey"}
    for pruner, steps, style, points in curves:
        color = colors.setdefault(pruner, f"C{len(colors) - 2}")  # a row's own, in both lengths
        axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{pruner}, {steps} steps", color=color)
    axes.set(ylim=(0.62, 1.0), xlim=(0, None), xlabel="CPU seconds of training, scoring included")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title("SmolLM2-135M-Instruct on 256 rows of GSM8K, in three epochs and in six", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Description": digest(curves)})
    plt.close(figure)


def digest(curves: list[Curve]) -> str:
    """Of what the picture shows."""
    return hashlib.sha256(json.dumps(curves).encode()).hexdigest()


def is_drawn_from(path: Path, curves: list[Curve]) -> bool:
    """Whether the picture is there and shows these curves."""
    from PIL import Image

    return path.is_file() and Image.open(path).info.get("Description") == digest(curves)


def shown(values: list[float], share: bool = False) -> str:
    """Mean and half-width of the interval; a dash for no values."""
    if not values:
        return "-"
    form, estimate = "{:.0%}" if share else "{:.3f}", Estimate.of(values)
    spread = "" if estimate.half_width is None else f" ± {form.format(estimate.half_width)}"
    return form.format(estimate.mean) + spread


def main() -> int:
    parser = argparse.ArgumentParser(description="Make docs/results.md and the README's table from committed results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    arguments = parser.parse_args()
    contents = {name: load(name) for name in NAMES if (FOLDER / f"{name}.json").is_file()}
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    pages = {
        DOCS / "results.md": page(contents),
        README: f"{before}{BEGIN}\n{readme_table(contents)}\n{END}{after}",
    }
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if arguments.check:
            print(f"{path} is not what the committed results make: run `python docs/make_results.py`.", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
            print(f"Written: {path}")
    curves = seconds_curves(contents)
    if not is_drawn_from(PICTURE, curves):
        stale.append(PICTURE)
        if arguments.check:
            print(f"{PICTURE} does not show the committed results: run `python docs/make_results.py`.", file=sys.stderr)
        else:
            draw_seconds(curves, PICTURE)
            print(f"Drawn: {PICTURE}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
