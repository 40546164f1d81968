"""
`qtuning report`: one HTML file that shows what runs kept and dropped, made from their records.

[`report_data`] turns records into plain figures and texts; `report.html` draws them. The file holds everything it needs
(plotly's script too) and fetches nothing. Dataset text travels as JSON and is put on the page as text, never as HTML.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from ..records.run import PHASES, QUADRANTS, THRESHOLDS, asked_shares, ratio, selected
from ..records.samples import KEPT_MASK, SAMPLE_ID, RecordReader, steps_in_words
from .plots import GROUP_COLOURS, PHASE_COLOURS, QUADRANT_COLOURS, QUADRANT_NAMES

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("report.html")
DEFAULT_NAME = "qtuning_report.html"
# What is embedded, so that the page opens at once; the page says where it leaves something out.
MAX_POINTS = 50_000  # on the EU planes of all runs together
MAX_WINDOWS = 20  # positions of the slider
MAX_MOMENTS = 50  # points of a line over training
MAX_BARS = 40
MAX_GROUPS = len(GROUP_COLOURS) - 1
SAMPLES_SHOWN = 12  # most kept, and as many least kept
HISTORY_SHOWN = 40  # latest decisions about one of them
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 600, 2000  # of one of them
HOVER_PROMPT, HOVER_ANSWER = 80, 160  # characters of a point's text
DROPPED, KEPT, FILLED = range(3)


def write_report(
    runs: Sequence[str | Path], output: str | Path | None = None, color_by: str | None = None, png: bool = False
) -> list[Path]:
    """
    Write the report of one or several runs.

    Args:
        runs (`Sequence[str | Path]`): Output directories; a run may be over, still going, or crashed.
        output (`str` or `Path`, *optional*): The HTML file. If `None`, `qtuning_report.html` in the first run's folder.
        color_by (`str`, *optional*): What the points are coloured by at first: `"quadrant"`, or the runs'
            `group_column`. If `None`, the quadrant.
        png (`bool`): Write the main pictures beside it, too.

    Returns:
        `list[Path]`: The files written, the HTML first.

    Raises:
        `ValueError`: If a run has no record, or not the column.
        `ImportError`: If plotly (or matplotlib, for `png`) is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('The report needs plotly: run `pip install "qtuning-trl[report]"`.') from error
    readers = [RecordReader(run) for run in runs]
    data = report_data(readers, _names(runs), color_by)
    output = Path(runs[0], DEFAULT_NAME) if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Escaped, so that no text in the data can end the script that holds it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    head, middle, tail = _split_template()
    output.write_text(head + get_plotlyjs() + middle + text + tail, encoding="utf-8")
    return [output, *(_write_pictures(readers, data, output) if png else [])]


def _split_template() -> tuple[str, str, str]:
    head, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("/*PLOTLY*/")
    middle, _, tail = rest.partition("/*DATA*/")
    return head, middle, tail


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names; their paths as given where the names are not enough to tell them apart."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


# Figures and texts


def report_data(readers: Sequence[RecordReader], names: Sequence[str], color_by: str | None = None) -> dict[str, Any]:
    """
    What the page shows, as plain values (see the script `data` in the HTML).

    Raises:
        `ValueError`: If `color_by` is neither `"quadrant"` nor a run's group column.
    """
    columns = [reader.run["config"].get("group_column") for reader in readers]
    known = sorted({column for column in columns if column is not None})
    if color_by not in (None, "quadrant", *(["group", *known] if known else [])):
        raise ValueError(
            f"`--color_by` is {color_by!r}: choose {' or '.join(map(repr, ['quadrant', *known]))}; a run records the "
            "column that `group_column` names."
        )
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
        "runs": [
            run_data(reader, name, MAX_POINTS // len(readers)) for reader, name in zip(readers, names, strict=True)
        ],
    }


