"""
`qtuning report`: one HTML file that shows what runs kept and dropped, made from their records, or a scored data set.

[`report_data`] turns records into plain figures and texts; `report.html` draws them. The file holds everything it needs
(plotly's script too) and fetches nothing. Dataset text travels as JSON and is put on the page as text, never as HTML.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from ..records.run import PHASES, QUADRANTS, asked_shares, ratio, selected
from ..records.samples import KEPT_MASK, RECORD_NAME, SAMPLE_ID, RecordReader, steps_in_words
from ..records.scored import ScoredReader, is_dataset_folder
from .plane import MAX_CARDS, Decoder, cards, groups, number, plane, quadrant_table, with_outcome
from .plots import GROUP_COLOURS, PHASE_COLOURS, QUADRANT_COLOURS, QUADRANT_NAMES

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("report.html")
DEFAULT_NAME = "_qtuning_report.html"  # beside the record, and no more pushed to the Hub than that is
# What is embedded, so that the page opens at once; the page says where it leaves something out.
MAX_POINTS = 50_000  # on the EU planes of all runs together
MAX_MOMENTS = 50  # points of a line over training
MAX_BARS = 40

Reader = RecordReader | ScoredReader


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    color_by: str | None = None,
    png: bool = False,
    tokenizer: str | None = None,
) -> list[Path]:
    """
    Write the report of one or several runs.

    Args:
        runs (`Sequence[str | Path]`): Output directories; a run may be over, still going, or crashed. Or files, or
            datasets on disk, that `qtuning score` wrote.
        output (`str` or `Path`, *optional*): The HTML file. If `None`, `_qtuning_report.html` in the first run's
            folder, or beside the first scored file.
        color_by (`str`, *optional*): What the points are coloured by at first: `"quadrant"`, or the runs'
            `group_column`, or any column of a scored file. If `None`, the quadrant.
        png (`bool`): Write the main pictures beside it, too.
        tokenizer (`str`, *optional*): Name or folder of the model that wrote the scored files.

    Returns:
        `list[Path]`: The files written, the HTML first.

    Raises:
        `ValueError`: If one is neither a run with a record nor a scored file, or has not the column.
        `ImportError`: If plotly (or matplotlib, for `png`) is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('The report needs plotly: run `pip install "qtuning-trl[report]"`.') from error
    readers = [open_run(run, tokenizer, color_by) for run in runs]
    data = report_data(readers, _names(runs), color_by)
    output = _default_output(Path(runs[0]), readers[0]) if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Escaped, so that no text in the data can end the script that holds it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    head, middle, tail = _split_template()
    output.write_text(head + get_plotlyjs() + middle + text + tail, encoding="utf-8")
    return [output, *(_write_pictures(readers, data, output) if png else [])]


def open_run(path: str | Path, tokenizer: str | None = None, color_by: str | None = None) -> Reader:
    """
    Whatever is to be shown: a run's record, or what `qtuning score` wrote.

    Raises:
        `ValueError`: If it is neither, in one sentence.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{str(path)!r} is not there: give the `output_dir` of a run, or what `qtuning score` wrote.")
    has_record = (path / RECORD_NAME).is_dir() or (path / "run.json").is_file()
    if path.is_file() or (is_dataset_folder(path) and not has_record):
        return ScoredReader(path, tokenizer, color_by)
    return RecordReader(path)


def _default_output(path: Path, reader: Reader) -> Path:
    if isinstance(reader, ScoredReader):
        return path.with_name(f"{path.stem}{DEFAULT_NAME}")
    return path / DEFAULT_NAME


def _split_template() -> tuple[str, str, str]:
    head, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("/*PLOTLY*/")
    middle, _, tail = rest.partition("/*DATA*/")
    return head, middle, tail


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names; their paths as given where the names are not enough to tell them apart."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


# Figures and texts


def report_data(readers: Sequence[Reader], names: Sequence[str], color_by: str | None = None) -> dict[str, Any]:
    """
    What the page shows, as plain values (see the script `data` in the HTML).

    Raises:
        `ValueError`: If `color_by` is neither `"quadrant"` nor a run's group column.
    """
    known = sorted({column for column in map(_group_column, readers) if column is not None})
    if color_by not in (None, "quadrant", *(["group", *known] if known else [])):
        scored = any(isinstance(reader, ScoredReader) for reader in readers)
        also = ", or a column of the scored file" if scored else ""
        raise ValueError(
            f"`--color_by` is {color_by!r}: choose {' or '.join(map(repr, ['quadrant', *known]))}{also}; a run records "
            "the column that `group_column` names."
        )
    points, shown = MAX_POINTS // len(readers), MAX_CARDS // len(readers)
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version("qtuning-trl"),
        "color_by": "quadrant" if color_by in (None, "quadrant") else "group",
        "quadrants": [
            {"number": number, "name": QUADRANT_NAMES[number], "colour": QUADRANT_COLOURS[number]}
            for number in (2, 4, 1, 3, 0)
        ],
        "group_colours": [colour for colour in GROUP_COLOURS if colour != "#000000"],
        "phases": [{"name": name, "colour": colour} for name, colour in PHASE_COLOURS.items()],
        "max_points": MAX_POINTS,
        "max_cards": MAX_CARDS,
        "runs": [
            scored_data(reader, name, points, shown)
            if isinstance(reader, ScoredReader)
            else run_data(reader, name, points, shown)
            for reader, name in zip(readers, names, strict=True)
        ],
    }


def _group_column(reader: Reader) -> str | None:
    return reader.group_column if isinstance(reader, ScoredReader) else reader.run["config"].get("group_column")


def run_data(
    reader: RecordReader, name: str, max_points: int = MAX_POINTS, max_cards: int = MAX_CARDS
) -> dict[str, Any]:
    """One run's part of the page."""
    steps = reader.steps().to_pandas()
    samples = with_outcome(reader.samples().drop_columns([KEPT_MASK]).to_pandas())
    decoder = Decoder(reader)
    masked = reader.samples().filter(pc.field(KEPT_MASK).is_valid()).select(["step", SAMPLE_ID, KEPT_MASK])
    masks = {row[SAMPLE_ID]: (row["step"], row[KEPT_MASK]) for row in masked.to_pylist()}  # the latest stays
    return {
        "name": name,
        "scored_file": False,
        "state": _state(reader),
        "settings": settings(reader),
        "group_column": _group_column(reader),
        "facts": run_facts(reader, steps, samples),
        "quadrants": quadrant_table(samples),
        "groups": groups(samples),
        **plane(samples, decoder, max_points),
        "over_training": _over_training(steps),
        "loss": loss_curves(reader, steps),
        "times_kept": _times_kept(samples),
        **cards(samples, masks, decoder, max_cards),
    }


