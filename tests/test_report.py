"""`qtuning report`: its figures equal the record and the summary, and a real browser opens the page and uses it."""

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import make_trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtuning_trl import load_record
from qtuning_trl.cli import main
from qtuning_trl.records.run import QUADRANTS, SUMMARY_NAME, THRESHOLDS
from qtuning_trl.records.samples import LOGS_NAME, RECORD_NAME, SAMPLES, STEPS, TEXTS, Part, RecordReader, write_part
from qtuning_trl.report.plane import Decoder
from qtuning_trl.report.report import report_data, run_data, write_report

NASTY = "<b>bold</b> </script><script>attacked = 1</script><img src=x onerror='attacked = 2'> & caf\u00e9 \u2603"


def page_data(html: str | Path) -> dict:
    """The data that a page carries."""
    text = Path(html).read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_dir) -> Path:
    """A run of six steps that was recorded."""
    path = tmp_path_factory.mktemp("report") / "run"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    dataset = Dataset.from_list(prompt_completion_rows(40))
    trainer = make_trainer(path, tokenizer, dataset, budget="50x50", group_column="source")
    trainer.train()
    return path


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tokenizer_dir) -> Path:
    """A run that keeps everything."""
    path = tmp_path_factory.mktemp("report") / "full"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    make_trainer(path, tokenizer, Dataset.from_list(prompt_completion_rows(40)), budget="100x100").train()
    return path


def synthetic_run(
    path: Path, samples: int, steps: int, text: Callable[[int], str], group: str = "a", nats: np.ndarray | None = None
) -> Path:
    """
    A record as a trainer writes it, of any size: each sample is scored once a step; the last half of it is kept.

    `nats` are the losses and the entropies of all rows.
    """
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    folder = path / RECORD_NAME
    folder.mkdir(parents=True)
    fast.save_pretrained(folder / "tokenizer")
    config = {"group_column": "kind", "sample_ratio": 0.5, "token_ratio": 0.5}
    facts = {"format": 1, "model": "m", "max_steps": 2 * steps, "resumed_from": 0, "num_processes": 1}
    (folder / "run.json").write_text(json.dumps({**facts, "config": config, "versions": {}}))

    rows = samples * steps
    random = np.random.default_rng(0)
    loss, entropy = nats if nats is not None else random.lognormal(-1, 1, (2, rows))
    kept = np.arange(rows) % samples >= samples // 2
    ids = [fast(text(index))["input_ids"] for index in range(samples)]
    lengths = np.array([len(tokens) - 1 for tokens in ids] * steps)
    columns = {
        "step": np.repeat(np.arange(1, steps + 1), samples),
        "sample_id": np.tile(np.arange(samples), steps),
        "process": np.zeros(rows, dtype=int),
        "perplexity": np.exp(loss),
        "entropy": entropy,
        "quadrant": random.integers(0, 5, rows),
        "kept": kept,
        "reason": ["quadrant"] * rows,
        "answer_tokens": lengths,
        "kept_tokens": np.where(kept, lengths, 0),
        "seconds": np.ones(rows),
        "group": [group] * rows,
        "kept_mask": [None] * rows,
        **{name: np.full(rows, 1.2) for name in THRESHOLDS},
    }
    counts = {name: [samples] * steps for name in STEPS.names}
    counts["step"] = list(range(1, steps + 1))
    tables = {
        "samples": pa.table([pa.array(columns[field.name], field.type) for field in SAMPLES], schema=SAMPLES),
        "steps": pa.table([pa.array(counts[field.name], field.type) for field in STEPS], schema=STEPS),
        "texts": pa.table(
            [
                pa.array(range(samples), pa.int64()),
                pa.array(ids, pa.list_(pa.int32())),
                pa.array([[False] + [True] * (len(tokens) - 1) for tokens in ids], pa.list_(pa.bool_())),
            ],
            schema=TEXTS,
        ),
    }
    write_part(folder, Part(0, 1, steps), tables)
    return path


# Figures


