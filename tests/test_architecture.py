"""The page about the house names files and tests that exist, and the example of a pruner of one's own runs."""

import re
import runpy
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"
EXAMPLE = REPOSITORY / "docs" / "examples" / "own_pruner.py"


def test_every_file_test_and_name_on_the_page_exists():
    text = PAGE.read_text(encoding="utf-8")
    places = re.findall(r"`((?:qtuning_trl|tests)/[^`]*)`", text)
    assert len(places) > 40
    for place in places:
        file, _, test = place.partition("::")
        assert (REPOSITORY / file).exists(), place
        assert not test or f"\ndef {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), place
    # Whatever a line says is in a file is there.
    for names, file in re.findall(r"((?:`\w+`(?:, | and | or )?)+) in `(qtuning_trl/[^`]*\.py)`", text):
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b|^{name} =", source, re.M), f"{name} is not in {file}"
    for file in re.findall(r'\["([\w/]+\.py|\w+/): ', text):  # of the picture
        assert (REPOSITORY / "qtuning_trl" / file).exists() or (REPOSITORY / "qtuning_trl" / "step" / file).exists()


def test_every_room_is_on_the_page():
    rooms = {path.name for path in (REPOSITORY / "qtuning_trl").iterdir() if (path / "__init__.py").is_file()}
    text = PAGE.read_text(encoding="utf-8")
    assert {room for room in rooms if f"{room}/" not in text} <= {"demo"}


def test_the_example_keeps_what_it_says(tmp_path, own_pruners):
    example = runpy.run_path(str(EXAMPLE))
    trainer = example["main"](str(tmp_path), max_steps=2)
    loss, kept = np.log(trainer.last_pool["perplexity"]), np.array(trainer.last_pool["kept"])
    distance = np.abs(loss - np.sort(loss)[(len(loss) - 1) // 2])  # torch's median is the lower one of the two
    assert kept.sum() == 16
    assert distance[kept].max() <= distance[~kept].min()
    assert sum(counts["kept"] for counts in trainer.summary()["groups"].values()) == 32


def test_the_example_is_ten_lines():
    source = EXAMPLE.read_text(encoding="utf-8")
    own = source[source.index("@register") : source.index("def main")]
    assert len(own.strip().splitlines()) <= 10


def test_a_recipe_can_name_the_example(monkeypatch, own_pruners):
    from qtuning_trl import pruners

    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    assert pruners.sample_pruner("own_pruner:middle").needs == ("scores",)