def run_data(reader: RecordReader, name: str, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """One run's part of the page."""
    steps = reader.steps().to_pandas()
    samples = reader.samples().drop_columns([KEPT_MASK]).to_pandas()
    samples["filled"] = samples["reason"] == "fill"
    samples["trimmed"] = samples["reason"] == "trim"
    samples["outcome"] = np.where(samples["filled"], FILLED, np.where(samples["kept"], KEPT, DROPPED))
    decoder = _Decoder(reader)
    return {
        "name": name,
        "state": _state(reader),
        "group_column": reader.run["config"].get("group_column"),
        "facts": run_facts(reader, steps, samples),
        "groups": _groups(samples),
        **_plane(samples, decoder, max_points),
        "over_training": _over_training(steps),
        "times_kept": _times_kept(samples),
        **_extremes(reader, samples, decoder),
    }


def _state(reader: RecordReader) -> str:
    last, goal = reader.last_step, reader.run["max_steps"]
    missing = reader.missing_steps()
    gap = f"; {steps_in_words(missing)} gone from the record" if missing else ""
    return (f"finished, {last:,} steps" if last >= goal else f"recorded up to step {last:,} of {goal:,}") + gap


def run_facts(reader: RecordReader, steps: "pd.DataFrame", samples: "pd.DataFrame") -> dict[str, Any]:
    """Totals of a run so far, under the names of `qtuning_summary.json`, from the record alone."""
    config, model = reader.run["config"], reader.run["model"]
    total = {name: int(steps[name].sum()) for name in steps.columns if steps[name].dtype.kind == "i"}
    pruned = samples[samples["kept"] & (samples["kept_tokens"] < samples["answer_tokens"])]
    return {
        # Pages are passed on: none shows the folders of this machine.
        "model": Path(model).name if Path(model).is_absolute() else model,
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


def _groups(samples: "pd.DataFrame") -> list[dict[str, Any]]:
    """Candidates and survivors by group, the largest first."""
    counts = samples.groupby("group")["kept"].agg(["size", "sum"]).sort_values("size", ascending=False)
    return [
        {"name": name, "candidates": int(size), "kept": int(kept)}
        for name, size, kept in counts.itertuples(index=True, name=None)
    ]


def _plane(samples: "pd.DataFrame", decoder: "_Decoder", max_points: int) -> dict[str, Any]:
    """
    Points of the EU plane in order of steps, and the windows of steps that the slider moves over.

    Beyond `max_points` it is the same random samples at every step, so that they can be followed.
    """
    if samples.empty:
        return {"points": None, "points_of": 0, "windows": [], "samples": []}
    chosen = samples.iloc[np.sort(np.argsort(_shuffled(samples[SAMPLE_ID]), kind="stable")[:max_points])]
    first, last = int(samples["step"].min()), int(samples["step"].max())
    count = min(MAX_WINDOWS, last - first + 1)
    bounds = [first + round(index * (last - first + 1) / count) for index in range(count + 1)]
    windows = []
    for start, end in pairwise(bounds):
        rows = samples[(samples["step"] >= start) & (samples["step"] < end)]
        begin, stop = np.searchsorted(chosen["step"], [start, end]).tolist()
        windows.append({"first": start, "last": end - 1, "begin": begin, "end": stop, "of": len(rows)})
        windows[-1]["thresholds"] = {name: _number(rows[name].mean()) for name in THRESHOLDS}
    names = [group["name"] for group in _groups(samples)[:MAX_GROUPS]]
    index_of = {name: index for index, name in enumerate(names)}
    ids, place = np.unique(chosen[SAMPLE_ID], return_inverse=True)
    return {
        "points": {
            "sample": place.tolist(),
            "perplexity": [_number(value) for value in chosen["perplexity"]],
            "entropy": [_number(value) for value in chosen["entropy"]],
            "quadrant": chosen["quadrant"].tolist(),
            "outcome": chosen["outcome"].tolist(),
            "group": [index_of.get(name, len(names)) for name in chosen["group"]],
            "step": chosen["step"].tolist(),
        },
        "points_of": len(samples),
        "windows": windows,
        "samples": [[sample_id, *text] for sample_id, text in zip(ids.tolist(), decoder.short(ids), strict=True)],
    }


def _shuffled(sample_ids: "pd.Series") -> np.ndarray:
    """A number for each sample that has nothing to do with its place in the dataset; the same for the same sample."""
    return sample_ids.to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


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


def _extremes(reader: RecordReader, samples: "pd.DataFrame", decoder: "_Decoder") -> dict[str, list[Any]]:
    """The samples most and least often kept, with their answers; ties in an order of chance, the same each time."""
    if samples.empty:
        return {"most_kept": [], "least_kept": []}
    times = samples.groupby(SAMPLE_ID)["kept"].agg(["size", "sum"]).reset_index()
    times["chance"] = _shuffled(times[SAMPLE_ID])
    most = times.sort_values(["sum", "size", "chance"], ascending=[False, True, True])[SAMPLE_ID][:SAMPLES_SHOWN]
    least = times.sort_values(["sum", "size", "chance"], ascending=[True, False, True])[SAMPLE_ID][:SAMPLES_SHOWN]
    shown = {*most, *least}
    rows = reader.samples()
    masks: dict[int, tuple[int, list[bool]]] = {}
    masked = rows.filter(pc.field(SAMPLE_ID).isin(list(shown)) & pc.field(KEPT_MASK).is_valid())
    for row in masked.select(["step", SAMPLE_ID, KEPT_MASK]).to_pylist():
        masks[row[SAMPLE_ID]] = row["step"], row[KEPT_MASK]  # the latest stays
    texts = reader.texts(shown)
    parts = dict(list(samples[samples[SAMPLE_ID].isin(shown)].groupby(SAMPLE_ID)))

    def card(sample_id: int) -> dict[str, Any]:
        history = parts[sample_id]
        step, mask = masks.get(sample_id, (None, None))
        prompt, answer = decoder.pieces(texts.get(sample_id), mask)
        latest = history.iloc[-1]
        return {
            "id": int(sample_id),
            "group": latest["group"] if isinstance(latest["group"], str) else None,
            "scored": len(history),
            "kept": int(history["kept"].sum()),
            "perplexity": [_number(history["perplexity"].iloc[0]), _number(latest["perplexity"])],
            "entropy": [_number(history["entropy"].iloc[0]), _number(latest["entropy"])],
            "history": history[["step", "quadrant", "outcome"]].tail(HISTORY_SHOWN).to_numpy().tolist(),
            "prompt": prompt,
            "answer": answer,
            "pruned_at": step,
            "tokens": None if mask is None else [sum(mask), len(mask)],
        }

    return {"most_kept": [card(x) for x in most], "least_kept": [card(x) for x in least]}


class _Decoder:
    """Texts of recorded samples."""

    def __init__(self, reader: RecordReader):
        self.reader = reader
        self.tokenizer = reader.tokenizer()

    def _decode(self, ids: Any) -> str:
        if self.tokenizer is None:
            return " ".join(f"[{token}]" for token in ids)
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def short(self, sample_ids: np.ndarray) -> list[tuple[str, str]]:
        """The end of each prompt, and the beginning of each answer."""
        texts = self.reader.texts(sample_ids.tolist())
        short = []
        for sample_id in sample_ids.tolist():
            if sample_id not in texts:
                short.append(("", "(text not recorded)"))
                continue
            ids, answer = texts[sample_id]
            start = int(answer.argmax()) if answer.any() else len(ids)
            # A token has a character at least, but for pieces of rare ones.
            prompt = self._decode(ids[max(0, start - HOVER_PROMPT) : start])
            reply = self._decode(ids[start : start + HOVER_ANSWER])
            cut = len(prompt) > HOVER_PROMPT or start > HOVER_PROMPT
            more = len(reply) > HOVER_ANSWER or len(ids) > start + HOVER_ANSWER
            short.append((("…" if cut else "") + prompt[-HOVER_PROMPT:], reply[:HOVER_ANSWER] + ("…" if more else "")))
        return short

    def pieces(
        self, text: tuple[np.ndarray, np.ndarray] | None, mask: list[bool] | None
    ) -> tuple[str, list[list[Any]]]:
        """
        The prompt, and what follows it in pieces: `[text, kind]`, kind 0 for kept, 1 for pruned, 2 for no answer (a
        later turn of the user).
        """
        if text is None:
            return "", [["(text not recorded)", 2]]
        ids, answer = text
        kinds = np.where(answer, 0, 2)
        if mask is not None and len(mask) == answer.sum():
            kinds[answer] = np.where(mask, 0, 1)
        start = int(answer.argmax())
        prompt = self._decode(ids[:start])
        if len(prompt) > PROMPT_CHARACTERS:
            prompt = "…" + prompt[-PROMPT_CHARACTERS:]
        pieces: list[list[Any]] = []
        # Token by token, but decoded together: a token's text depends on those before it (spaces, split characters).
        ids, kinds = ids[start : start + ANSWER_CHARACTERS], kinds[start : start + ANSWER_CHARACTERS]
        done = 0
        for index, kind in enumerate(kinds.tolist()):
            so_far = self._decode(ids[: index + 1])
            if so_far.endswith("\ufffd") and index + 1 < len(ids):
                continue  # a character that the next token completes
            piece, done = so_far[done:], len(so_far)
            if pieces and pieces[-1][1] == kind:
                pieces[-1][0] += piece
            else:
                pieces.append([piece, kind])
            if done >= ANSWER_CHARACTERS:
                pieces.append(["…", 2])
                break
        return prompt, pieces


# Pictures


def _write_pictures(readers: Sequence[RecordReader], data: dict[str, Any], output: Path) -> list[Path]:
    """The EU plane of the latest window, the quadrants over training, and the time by phase, as PNG."""
    from .plots import plot_eu_plane, plot_seconds, plot_shares

    figures = {}
    for number, (reader, run) in enumerate(zip(readers, data["runs"], strict=True), start=1):
        prefix = f"{number}_" if len(readers) > 1 else ""
        if run["windows"]:
            samples = reader.samples().drop_columns([KEPT_MASK])
            latest = samples.filter(pc.field("step") >= run["windows"][-1]["first"]).to_pandas()
            colour = "group" if data["color_by"] == "group" and run["group_column"] else "quadrant"
            figures[f"{prefix}eu_plane"] = plot_eu_plane(latest, colour)
            figures[f"{prefix}quadrants"] = plot_shares(reader.steps().to_pandas())
    figures["seconds"] = plot_seconds({run["name"]: run["facts"]["seconds"] for run in data["runs"]})
    files = []
    for name, figure in figures.items():
        files.append(output.with_name(f"{output.stem}_{name}.png"))
        figure.savefig(files[-1], dpi=150)
    return files