def test_figures_equal_the_summary(run, tmp_path):
    [page] = write_report([run], tmp_path / "a.html")
    [shown] = page_data(page)["runs"]
    summary = json.loads((run / SUMMARY_NAME).read_text())
    facts = shown["facts"]
    same = ("steps", "candidates", "kept", "sample_ratio_reached", "answer_tokens", "quadrants", "filled", "trimmed")
    for name in (*same, "num_processes"):
        assert facts[name] == summary[name], name
    assert facts["sample_ratio"] == summary["config"]["sample_ratio"] == 0.5
    for phase, seconds in facts["seconds"].items():
        assert seconds == pytest.approx(summary["seconds"][phase])
    groups = {group["name"]: {"candidates": group["candidates"], "kept": group["kept"]} for group in shown["groups"]}
    assert groups == summary["groups"]
    assert shown["state"] == "finished, 6 steps"


def test_points_windows_and_lines_equal_the_record(run, tmp_path):
    [page] = write_report([run], tmp_path / "a.html")
    [shown] = page_data(page)["runs"]
    frame = load_record(run, as_frame=True)
    points = shown["points"]
    assert shown["points_of"] == len(points["step"]) == len(frame) == 80
    assert points["perplexity"] == pytest.approx(frame.perplexity.tolist(), rel=1e-4)
    assert points["entropy"] == pytest.approx(frame.entropy.tolist(), rel=1e-4)
    assert points["quadrant"] == frame.quadrant.tolist()
    assert [shown["samples"][place][0] for place in points["sample"]] == frame.sample_id.tolist()
    assert [outcome > 0 for outcome in points["outcome"]] == frame.kept.tolist()
    assert [outcome == 2 for outcome in points["outcome"]] == (frame.reason == "fill").tolist()
    for window in shown["windows"]:
        rows = frame[frame.step.between(window["first"], window["last"])]
        assert set(points["step"][window["begin"] : window["end"]]) == set(rows.step)
        for name in THRESHOLDS:
            assert window["thresholds"][name] == pytest.approx(rows[name].mean(), rel=1e-4)
    over = shown["over_training"]
    for place, step in enumerate(over["step"]):
        rows = frame[frame.step == step]
        assert over["q2"][place] == pytest.approx((rows.quadrant == 2).mean(), abs=1e-4)
        assert over["fill"][place] == pytest.approx((rows.reason == "fill").sum() / rows.kept.sum(), abs=1e-4)
    times = frame.groupby("sample_id").kept.sum().value_counts()
    assert dict(zip(shown["times_kept"]["first"], shown["times_kept"]["samples"], strict=True)) == {
        time: times.get(time, 0) for time in range(times.index.max() + 1)
    }


def test_samples_at_both_ends_carry_their_answers_and_what_was_pruned(run, tmp_path):
    [page] = write_report([run], tmp_path / "a.html")
    [shown] = page_data(page)["runs"]
    frame = load_record(run, as_frame=True)
    rows = prompt_completion_rows(40)
    times = frame.groupby("sample_id").kept.sum()
    assert [card["kept"] for card in shown["cards"]] == times.sort_values(ascending=False).tolist()
    assert shown["cards_of"] == len(times) == len(shown["cards"])
    struck = 0
    for card in shown["cards"]:
        history = frame[frame.sample_id == card["id"]]
        assert (card["scored"], card["kept"]) == (len(history), history.kept.sum())
        assert card["group"] == rows[card["id"]]["source"]
        answer = "".join(piece for piece, _ in card["answer"])
        assert answer.replace(" ", "") == rows[card["id"]]["completion"].replace(" ", "") + "</s>"
        masked = history[history.kept_mask.notna()]
        if len(masked):
            mask = masked.iloc[-1].kept_mask
            assert card["tokens"] == [mask.sum(), len(mask)]
            pruned = "".join(piece for piece, kind in card["answer"] if kind == 1).replace(" ", "")
            characters = [*rows[card["id"]]["completion"], "</s>"]
            assert pruned == "".join(c for c, keep in zip(characters, mask, strict=True) if not keep)
            struck += 1
        latest = history.iloc[-1]
        assert card["pruned"] == (latest.kept and latest.kept_tokens < latest.answer_tokens)
    assert struck > 0


