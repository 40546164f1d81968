"""The page of decoded examples, made by `docs/make_examples.py` from a run's record."""

import html
import re
from pathlib import Path

import pytest
from test_trainer import make_trainer

from qtuning_trl.records.samples import RecordReader


@pytest.fixture
def make_examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    import make_examples

    return make_examples


def squeezed(text: str) -> str:
    """Text without Markdown's escapes, quotes and spaces."""
    return "".join(re.sub(r"\\(.)", r"\1", html.unescape(text.replace("\n> ", " "))).split())


def test_each_decision_is_in_its_cell_and_what_is_struck_through_is_what_was_pruned(
    tmp_path, tokenizer, prompt_completion, make_examples
):
    make_trainer(tmp_path, tokenizer, prompt_completion, budget="50x50", max_steps=2).train()
    page = make_examples.page(tmp_path, "random characters", last_step=1, each=99)
    reader = RecordReader(tmp_path)
    rows = {row["sample_id"]: row for row in reader.samples().to_pylist() if row["step"] == 1}
    found = {}
    for cell in page.split("\n## ")[1:]:
        name, count = re.match(r"(.+): (\d+)\n", cell).groups()
        ids = [int(number) for number in re.findall(r"\*\*Row (\d+)\*\*", cell)]
        assert len(ids) == int(count)
        found.update(dict.fromkeys(ids, name))
    assert found.keys() == rows.keys()
    kept = {"Q2, kept", "Q4, kept", "The fill, kept"}
    assert {sample_id for sample_id, name in found.items() if name in kept} == {i for i in rows if rows[i]["kept"]}

    pruned = 0
    for sample_id, (ids, answer) in reader.texts(rows).items():
        shown = page.split(f"**Row {sample_id}**")[1].split("\n**Row")[0].split("\n##")[0]
        mask = rows[sample_id]["kept_mask"] or [True] * int(answer.sum())
        struck = "".join(re.findall(r"<del>(.*?)</del>", shown, re.DOTALL))
        wanted = tokenizer.decode([token for token, keep in zip(ids[answer], mask, strict=True) if not keep])
        assert squeezed(struck) == squeezed(wanted)
        whole = shown.split("\n>\n")[1].replace("<del>", "").replace("</del>", "")
        assert squeezed(whole.removeprefix("> ")) == squeezed(tokenizer.decode(ids[answer]))
        pruned += len(mask) - sum(mask)
    assert pruned > 10


def test_text_is_shown_as_text(make_examples):
    assert make_examples.escaped("2*3 <<b>> $5\n~x~") == r"2\*3 &lt;&lt;b&gt;&gt; \$5 ⏎ \~x\~"
    assert make_examples.struck(" and ") == " <del>and</del> "
    assert make_examples.struck(" ") == "<del>␣</del>"
    assert make_examples.paragraph("# 1 - a") == "> \\# 1 - a"


def test_a_run_without_decisions_is_refused(tmp_path, tokenizer, prompt_completion, make_examples):
    make_trainer(tmp_path, tokenizer, prompt_completion, budget="100x100", max_steps=1).train()
    with pytest.raises(ValueError, match="has no decisions of Q-Tuning up to step 1"):
        make_examples.page(tmp_path, "random characters", last_step=1, each=1)
