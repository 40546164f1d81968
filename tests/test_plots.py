"""The figure of the Error-Uncertainty plane: what it shows, and what it refuses."""

import subprocess
import sys

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