def test_of_many_samples_random_ones_and_those_at_both_ends_can_be_searched(tmp_path):
    run = synthetic_run(tmp_path / "run", samples=300, steps=3, text=lambda index: f"{index} ab")
    shown = run_data(RecordReader(run), "run", max_cards=50)
    assert (len(shown["cards"]), shown["cards_of"]) == (50, 300)
    assert [card["kept"] for card in shown["cards"][:12] + shown["cards"][-12:]] == [3] * 12 + [0] * 12


def test_the_loss_and_what_the_run_was_set_up_with_are_shown(tmp_path, tokenizer):
    rows = Dataset.from_list(prompt_completion_rows(40))
    options = {"budget": "50x50", "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 2e-3, "logging_steps": 2}
    trainer = make_trainer(tmp_path, tokenizer, rows, **options)
    trainer.dataset_name = "/home/me/rows.jsonl"
    trainer.train()
    reader = RecordReader(tmp_path)
    shown = run_data(reader, "run")
    logged = {key: {e["step"]: e[key] for e in trainer.state.log_history if key in e} for key in ("loss", "eval_loss")}
    for name, key in (("training", "loss"), ("evaluation", "eval_loss")):
        assert shown["loss"][name]["step"] == list(logged[key]) == {"loss": [2, 4, 6], "eval_loss": [3, 6]}[key]
        assert shown["loss"][name]["loss"] == pytest.approx(list(logged[key].values()), rel=1e-4)
    steps = reader.steps().to_pandas()
    assert shown["loss"]["candidates"]["loss"] == pytest.approx(steps.pool_nll.tolist(), rel=1e-4)
    assert shown["settings"][1:] == ["data set rows.jsonl, 40 rows", "learning rate 0.002 (linear)"]


def test_the_log_of_a_resumed_run_has_no_line_twice_and_none_that_a_kill_cut_off(tmp_path, tokenizer):
    rows = Dataset.from_list(prompt_completion_rows(40))
    options = {"budget": "50x50", "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    make_trainer(tmp_path, tokenizer, rows, **options, max_steps=3).train()
    with open(tmp_path / RECORD_NAME / LOGS_NAME, "a") as file:
        file.write('{"step": 3, "lo')
    assert [entry["step"] for entry in RecordReader(tmp_path).logs() if "loss" in entry] == [1, 2, 3]
    make_trainer(tmp_path, tokenizer, rows, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in RecordReader(tmp_path).logs() if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_the_fill_is_counted_by_quadrant(run):
    shown, frame = run_data(RecordReader(run), "run"), load_record(run, as_frame=True)
    summary = json.loads((run / SUMMARY_NAME).read_text())
    for number, name in QUADRANTS.items():
        rows = frame[frame.quadrant == number]
        counts = {"candidates": len(rows), "kept": rows.kept.sum(), "kept_tokens": rows.kept_tokens.sum()}
        assert shown["quadrants"][name] == {**counts, "filled": summary["filled_by_quadrant"][name]}
    assert sum(counts["filled"] for counts in shown["quadrants"].values()) > 0


def test_a_character_of_several_tokens_goes_with_the_last_of_them(tmp_path):
    reader = RecordReader(synthetic_run(tmp_path / "run", samples=1, steps=1, text=lambda index: "a\u2603bc"))
    [(ids, answer)] = reader.texts([0]).values()
    assert len(ids) == 6, "the snowman takes three"
    mask = [False, True, True, False, True]
    assert Decoder(reader).pieces((ids, answer), mask) == ("a", [["\u2603", 0], ["b", 1], ["c", 0]])


def test_beyond_the_cap_the_same_samples_are_drawn_at_every_step(tmp_path):
    run = synthetic_run(tmp_path / "run", samples=300, steps=10, text=lambda index: f"{index} ab")
    data = report_data([RecordReader(run)] * 2, ["a", "b"])
    shown = run_data(RecordReader(run), "run", max_points=500)
    assert shown["points_of"] == 3000
    assert len(shown["points"]["step"]) == 500
    by_step = {
        step: {p for p, s in zip(shown["points"]["sample"], shown["points"]["step"], strict=True) if s == step}
        for step in range(1, 11)
    }
    assert len(set(map(frozenset, by_step.values()))) == 1
    assert all(len(places) == 50 for places in by_step.values())
    assert [window["of"] for window in shown["windows"]] == [300] * 10
    assert len(data["runs"][0]["points"]["step"]) == 3000


def test_a_run_that_is_still_going_and_one_that_keeps_everything(run, full_run, tmp_path):
    going = tmp_path / "going"
    shutil.copytree(run, going)
    (going / SUMMARY_NAME).unlink()
    facts = json.loads((going / RECORD_NAME / "run.json").read_text())
    (going / RECORD_NAME / "run.json").write_text(json.dumps({**facts, "max_steps": 1000}))
    page, *_ = write_report([going, full_run], tmp_path / "b.html")
    first, second = page_data(page)["runs"]
    assert first["state"] == "recorded up to step 6 of 1,000"
    assert first["facts"]["kept"] == 40
    assert (second["points"], second["windows"], second["cards"]) == (None, [], [])
    assert second["facts"]["kept"] == second["facts"]["candidates"] == 80


def test_a_run_that_has_just_begun(run, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    for part in (begun / RECORD_NAME).glob("part-*"):
        shutil.rmtree(part)
    page, *_ = write_report([begun], png=True)
    assert page == begun / "_qtuning_report.html"
    [shown] = page_data(page)["runs"]
    assert (shown["state"], shown["facts"]["candidates"]) == ("recorded up to step 0 of 6", 0)


# Command


def test_the_command_writes_the_page_and_the_pictures(run, full_run, tmp_path, capsys):
    assert main(["report", str(run), str(full_run), "--output", str(tmp_path / "x" / "r.html"), "--png",
                 "--color_by", "source"]) == 0  # fmt: skip
    files = capsys.readouterr().out.split()
    assert [Path(file).name for file in files] == ["r.html", "r_1_eu_plane.png", "r_1_quadrants.png", "r_seconds.png"]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files[1:])
    assert page_data(files[0])["color_by"] == "group"


def test_bad_input_is_one_sentence(run, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], "is not there: give the `output_dir` of a run, or what `qtuning score` wrote"),
        ([str(tmp_path)], "holds no record"),
        ([str(run), "--color_by", "kind"], "`--color_by` is 'kind': choose 'quadrant' or 'source'"),
    ):
        with pytest.raises(SystemExit) as exit_status:
            main(["report", *arguments])
        assert exit_status.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# In a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="no Chromium with its chromedriver is installed (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture
def browser(tmp_path, request) -> Iterator:
    """Headless Chromium with a profile of its own."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
        *getattr(request, "param", ["--enable-unsafe-swiftshader"]),  # WebGL without a GPU
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_page_load_timeout(180)  # a busy machine takes a while
    yield driver
    driver.quit()


def open_page(browser, page: Path) -> float:
    """Open a page; seconds until it is ready. It must not have fetched anything, nor met an error."""
    start = time.perf_counter()
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes", browser.get_log("browser")
    seconds = time.perf_counter() - start
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    return seconds


def drawn_points(browser, plane: int = 0) -> int:
    script = "return document.querySelectorAll('.plane')[arguments[0]].data.reduce((n, t) => n + t.x.length, 0)"
    return browser.execute_script(script, plane)


@needs_browser
def test_the_page_shows_what_its_data_says(browser, run, full_run, tmp_path):
    from selenium.webdriver.common.by import By

    page, *_ = write_report([run, full_run], tmp_path / "a.html")
    first, _ = page_data(page)["runs"]
    open_page(browser, page)
    change = "const [id, value, event] = arguments, x = byId(id); x.value = value; x.dispatchEvent(new Event(event))"
    text = browser.find_element(By.ID, "budget").text
    assert "finished, 6 steps" in text
    assert f"{first['facts']['kept']}\nsamples kept of {first['facts']['candidates']} candidates" in text
    assert "50%\nof the samples kept (asked: 50%)" in text
    cards = browser.find_elements(By.CSS_SELECTOR, "#budget .card")
    assert [card.location["y"] for card in cards] == [cards[0].location["y"]] * 2  # side by side

    assert len(browser.find_elements(By.CSS_SELECTOR, ".plane")) == 1  # the other run scored nothing
    last = first["windows"][-1]
    assert drawn_points(browser) == last["end"] - last["begin"]
    browser.execute_script(change, "slider", 0, "input")
    assert drawn_points(browser) == first["windows"][0]["end"]
    assert browser.find_element(By.ID, "moment").text == "step 1"
    browser.find_element(By.ID, "all").click()
    assert drawn_points(browser) == 80
    lines = browser.execute_script("return document.querySelector('.plane').layout.shapes.length")
    assert lines == 4

    browser.execute_script(change, "colour", "group", "change")
    legend = browser.find_elements(By.CSS_SELECTOR, "#legend button")
    assert sorted(button.text for button in legend) == ["even", "odd"]
    legend[0].click()
    assert drawn_points(browser) == 40
    legend[0].click()

    # At once, since it moves on in less than a second.
    played = "byId('play').click(); const at = byId('moment').textContent; byId('play').click(); return at"
    assert browser.execute_script(played) == "step 1"

    struck = browser.find_elements(By.CSS_SELECTOR, "#extremes del")
    pruned = [piece for card in first["cards"][:12] for piece, kind in card["answer"] if kind == 1]
    assert [element.get_attribute("textContent") for element in struck] == pruned
    browser.find_element(By.CSS_SELECTOR, "#which button[value=least_kept]").click()
    least = sorted(first["cards"], key=lambda card: (card["kept"], -card["scored"]))
    assert shown_heads(browser)[0].startswith(f"Sample {least[0]['id']}: kept 0 of ")


def shown_heads(browser) -> list[str]:
    return [head.text for head in browser.find_elements("css selector", "#extremes .head b")]


@needs_browser
def test_samples_are_searched_and_filtered(browser, run, tmp_path):
    page, *_ = write_report([run], tmp_path / "a.html")
    [shown] = page_data(page)["runs"]
    open_page(browser, page)

    def found(**chosen: str) -> list[int]:
        """Ids shown after these were chosen, all of them."""
        script = """
            const chosen = arguments[0];
            for (const id of ["search", "by-quadrant", "by-outcome", "by-group"]) byId(id).value = chosen[id] ?? "";
            byId("by-group").dispatchEvent(new Event("change"));
            for (let more; more = document.querySelector("#extremes .more");) more.click();
        """
        browser.execute_script(script, {name.replace("_", "-"): value for name, value in chosen.items()})
        return [int(re.match(r"Sample (\d+)", head).group(1)) for head in shown_heads(browser)]

    cards = shown["cards"]
    assert found() == [card["id"] for card in cards]
    for quadrant in "0124":
        assert found(by_quadrant=quadrant) == [c["id"] for c in cards if c["history"][-1][1] == int(quadrant)]
    outcomes = {
        "dropped": [c["id"] for c in cards if c["history"][-1][2] == 0],
        "kept": [c["id"] for c in cards if c["history"][-1][2] > 0],
        "fill": [c["id"] for c in cards if c["history"][-1][2] == 2],
        "pruned": [c["id"] for c in cards if c["pruned"]],
        "whole": [c["id"] for c in cards if c["history"][-1][2] > 0 and not c["pruned"]],
    }
    assert all(outcomes.values())
    for name, ids in outcomes.items():
        assert found(by_outcome=name) == ids, name
    assert found(by_group="odd") == [c["id"] for c in cards if c["group"] == "odd"]
    text = cards[20]["prompt"].upper()
    assert cards[20]["id"] in found(search=text)
    assert len(found(search=text)) < 5
    assert found(search="no such text") == []
    assert found(search=text, by_group={"odd": "even", "even": "odd"}[cards[20]["group"]]) == []


@needs_browser
def test_what_was_kept_is_drawn_over_what_was_dropped(browser, run, tmp_path):
    page, *_ = write_report([run], tmp_path / "a.html")
    open_page(browser, page)
    browser.find_element("id", "all").click()
    symbols = browser.execute_script("return document.querySelector('.plane').data.map(trace => trace.marker.symbol)")
    assert set(symbols) == {"circle-open", "diamond", "circle"}
    assert symbols == sorted(symbols, key=["circle-open", "diamond", "circle"].index)


@needs_browser
@pytest.mark.parametrize(
    "ranges",
    [[(1.0, 0.5)], [(0.001, 0.001)], [(1e-4, 3.0), (1e-4, 3.0)], [(2.0, 0.01), (0.02, 0.01)], [(3.0, 0.0)]],
    ids=["usual", "narrow", "wide", "two runs far apart", "all alike"],
)
def test_axes_have_ticks_that_can_be_read(browser, tmp_path, ranges):
    """Of nats: the middle of each run's samples, and how far they spread, as the logarithm to base e."""
    runs = []
    for place, (middle, spread) in enumerate(ranges):
        noise = np.random.default_rng(place).normal(0, spread, (2, 100))
        runs.append(
            synthetic_run(tmp_path / f"run{place}", 50, 2, lambda index: f"{index}", nats=middle * np.exp(noise))
        )
    page, *_ = write_report(runs, tmp_path / "a.html")
    open_page(browser, page)
    script = """
        return [...document.querySelectorAll('.plane')].map(div => ['x', 'y'].map(axis => {
            const box = label => label.getBoundingClientRect(), data = div.data.flatMap(trace => trace[axis]);
            const labels = [...div.querySelectorAll(`.${axis}tick text`)];
            const [low, high] = div._fullLayout[axis + 'axis'].range;
            const spans = labels.map(l => axis == 'x' ? [box(l).left, box(l).right] : [box(l).top, box(l).bottom]);
            spans.sort((a, b) => a[0] - b[0]);
            return {
                texts: labels.map(label => label.textContent),
                apart: spans.slice(1).every((span, i) => span[0] > spans[i][1]),
                inside: data.every(place => low < place && place < high),
                filled: (Math.max(...data) - Math.min(...data)) / (high - low),
            };
        }))
    """
    planes = browser.execute_script(script)
    assert len(planes) == len(ranges)
    for axes in planes:
        for axis in axes:
            assert 4 <= len(axis["texts"]) == len(set(axis["texts"])) <= 8, axis
            assert max(map(len, axis["texts"])) <= 8, axis
            assert axis["apart"], axis
            assert axis["inside"], axis
            assert axis["filled"] > 0.25 or ranges[0][1] < 0.1, axis  # what is nearly alike does not fill its plane
    pressed = browser.execute_script("return byId('same').hidden ? null : byId('same').getAttribute('aria-pressed')")
    assert pressed == {1: None, 2: "false" if ranges[0][0] == 2.0 else "true"}[len(ranges)]


@needs_browser
def test_pointing_at_a_point_shows_its_text(browser, run, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    page, *_ = write_report([run], tmp_path / "a.html")
    open_page(browser, page)
    place = """
        const div = document.querySelector('.plane'), trace = div.data[0], {xaxis, yaxis} = div._fullLayout;
        div.scrollIntoView({block: 'center'});
        const box = div.getBoundingClientRect();
        return [box.x + xaxis._offset + xaxis.d2p(trace.x[0]), box.y + yaxis._offset + yaxis.d2p(trace.y[0])];
    """
    # A busy browser may still be drawing or scrolling when the pointer arrives, and plotly answers to movements alone:
    # so point again.
    tip, deadline = "", time.monotonic() + 60
    while not (said := re.match(r"Sample (\d+) at step 6", tip)) and time.monotonic() < deadline:
        x, y = browser.execute_script(place)
        for aside in (20, 0):
            actions = ActionChains(browser)
            actions.w3c_actions.pointer_action.move_to_location(round(x) + aside, round(y))
            actions.perform()
        time.sleep(0.2)
        tip = browser.find_element(By.ID, "tip").text
    assert said, tip
    row = prompt_completion_rows(40)[int(said.group(1))]
    squeezed = re.sub(r"\s", "", tip)
    assert row["prompt"].replace(" ", "") in squeezed
    assert row["completion"].replace(" ", "") in squeezed


@needs_browser
def test_markup_in_a_dataset_shows_as_text(browser, tmp_path):
    from selenium.webdriver.common.by import By

    run = synthetic_run(tmp_path / "run", 20, 2, text=lambda index: f"x{NASTY}", group=NASTY)
    page, *_ = write_report([run], tmp_path / "a.html", color_by="kind")
    open_page(browser, page)
    assert browser.execute_script("return window.attacked") is None
    answer = browser.find_element(By.CSS_SELECTOR, "#extremes .text").get_attribute("textContent")
    assert answer == "x" + NASTY
    assert browser.find_element(By.CSS_SELECTOR, "#legend button").text == NASTY
    assert browser.find_element(By.CSS_SELECTOR, "#groups td").get_attribute("textContent") == NASTY
    browser.execute_script("showTip(planes[0], 0, {clientX: 10, clientY: 10})")
    assert NASTY in browser.find_element(By.ID, "tip").get_attribute("textContent")
    assert browser.find_elements(By.CSS_SELECTOR, "main b b, main img, #tip img, main script") == []
    assert browser.execute_script("return window.attacked") is None


@needs_browser
def test_fifty_thousand_samples_open_without_stalling(browser, tmp_path):
    run = synthetic_run(tmp_path / "run", 50_000, 2, text=lambda index: f"{index} " + "word " * 12)
    page, *_ = write_report([run], tmp_path / "a.html")
    assert page.stat().st_size < 40e6
    assert open_page(browser, page) < 20
    start = time.perf_counter()
    browser.execute_script("document.getElementById('all').click()")
    assert drawn_points(browser) == 50_000
    assert time.perf_counter() - start < 10
    note = browser.execute_script("return document.querySelector('#planes .soft').textContent")
    assert note == "all steps: 50,000 points of 100,000: the same samples, drawn at random, at every step"


@needs_browser
@pytest.mark.parametrize("browser", [["--disable-3d-apis"]], indirect=True)
def test_without_webgl_the_planes_are_drawn_all_the_same(browser, run, tmp_path):
    page, *_ = write_report([run], tmp_path / "a.html")
    open_page(browser, page)
    assert browser.execute_script("return [webgl, document.querySelector('.plane').data[0].type]") == [False, "scatter"]
    drawn = len(browser.find_elements("css selector", ".plane .point"))
    assert drawn == drawn_points(browser) == 8


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_light_and_dark_on_a_desk_and_on_a_phone(browser, run, full_run, tmp_path, width, scheme):
    page, *_ = write_report([run, full_run, run], tmp_path / "a.html")
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    open_page(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    narrow = browser.execute_script(
        "return [...document.querySelectorAll('.plane, .chart')].filter(x => x.clientWidth < arguments[0]).length",
        300 if width < 600 else 400,
    )
    assert narrow == 0
    misfits = """
        return [...document.querySelectorAll('.plane, .chart, #seconds')].filter(
            chart => Math.abs(chart.querySelector('.main-svg').clientWidth - chart.clientWidth) > 1).length
    """
    assert browser.execute_script(misfits) == 0

    def brightness(script: str) -> float:
        return sum(map(int, re.findall(r"\d+", browser.execute_script("return " + script))[:3])) / 3

    page_colour = brightness("getComputedStyle(document.body).backgroundColor")
    ink = brightness("getComputedStyle(document.querySelector('.plane .xtick text')).fill")
    assert (page_colour < 60 < 180 < ink) if scheme == "dark" else (ink < 60 < 180 < page_colour)
    picture = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    (tmp_path / f"{scheme}_{width}.png").write_bytes(picture)
    assert len(picture) > 20_000
