"""`qtuning report` of what `qtuning score` wrote: counts worked by hand, struck-through tokens, refusals, the page."""

from pathlib import Path

import pytest
from datasets import Dataset
from test_report import browser, drawn_points, needs_browser, open_page, page_data, shown_heads  # noqa: F401
from transformers import PreTrainedTokenizerFast

from qtuning_trl.cli import main
from qtuning_trl.report.report import open_run, report_data, write_report


@pytest.fixture
def scored(tmp_path, tokenizer_dir) -> Path:
    """As `qtuning score` writes it: a row of each quadrant and one more of Q1; of the first "b" and "d" are pruned."""
    rows = [
        # quadrant, keep, perplexity, entropy, positions in "x y ? a b c d" whose labels were pruned
        (2, True, 9.0, 0.5, [4, 6]),
        (4, True, 2.0, 1.5, []),
        (1, True, 8.0, 1.2, []),  # fill
        (1, False, 7.0, 1.1, []),
        (3, False, 3.0, 0.7, []),
    ]
    ids = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)("xy?abcd")["input_ids"]
    assert len(ids) == 7
    columns = {
        "source": ["even", "odd", "even", "odd", "even"],
        "sample_id": [10, 11, 12, 13, 14],
        "perplexity": [row[2] for row in rows],
        "entropy": [row[3] for row in rows],
        "quadrant": [row[0] for row in rows],
        "keep": [row[1] for row in rows],
        "answer_tokens": [4] * 5,
        "pruned": [row[4] for row in rows],
        "input_ids": [ids] * 5,
        "labels": [[-100 if at < 3 or at in row[4] else token for at, token in enumerate(ids)] for row in rows],
    }
    Dataset.from_dict(columns).to_parquet(tmp_path / "scored.parquet")
    return tmp_path / "scored.parquet"


def test_a_scored_file_shows_what_it_would_train_on(scored, tokenizer_dir, tmp_path, capsys):
    assert main(["report", str(scored), "--tokenizer", tokenizer_dir, "--color_by", "source", "--png"]) == 0
    page, *pictures = capsys.readouterr().out.split()
    assert page == str(tmp_path / "scored_qtuning_report.html")
    assert [Path(picture).name for picture in pictures] == ["scored_qtuning_report_eu_plane.png"]
    [shown] = page_data(page)["runs"]
    counts = {name: list(row.values()) for name, row in shown["quadrants"].items()}
    # candidates, kept, of them fill, answer tokens kept
    assert counts == {
        "q1": [2, 1, 1, 4],
        "q2": [1, 1, 0, 2],
        "q3": [1, 0, 0, 0],
        "q4": [1, 1, 0, 4],
        "between": [0] * 4,
    }
    facts = shown["facts"]
    assert (facts["candidates"], facts["kept"], facts["filled"], facts["pruned_answers"]) == (5, 3, 1, 1)
    assert (facts["answer_tokens"]["ratio_reached"], facts["token_ratio_reached"]) == (10 / 20, 0.5)
    # Q1 and Q2 begin at a perplexity of 7 and Q3 and Q4 end at 3; of the entropy, 1.1 and 0.7.
    assert shown["windows"][0]["thresholds"] == {
        "perplexity_low": 3.0, "perplexity_high": 7.0, "entropy_low": 0.7, "entropy_high": 1.1,
    }  # fmt: skip
    assert {card["id"]: card["answer"] for card in shown["cards"]} == {
        10: [["a", 0], [" b", 1], [" c", 0], [" d", 1]],
        **{number: [["a b c d", 0]] for number in (11, 12, 13, 14)},
    }
    assert [group["name"] for group in shown["groups"]] == ["even", "odd"]


@pytest.mark.parametrize("form", ["jsonl", "folder"])
def test_a_scored_file_of_another_form_shows_the_same(scored, tokenizer_dir, tmp_path, form):
    data, other = Dataset.from_parquet(str(scored)), tmp_path / "other"
    data.to_json(other) if form == "jsonl" else data.save_to_disk(other)
    first, second = (
        report_data([open_run(path, tokenizer_dir, "source")], ["a"], "source")["runs"] for path in (scored, other)
    )
    assert first == second


def test_a_file_that_does_not_say_what_was_pruned_is_shown_without(scored, tokenizer_dir, tmp_path):
    Dataset.from_parquet(str(scored)).remove_columns(["pruned", "answer_tokens"]).to_parquet(tmp_path / "older.parquet")
    [shown] = report_data([open_run(tmp_path / "older.parquet", tokenizer_dir)], ["a"])["runs"]
    assert shown["state"] == "a scored data set, which does not say what was pruned"
    assert (shown["facts"]["kept"], shown["facts"]["answer_tokens"]["ratio_reached"]) == (3, None)


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (
            b"some text",
            [],
            "is neither Parquet nor JSON lines: give a run's `output_dir`, or what `qtuning score` wrote.",
        ),
        (b"", [], "is neither Parquet nor JSON lines"),
        (b"PAR1 but then nothing", [], "cannot be read ("),
        (b'{"text": "a"}\n', [], "lacks `perplexity`, `entropy`, `quadrant`, `keep`, `input_ids`, `labels`: give"),
        (None, [], "`--tokenizer` is not given and "),
        (None, ["--tokenizer", "/no/such/model"], "`--tokenizer` is '/no/such/model', which cannot be loaded ("),
        (None, ["--tokenizer", "TOKENIZER", "--color_by", "kind"], "`--color_by` is 'kind': choose 'quadrant', or a"),
    ],
)
def test_files_that_cannot_be_shown_are_refused(scored, tokenizer_dir, capsys, content, options, sentence):
    if content is not None:
        scored.write_bytes(content)
    options = [tokenizer_dir if option == "TOKENIZER" else option for option in options]
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(scored), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_scored_file_has_no_steps_on_its_page(browser, scored, tokenizer_dir, tmp_path, width):  # noqa: F811
    page, *_ = write_report([scored], tmp_path / "a.html", tokenizer=tokenizer_dir)
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert drawn_points(browser) == 5
    headings = [heading.text for heading in browser.find_elements("css selector", "h2") if heading.is_displayed()]
    assert headings == ["Budget reached", "Quadrants and fill", "Error-Uncertainty plane", "Samples"]
    assert not browser.find_element("id", "slider").is_displayed()
    assert [element.text.strip() for element in browser.find_elements("css selector", "#extremes del")] == ["b", "d"]
    assert {head.split(":")[1] for head in shown_heads(browser)[:3]} == {" kept"}