def scored_data(
    reader: ScoredReader, name: str, max_points: int = MAX_POINTS, max_cards: int = MAX_CARDS
) -> dict[str, Any]:
    """A scored data set's part of the page."""
    samples = with_outcome(reader.samples())
    decoder = Decoder(reader)
    pruned = samples[samples["kept"] & (samples["kept_tokens"] < samples["answer_tokens"])]
    kept, filled = samples["kept"], samples["filled"]
    tokens, kept_tokens = int(samples["answer_tokens"].sum()), int(samples["kept_tokens"].sum())
    if not reader.says_what_was_pruned:
        state = "a scored data set, which does not say what was pruned"
    else:
        state = "a scored data set"
    return {
        "name": name,
        "scored_file": True,
        "state": state,
        "settings": [],
        "group_column": reader.group_column,
        "facts": {
            "candidates": len(samples),
            "kept": int(kept.sum()),
            "sample_ratio_reached": float(kept.mean()),
            "answer_tokens": {"ratio_reached": ratio(kept_tokens, tokens) if reader.says_what_was_pruned else None},
            "pruned_answers": len(pruned),
            "token_ratio_reached": ratio(int(pruned["kept_tokens"].sum()), int(pruned["answer_tokens"].sum())),
            "filled": int(filled.sum()),
        },
        "quadrants": quadrant_table(samples),
        "groups": groups(samples),
        **plane(samples, decoder, max_points),
        "over_training": {"step": []},
        "loss": {},
        "times_kept": {"first": []},
        **cards(samples, reader.masks(samples.loc[pruned.index, SAMPLE_ID]), decoder, max_cards),
    }


def settings(reader: RecordReader) -> list[str]:
    """How a run was set up, for a line of text: its model, data set, learning rate and size."""
    config, data = reader.run["config"], reader.run.get("data") or {}
    facts = [_without_folders(reader.run["model"])]
    name, rows = data.get("name"), data.get("rows")
    if name or rows:
        size = f"{rows:,} rows" if rows else ""
        facts.append("data set " + ", ".join(filter(None, (name and _without_folders(name), size))))
    if config.get("learning_rate") is not None:
        facts.append(f"learning rate {config['learning_rate']:g} ({config.get('lr_scheduler_type', 'linear')})")
    processes = reader.run["num_processes"]
    return [*facts, *([f"{processes} processes"] if processes > 1 else [])]


def _without_folders(name: str) -> str:
    """Pages are passed on: none shows the folders of this machine."""
    return ", ".join(Path(part).name if Path(part).is_absolute() else part for part in name.split(", "))


