"""A run's pictures as figures. They need matplotlib, which is imported when a figure is asked for."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUADRANT_NAMES = {
    1: "Q1 harmful noise",
    2: "Q2 valuable misconception",
    3: "Q3 redundant",
    4: "Q4 calibration",
    0: "between the thresholds",
}
# Corner of each quadrant in axes coordinates, and how its label is anchored there.
CORNERS = {
    1: (0.99, 0.985, "right", "top"),
    2: (0.01, 0.985, "left", "top"),
    3: (0.01, 0.015, "left", "bottom"),
    4: (0.99, 0.015, "right", "bottom"),
}
# Okabe and Ito's colours, of which these four differ the most for readers with a colour vision deficiency.
QUADRANT_COLOURS = {1: "#D55E00", 2: "#0072B2", 3: "#56B4E9", 4: "#009E73", 0: "#BBBBBB"}
GROUP_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")
PHASE_COLOURS = {"scoring": "#E69F00", "selection": "#CC79A7", "collation": "#56B4E9", "training": "#0072B2"}
THRESHOLDS = ("perplexity_low", "perplexity_high", "entropy_low", "entropy_high")
COLUMNS = ("perplexity", "entropy", "quadrant", "kept", "filled", "group")
# Both axes are logarithmic in nats: a model that has learnt its data leaves most samples at a perplexity just above 1
# and an entropy just above 0, where linear axes, or the logarithm of the perplexity, would put them on one spot.
NATS_FLOOR = 1e-4  # what lies below is drawn there
LEAST_SPAN = 0.1  # of an axis, in decades: samples that are all alike lie together, and do not fill the plane
TICKS = 6


def plot_eu_plane(record: Any, color_by: str = "quadrant") -> "Figure":
    """
    Draw candidates on the Error-Uncertainty plane.

    Args:
        record ([`~datasets.Dataset`], [`~pandas.DataFrame`] or `dict`): What `load_record` gives, or some of its rows
            (those of the latest steps, say); the thresholds drawn are their mean. Or `QTuningSFTTrainer.last_pool`:
            columns of equal length, one entry a candidate (`perplexity`, `entropy` in nats, `quadrant` from 1 to 4 or
            0 for between the thresholds, `kept`, `filled`, `group`), and `thresholds` with `perplexity_low`,
            `perplexity_high`, `entropy_low` and `entropy_high`.
        color_by (`str`): `"quadrant"` or `"group"`, the value of `group_column`.

    Returns:
        [`~matplotlib.figure.Figure`]: Entropy on a logarithmic x, and on y the perplexity, spaced by the logarithm of
        its loss. Survivors are solid, diamonds where they were kept to fill the budget; dropped candidates are hollow.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If `color_by` is neither, the pool is empty, or its columns are missing or differ in length.
    """
    if color_by not in ("quadrant", "group"):
        raise ValueError(f"`color_by` is {color_by!r}: choose 'quadrant' or 'group'.")
    pool: dict[str, Any] = record if isinstance(record, dict) else _pool_of(record)
    lengths = {len(pool[name]) for name in COLUMNS} if pool else {0}
    if len(lengths) > 1:
        raise ValueError(f"The pool's columns {', '.join(COLUMNS)} differ in length: give the trainer's `last_pool`.")
    if lengths == {0}:
        raise ValueError("The pool is empty: plot after a step that selected, with a budget below 100x100.")
    figure = _new_figure(5.2)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("function", functions=(_log_loss, _perplexity))
    colours = _colours(pool, color_by)
    _draw_samples(axes, pool, color_by, colours)
    line: dict[str, Any] = {"color": "#444444", "linewidth": 0.9, "linestyle": "--", "zorder": 1}
    thresholds = {name: value for name, value in pool["thresholds"].items() if not math.isnan(value)}
    for name, value in thresholds.items():
        if name.startswith("perplexity"):
            axes.axhline(max(value, math.exp(NATS_FLOOR)), **line)
        else:
            axes.axvline(max(value, NATS_FLOOR), **line)
    _scale_axes(axes, pool)
    for quadrant, (x, y, horizontal, vertical) in CORNERS.items():
        axes.text(
            x,
            y,
            QUADRANT_NAMES[quadrant],
            transform=axes.transAxes,
            ha=horizontal,
            va=vertical,
            fontsize=9,
            fontweight="bold",
            color="#444444",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )
    axes.set_xlabel("uncertainty: mean entropy of the prediction (nats, log scale)")
    axes.set_ylabel("error: perplexity of the answer (log scale of the loss)")
    kept_count = sum(map(bool, pool["kept"]))
    axes.set_title(f"Error-Uncertainty plane: {kept_count} of {len(pool['kept'])} candidates kept")
    _draw_legend(figure, colours)
    return figure


def _draw_samples(axes: Any, pool: dict[str, Any], color_by: str, colours: dict[Any, tuple[str, str]]) -> None:
    entropy = [max(value, NATS_FLOOR) for value in pool["entropy"]]
    perplexity = [max(value, math.exp(NATS_FLOOR)) for value in pool["perplexity"]]
    # What was kept lies on top, and on what filled the budget what was kept for where it lies.
    for order, (kept, filled) in enumerate(((False, False), (True, True), (True, False)), start=2):
        for value, (_, colour) in colours.items():
            rows = [
                index
                for index in range(len(pool["kept"]))
                if (pool[color_by][index], bool(pool["kept"][index])) == (value, kept)
                and (bool(pool["filled"][index]) == filled or not kept)
            ]
            axes.scatter(
                [entropy[index] for index in rows],
                [perplexity[index] for index in rows],
                s=30,
                marker="D" if filled else "o",
                facecolors=colour if kept else "none",
                edgecolors=colour,
                linewidths=1.0,
                alpha=0.9 if kept else 0.7,
                zorder=order,
            )


def _scale_axes(axes: Any, pool: dict[str, Any]) -> None:
    """Both axes over the samples, with room for the labels of the corners and round ticks, however narrow they are."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    scales = (
        (axes.xaxis, "entropy", _log_entropy, _entropy, 0.06),
        (axes.yaxis, "perplexity", _log_loss, _perplexity, 0.12),
    )
    for axis, name, position, value, margin in scales:
        places = [float(position(number)) for number in pool[name]]
        low, high = axis_range(min(places), max(places), margin)
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(float(value(low)), float(value(high)))
        axis.set_major_locator(FixedLocator(round_ticks(low, high, position, value)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:.6g}"))


def axis_range(low: float, high: float, margin: float = 0.06) -> tuple[float, float]:
    """Ends of an axis, in decades, that holds the places `low` to `high` and has room beside them."""
    middle, half = (low + high) / 2, max(high - low, LEAST_SPAN) / 2
    return middle - half * (1 + 2 * margin), middle + half * (1 + 2 * margin)


def round_ticks(low: float, high: float, position: Any, value: Any) -> list[float]:
    """
    Values with few digits at about even distances on an axis.

    Args:
        low, high (`float`): Its ends, in decades.
        position, value (`Callable`): Of a value, its place on the axis; and the inverse.
    """
    step = (high - low) / TICKS
    ticks = []
    for number in range(TICKS):
        place = low + (number + 0.5) * step
        exact = float(value(place))
        # A perplexity just above 1 has its digits after the 1.
        one = 1.0 if value is _perplexity and exact < 2.0 else 0.0
        for digits in range(1, 7):
            tick = one + float(f"{exact - one:.{digits}g}")
            if abs(float(position(tick)) - place) <= step / 4:
                break
        ticks.append(tick)
    return ticks


def _draw_legend(figure: "Figure", colours: dict[Any, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "#444444"}
    entries = [
        Line2D([], [], marker="s", color=colour, linestyle="none", label=label) for label, colour in colours.values()
    ]
    entries += [
        Line2D([], [], marker="o", markerfacecolor="#444444", label="kept", **grey),
        Line2D([], [], marker="D", markerfacecolor="#444444", label="kept to fill the budget", **grey),
        Line2D([], [], marker="o", markerfacecolor="none", label="dropped", **grey),
        Line2D([], [], color="#444444", linewidth=0.9, linestyle="--", label="thresholds"),
    ]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=9)


def plot_shares(steps: Any) -> "Figure":
    """
    Draw how the quadrants shared the scored samples over the run, and how much of the kept ones the fill was.

    Args:
        steps ([`~pandas.DataFrame`]): Counts by step, `RecordReader.steps()` as a frame. Long runs are drawn as means
            over at most 50 windows of steps.

    Returns:
        [`~matplotlib.figure.Figure`]: A stacked area, and a line.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If no step scored anything.
    """
    names = {3: "q3", 4: "q4", 0: "between", 2: "q2", 1: "q1"}
    sums = steps.groupby((steps["step"] - 1) * min(len(steps), 50) // max(len(steps), 1)).agg(
        {"step": "mean", "filled": "sum", "kept_samples": "sum", **dict.fromkeys(names.values(), "sum")}
    )
    scored = sums[list(names.values())].sum(axis=1)
    if not scored.sum():
        raise ValueError("The run scored no sample: plot one with a budget below 100x100.")
    figure = _new_figure(3.6)
    axes = figure.add_subplot()
    axes.stackplot(
        sums["step"],
        [sums[name] / scored for name in names.values()],
        colors=[QUADRANT_COLOURS[number] for number in names],
        labels=[QUADRANT_NAMES[number] for number in names],
        alpha=0.85,
    )
    axes.plot(sums["step"], sums["filled"] / sums["kept_samples"], color="black", linewidth=1.4, label="fill, of kept")
    axes.set(xlabel="optimizer step", ylabel="share", ylim=(0, 1), title="Quadrants over training")
    axes.margins(x=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, reverse=True)
    return figure


def plot_seconds(seconds: dict[str, dict[str, float]]) -> "Figure":
    """
    Draw the seconds of each phase as one bar a run.

    Args:
        seconds (`dict[str, dict[str, float]]`): By name of the run, seconds by phase.

    Returns:
        [`~matplotlib.figure.Figure`]: Stacked bars.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure = _new_figure(1.4 + 0.5 * len(seconds))
    axes = figure.add_subplot()
    left = [0.0] * len(seconds)
    for phase, colour in PHASE_COLOURS.items():
        widths = [run.get(phase, 0.0) for run in seconds.values()]
        axes.barh(list(seconds), widths, left=left, color=colour, label=phase, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title="Time by phase")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _new_figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: run `pip install "qtuning-trl[report]"`.') from error
    return Figure(figsize=(8.4, height), layout="constrained")


def _pool_of(record: Any) -> dict[str, Any]:
    """The rows of a record as a pool; an empty one if there are none."""
    if record is None:
        return {}
    frame = record.to_pandas() if hasattr(record, "to_pandas") else record
    needed = {*COLUMNS, *THRESHOLDS, "reason"} - {"filled"}
    missing = sorted(needed - set(getattr(frame, "columns", ())))
    if missing:
        raise ValueError(f"The record lacks {', '.join(missing)}: give what `load_record` returns, or rows of it.")
    if not len(frame):
        return {}
    columns = {name: frame[name].tolist() for name in COLUMNS if name != "filled"}
    columns["group"] = [value if isinstance(value, str) else None for value in columns["group"]]
    thresholds = {name: float(frame[name].mean()) for name in THRESHOLDS}
    return {**columns, "filled": (frame["reason"] == "fill").tolist(), "thresholds": thresholds}


def _log_entropy(entropy: Any) -> Any:
    """Where an entropy in nats lies on its axis; NumPy arrays."""
    import numpy as np

    return np.log10(np.maximum(entropy, NATS_FLOOR))


def _entropy(position: Any) -> Any:
    """The entropy at a position of its axis: the inverse of [`_log_entropy`]."""
    return 10.0**position


def _log_loss(perplexity: Any) -> Any:
    """Where a perplexity lies on its axis: log10 of the loss, in nats, that it is the exponential of; NumPy arrays."""
    import numpy as np

    return np.log10(np.maximum(np.log(np.maximum(perplexity, 1.0)), NATS_FLOOR))


def _perplexity(position: Any) -> Any:
    """The perplexity at a position of its axis: the inverse of [`_log_loss`]."""
    import numpy as np

    return np.exp(np.minimum(10.0**position, 700.0))  # `exp` overflows above 709


def _colours(pool: dict[str, Any], color_by: str) -> dict[Any, tuple[str, str]]:
    """Label and colour of each value that occurs, in the legend's order."""
    present = set(pool[color_by])
    if color_by == "quadrant":
        return {value: (QUADRANT_NAMES[value], QUADRANT_COLOURS[value]) for value in QUADRANT_NAMES if value in present}
    values = sorted(present, key=str)
    return {value: (str(value), GROUP_COLOURS[index % len(GROUP_COLOURS)]) for index, value in enumerate(values)}
