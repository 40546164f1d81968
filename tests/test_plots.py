"""The figure of the Error-Uncertainty plane: what it shows, and what it refuses."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from qtuning_trl.method import select_samples
from qtuning_trl.report import plots
from qtuning_trl.report.plots import CORNERS, QUADRANT_NAMES, plot_eu_plane

matplotlib = pytest.importorskip("matplotlib")
THRESHOLDS = ("perplexity_low", "perplexity_high", "entropy_low", "entropy_high")


@pytest.fixture
def pool() -> dict:
    generator = torch.Generator().manual_seed(0)
    perplexity = 1.0 + torch.rand(64, generator=generator, dtype=torch.float64).exp2() ** 3
    entropy = 0.4 * perplexity + torch.rand(64, generator=generator, dtype=torch.float64)
    selection = select_samples(perplexity, entropy, 0.25)
    return {
        "perplexity": perplexity.tolist(),
        "entropy": entropy.tolist(),
        "quadrant": selection.quadrant.tolist(),
        "kept": selection.keep.tolist(),
        "filled": selection.filled.tolist(),
        "group": ["clean" if index % 2 else "garbled" for index in range(64)],
        "thresholds": {name: getattr(selection, name) for name in THRESHOLDS},
    }


def points(axes) -> list[tuple[float, float, bool]]:
    """Entropy, perplexity and whether it is solid, of each point drawn."""
    return [
        (float(x), float(y), bool(len(collection.get_facecolors())))
        for collection in axes.collections
        for x, y in collection.get_offsets()
    ]


@pytest.mark.parametrize("color_by", ["quadrant", "group"])
def test_every_candidate_is_drawn_once_and_survivors_are_solid(pool, color_by):
    axes = plot_eu_plane(pool, color_by=color_by).axes[0]
    expected = list(zip(pool["entropy"], pool["perplexity"], pool["kept"], strict=True))
    assert sorted(points(axes)) == sorted(expected)
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == "function"


def test_samples_just_above_perplexity_one_lie_apart_and_the_lowest_lie_on_the_edge(pool):
    rows = {"perplexity": [1.0, 1.001, 1.01, 2.0], "entropy": [0.0, 0.001, 0.01, 1.0]}
    rest = {name: pool[name][:4] for name in ("quadrant", "kept", "filled", "group")}
    axes = plot_eu_plane({**rows, **rest, "thresholds": pool["thresholds"]}).axes[0]
    drawn = sorted((x, y) for x, y, _ in points(axes))
    assert drawn[0] == pytest.approx((plots.NATS_FLOOR, 1.0 + plots.NATS_FLOOR), rel=1e-6)
    assert drawn[1:] == [(0.001, 1.001), (0.01, 1.01), (1.0, 2.0)]
    places = axes.transAxes.inverted().transform(axes.transData.transform(drawn))
    assert (places[1:] - places[:-1] > 0.1).all()
    assert ((places > 0.0) & (places < 1.0)).all()


def test_the_scale_of_the_perplexity_has_an_inverse():
    for value in (1.001, 1.5, 20.0, 1e6):
        assert plots._perplexity(plots._log_loss(value)) == pytest.approx(value)


def test_thresholds_and_corners_are_drawn(pool):
    axes = plot_eu_plane(pool).axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    horizontal = {line.get_ydata()[0] for line in lines if line.get_ydata()[0] == line.get_ydata()[1]}
    vertical = {line.get_xdata()[0] for line in lines if line.get_xdata()[0] == line.get_xdata()[1]}
    assert {pool["thresholds"]["perplexity_low"], pool["thresholds"]["perplexity_high"]} <= horizontal
    assert {pool["thresholds"]["entropy_low"], pool["thresholds"]["entropy_high"]} <= vertical
    assert {text.get_text() for text in axes.texts} == {QUADRANT_NAMES[quadrant] for quadrant in CORNERS}


def test_the_legend_names_what_occurs(pool):
    by_group = {text.get_text() for text in plot_eu_plane(pool, color_by="group").legends[0].get_texts()}
    assert {"clean", "garbled", "kept", "dropped", "kept to fill the budget"} <= by_group
    by_quadrant = {text.get_text() for text in plot_eu_plane(pool).legends[0].get_texts()}
    assert {QUADRANT_NAMES[quadrant] for quadrant in set(pool["quadrant"])} <= by_quadrant


def test_a_figure_without_groups_is_drawn(pool, tmp_path):
    pool["group"] = [None] * 64
    plot_eu_plane(pool, color_by="group").savefig(tmp_path / "plane.png")
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color_by": "kind"}, "choose 'quadrant' or 'group'"),
        ({"kept": []}, "differ in length"),
        ({"record": None}, "The pool is empty"),
    ],
)
def test_refusals(pool, change, message):
    arguments = {"record": pool, **{key: value for key, value in change.items() if key in ("record", "color_by")}}
    if "kept" in change:
        arguments["record"] = {**pool, "kept": change["kept"]}
    with pytest.raises(ValueError, match=message):
        plot_eu_plane(**arguments)


@pytest.fixture
def frame(pool) -> pd.DataFrame:
    """Two steps of a record, as `load_record` gives it."""
    reason = ["fill" if filled else "quadrant" for filled in pool["filled"]]
    columns = {name: pool[name] for name in ("perplexity", "entropy", "quadrant", "kept", "group")}
    steps = []
    for step in (1, 2):
        thresholds = {name: value * step for name, value in pool["thresholds"].items()}
        steps.append(pd.DataFrame({"step": step, **columns, "reason": reason, **thresholds}))
    return pd.concat(steps, ignore_index=True)


def test_a_record_is_drawn_as_the_pools_it_holds(pool, frame):
    expected = list(zip(pool["entropy"], pool["perplexity"], pool["kept"], strict=True))
    for record in (frame, Dataset.from_pandas(frame)):
        axes = plot_eu_plane(record, color_by="group").axes[0]
        assert sorted(points(axes)) == sorted(2 * expected)
        lines = {line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]}
        assert min(lines) == pytest.approx(1.5 * pool["thresholds"]["perplexity_low"])
    with pytest.raises(ValueError, match="The record lacks kept, reason: give what `load_record` returns"):
        plot_eu_plane(frame.drop(columns=["kept", "reason"]))
    with pytest.raises(ValueError, match="The pool is empty"):
        plot_eu_plane(frame.head(0))


def test_shares_over_training_add_up_and_show_the_fill():
    rows = {"q1": 2, "q2": 1, "q3": 3, "q4": 1, "between": 1, "filled": 1, "kept_samples": 4}
    steps = pd.DataFrame([{"step": step, **rows} for step in range(1, 301)])
    axes = plots.plot_shares(steps).axes[0]
    assert len(axes.lines[0].get_xdata()) == 50
    assert set(axes.lines[0].get_ydata()) == {0.25}
    top = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert top.max() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="scored no sample"):
        plots.plot_shares(pd.DataFrame([{"step": 1, **dict.fromkeys(rows, 0)}]))


def test_seconds_are_stacked_by_phase():
    seconds = {"a": {"scoring": 1.0, "training": 2.0}, "b": {"scoring": 3.0, "training": 4.0}}
    bars = plots.plot_seconds(seconds).axes[0].patches
    ends = {(round(bar.get_y()), bar.get_x() + bar.get_width()) for bar in bars}
    assert {(0, 3.0), (1, 7.0)} <= ends


def test_without_matplotlib_one_sentence_says_what_to_install(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'run `pip install "qtuning-trl\[report\]"`'):
        plot_eu_plane(pool)


def test_importing_the_module_imports_no_matplotlib_and_plotting_no_pyplot():
    code = (
        "import importlib.util, sys\n"
        # By its path: importing the package first imports torch and TRL, which takes seconds.
        f"spec = importlib.util.spec_from_file_location('plots', {plots.__file__!r})\n"
        "plots = importlib.util.module_from_spec(spec); spec.loader.exec_module(plots)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "columns = {name: [1.0] for name in plots.COLUMNS}\n"
        "thresholds = dict.fromkeys(('perplexity_low', 'perplexity_high', 'entropy_low', 'entropy_high'), 1.0)\n"
        "plots.plot_eu_plane({**columns, 'thresholds': thresholds})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Machado, Oliveira and Fernandes (2009), severity 1: what linear RGB looks like to a viewer without one kind of cone.
CONES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear sRGB to XYZ.
XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def lab(colour: str, cones: str) -> np.ndarray:
    """CIE L*a*b* of a colour `#rrggbb`, as such a viewer sees it."""
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(CONES[cones]) @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_measured_as_they_look():
    assert lab("#ffffff", "all") == pytest.approx([100, 0, 0], abs=0.1)
    assert lab("#ff0000", "all") == pytest.approx([53.2, 80.1, 67.2], abs=0.3)


@pytest.mark.parametrize(
    ("cones", "least"), [("all", 25), ("protanopia", 20), ("deuteranopia", 20), ("tritanopia", 15)]
)
def test_the_colour_blind_tell_the_quadrants_apart(cones, least):
    """A difference of 2.3 can just be seen; those of Q1 and Q2 were 18 to 33 before, in vermillion and orange."""
    colours = {number: lab(colour, cones) for number, colour in plots.QUADRANT_COLOURS.items()}
    apart = {pair: np.linalg.norm(colours[pair[0]] - colours[pair[1]]) for pair in combinations(colours, 2)}
    assert min(apart.values()) > least, apart
    assert apart[1, 2] > 80


def test_kept_samples_are_drawn_over_dropped_ones_and_over_the_fill(pool):
    axes = plot_eu_plane(pool).axes[0]
    order = {}
    for collection in axes.collections:
        for x, y in collection.get_offsets():
            order[float(x), float(y)] = collection.get_zorder()
    places = list(zip(pool["entropy"], pool["perplexity"], strict=True))
    rank = {(False, False): 0, (True, True): 1, (True, False): 2}
    kinds = [rank[kept, filled] for kept, filled in zip(pool["kept"], pool["filled"], strict=True)]
    assert {0, 2} <= set(kinds)
    assert [order[place] - min(order.values()) for place in places] == kinds


@pytest.mark.parametrize("nats", [(0.5, 2.0), (1.0, 1.001), (1e-4, 5.0), (0.02, 0.021), (1.0, 1.0)])
def test_axes_have_round_ticks_however_narrow_they_are(pool, nats):
    loss = np.geomspace(*nats, len(pool["kept"]))
    pool |= {"perplexity": np.exp(loss).tolist(), "entropy": loss.tolist()}
    axes = plot_eu_plane(pool).axes[0]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        inside = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        labels = [axis.get_major_formatter()(tick) for tick in inside]
        assert 5 <= len(set(labels)) == len(labels), labels
        assert max(map(len, labels)) <= 7, labels