def loss_curves(reader: RecordReader, steps: "pd.DataFrame") -> dict[str, dict[str, list[Any]]]:
    """By what it is of: steps, and nats a token; all that was logged, and means over the scored candidates."""
    logs = reader.logs()
    curves: dict[str, dict[str, list[Any]]] = {}
    for name, key in (("training", "loss"), ("evaluation", "eval_loss")):
        entries = {entry["step"]: number(entry[key]) for entry in logs if isinstance(entry.get(key), float | int)}
        curves[name] = {"step": list(entries), "loss": list(entries.values())}
    window = np.arange(len(steps)) * min(MAX_MOMENTS, len(steps)) // max(len(steps), 1)
    means = (
        steps[["step", "pool_nll"]]
        .dropna()
        .groupby(window[steps["pool_nll"].notna()])
        .agg({"step": "max", "pool_nll": "mean"})
    )
    curves["candidates"] = {"step": means["step"].tolist(), "loss": [number(value) for value in means["pool_nll"]]}
    return {name: curve for name, curve in curves.items() if curve["step"]}


def _state(reader: RecordReader) -> str:
    last, goal = reader.last_step, reader.run["max_steps"]
    missing = reader.missing_steps()
    gap = f"; {steps_in_words(missing)} gone from the record" if missing else ""
    return (f"finished, {last:,} steps" if last >= goal else f"recorded up to step {last:,} of {goal:,}") + gap


def run_facts(reader: RecordReader, steps: "pd.DataFrame", samples: "pd.DataFrame") -> dict[str, Any]:
    """Totals of a run so far, under the names of `qtuning_summary.json`, from the record alone."""
    config = reader.run["config"]
    total = {name: int(steps[name].sum()) for name in steps.columns if steps[name].dtype.kind == "i"}
    pruned = samples[samples["kept"] & (samples["kept_tokens"] < samples["answer_tokens"])]
    return {
        "num_processes": reader.run["num_processes"],
        "steps": len(steps),
        "sample_ratio": config["sample_ratio"],
        "token_ratio": config["token_ratio"],
        **selected(total),
        "pruned_answers": len(pruned),
        "token_ratio_reached": ratio(int(pruned["kept_tokens"].sum()), int(pruned["answer_tokens"].sum())),
        "shares_asked": asked_shares(config["sample_ratio"], config["token_ratio"]),
        "distinct_samples": int(samples[SAMPLE_ID].nunique()),
        "distinct_kept": int(samples.loc[samples["kept"], SAMPLE_ID].nunique()),
        "seconds": {phase: float(steps[f"seconds_{phase}"].sum()) for phase in PHASES},
    }


def _over_training(steps: "pd.DataFrame") -> dict[str, list[Any]]:
    """Shares of the quadrants among the scored, and of the fill among the kept, over windows of steps."""
    names = list(QUADRANTS.values())
    count = min(MAX_MOMENTS, len(steps))
    window = np.arange(len(steps)) * count // max(len(steps), 1)
    sums = steps[[*names, "filled", "kept_samples", "pool_samples"]].groupby(window).sum()
    scored = sums[names].sum(axis=1)
    sums, scored = sums[scored > 0], scored[scored > 0]
    last = steps["step"].groupby(window).max()[sums.index]
    return {
        "step": last.tolist(),
        **{name: (sums[name] / scored).round(5).tolist() for name in names},
        "fill": (sums["filled"] / sums["kept_samples"]).round(5).tolist(),
    }


def _times_kept(samples: "pd.DataFrame") -> dict[str, list[Any]]:
    """How many samples were kept never, once, twice... (bins of equal width, if there are too many)."""
    if samples.empty:
        return {"first": [], "last": [], "samples": []}
    times = samples.groupby(SAMPLE_ID)["kept"].sum()
    width = int(times.max()) // MAX_BARS + 1
    counts = np.bincount(times // width)
    starts = np.arange(len(counts)) * width
    return {"first": starts.tolist(), "last": (starts + width - 1).tolist(), "samples": counts.tolist()}


# Pictures


def _write_pictures(readers: Sequence[Reader], data: dict[str, Any], output: Path) -> list[Path]:
    """The EU plane of the latest window, the quadrants over training, and the time by phase, as PNG."""
    from .plots import plot_eu_plane, plot_seconds, plot_shares

    figures = {}
    for place, (reader, run) in enumerate(zip(readers, data["runs"], strict=True), start=1):
        prefix = f"{place}_" if len(readers) > 1 else ""
        colour = "group" if data["color_by"] == "group" and run["group_column"] else "quadrant"
        if isinstance(reader, ScoredReader):
            figures[f"{prefix}eu_plane"] = plot_eu_plane(reader.samples(), colour)
        elif run["windows"]:
            samples = reader.samples().drop_columns([KEPT_MASK])
            latest = samples.filter(pc.field("step") >= run["windows"][-1]["first"]).to_pandas()
            figures[f"{prefix}eu_plane"] = plot_eu_plane(latest, colour)
            figures[f"{prefix}quadrants"] = plot_shares(reader.steps().to_pandas())
    seconds = {run["name"]: run["facts"]["seconds"] for run in data["runs"] if "seconds" in run["facts"]}
    if seconds:
        figures["seconds"] = plot_seconds(seconds)
    files = []
    for name, figure in figures.items():
        files.append(output.with_name(f"{output.stem}_{name}.png"))
        figure.savefig(files[-1], dpi=150)
    return files
