"""`qtuning compare`: the grid, its statistics on runs with a known answer, and stopping, resuming and failing runs."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import prompt_completion_rows
from test_cli import refusal

from qtuning_trl import cli
from qtuning_trl.scripts import compare
from qtuning_trl.studies.compare import (
    FAILURE_NAME,
    FULL_DATA,
    RECIPE_NAME,
    RESULT_NAME,
    ZERO_SHOT,
    Comparison,
    Estimate,
    Run,
    load_comparison,
    markdown,
    paired_p_value,
    pruner_options,
    rows_from_json,
    summarize,
    table_cells,
    to_json,
)


@pytest.fixture
def config(tmp_path, model_dir):
    """Writes a comparison that runs, with changes; returns its path."""
    for name, rows in (("train", 24), ("test", 8)):
        lines = (json.dumps(row) for row in prompt_completion_rows(rows, seed=len(name)))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = {
        "model_name_or_path": model_dir,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "test_split_size": 0.25,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**changes) -> str:
        keys = {
            "recipe": "recipe.yaml",
            "pruners": [{"name": "mask", "token_pruning": "mask"}],
            "budgets": ["25x50"],
            "seeds": [0],
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(keys))
        return str(tmp_path / "compare.yaml")

    return write


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "qtuning_trl", "compare", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_comparison_goes_on_where_it_stopped_and_says_what_failed(tmp_path, config):
    path = config(
        pruners=[{"name": "mask", "token_pruning": "mask"}, {"name": "broken", "learning_rate": "1e30", "max_steps": 3}]
    )
    done = run("--config", path)
    assert done.returncode == 1, done.stderr[-2000:]
    folders = {folder.name: folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()}
    assert set(folders) == {
        "zero-shot-100x100-seed-0", "full-data-100x100-seed-0", "mask-25x50-seed-0", "broken-25x50-seed-0",
    }  # fmt: skip
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "| mask | 25x50 | 1 |" in table
    results = {
        name: json.loads((folder / RESULT_NAME).read_text()) for name, folder in folders.items() if "broken" not in name
    }
    assert results["mask-25x50-seed-0"]["kept_samples"] == 0.25
    assert results["full-data-100x100-seed-0"]["kept_samples"] == 1.0
    assert results["zero-shot-100x100-seed-0"]["steps"] == 0
    assert all(math.isfinite(result["eval_loss"]) for result in results.values())

    # What is finished is not repeated, and its recipe not written anew; what left half a result is.
    (folders["mask-25x50-seed-0"] / RESULT_NAME).write_text('{"eval_loss": 1.')
    recipe = (folders["full-data-100x100-seed-0"] / RECIPE_NAME).stat().st_mtime_ns
    before = {name: (folder / RESULT_NAME).stat().st_mtime_ns for name, folder in folders.items() if "100x100" in name}
    again = run("--config", path)
    assert [line for line in again.stdout.splitlines() if line.startswith("[")] == ["[3/4] mask 25x50 seed 0"]
    assert before == {name: (folders[name] / RESULT_NAME).stat().st_mtime_ns for name in before}
    assert (folders["full-data-100x100-seed-0"] / RECIPE_NAME).stat().st_mtime_ns == recipe
    repeated = json.loads((folders["mask-25x50-seed-0"] / RESULT_NAME).read_text())
    assert repeated["eval_loss"] == results["mask-25x50-seed-0"]["eval_loss"]


def test_results_of_another_recipe_or_measure_are_not_mixed_with_new_ones(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_run", lambda *_: None)
    assert cli.main(["compare", "--config", config()]) == 1  # recipes are written, and nothing is run
    run_dir = tmp_path / "out" / "mask-25x50-seed-0"
    assert "base" not in yaml.safe_load((run_dir / RECIPE_NAME).read_text())
    (run_dir / FAILURE_NAME).write_text("it failed\n")
    (run_dir / RESULT_NAME).write_text(json.dumps({"eval_loss": 1.0}))
    assert "of another `accuracy`" in refusal(capsys, cli.main, ["compare", "--config", config(accuracy="json:loads")])
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "learning_rate": 0.5}))
    assert "of another recipe" in refusal(capsys, cli.main, ["compare", "--config", config()])
    assert (run_dir / FAILURE_NAME).is_file()
    (run_dir / RESULT_NAME).unlink()
    cli.main(["compare", "--config", config()])
    assert not (run_dir / FAILURE_NAME).is_file(), "it was another recipe that failed"
    assert yaml.safe_load((run_dir / RECIPE_NAME).read_text())["learning_rate"] == 0.5


def test_results_of_full_data_are_not_mixed_with_those_of_one_more_option(tmp_path, config, monkeypatch, capsys):
    """In a recipe that has all other keys it is the last, so that what was written is a beginning of what would be."""
    monkeypatch.setattr(compare, "_run", lambda *_: None)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe |= {"budget": "25x50", "seed": 0, "output_dir": "out", "save_strategy": "no", "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["compare", "--config", config()])
    written = {path: path.read_text() for path in (tmp_path / "out").glob(f"*/{RECIPE_NAME}")}
    (tmp_path / "out" / "full-data-100x100-seed-0" / RESULT_NAME).write_text(json.dumps({"eval_loss": 1.0}))
    line = refusal(capsys, cli.main, ["compare", "--config", config(options={"weight_decay": 0.5})])
    assert "full-data-100x100-seed-0 has a result of other options" in line
    assert {path: path.read_text() for path in written} == written


def test_a_run_that_was_ended_by_a_signal_is_told_by_the_exit_status(tmp_path, config, monkeypatch, capfd):
    (tmp_path / "killing.py").write_text("import os\n\ndef accuracy(trainer):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compare, "_process_context", lambda: multiprocessing.get_context("fork"))  # imports nothing
    assert cli.main(["compare", "--config", config(accuracy="killing:accuracy")]) == 1
    shown = capfd.readouterr().out
    assert shown.count("ended by signal 9") == 3
    assert "3 of 3 runs were ended by a signal: start again to repeat them." in shown


HELD = """
import os, time

def accuracy(trainer):
    if trainer.state.global_step and "HOLD" in os.environ:  # not zero-shot, which does not train
        open(os.environ["HOLD"], "w").close()
        time.sleep(600)
    return 0.5
"""


def test_a_signal_ends_the_run_that_is_under_way_and_another_start_finishes_the_grid(tmp_path, config):
    (tmp_path / "held.py").write_text(HELD)
    held, folder = tmp_path / "held", tmp_path / "out" / "full-data-100x100-seed-0"
    command = [sys.executable, "-m", "qtuning_trl", "compare", "--config", config(accuracy="held:accuracy")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}

    def processes() -> list[int]:
        """All that the command has started, at whatever remove."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARK") == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    for signum, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        held.unlink(missing_ok=True)
        process = subprocess.Popen(
            command,
            env={**environment, "HOLD": str(held)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda process=process: held.exists() or process.poll() is not None)
        assert len(processes()) > 2, "the comparison, and the run that is under way"
        process.send_signal(signum)  # to the comparison alone
        _, errors = process.communicate(timeout=120)
        wait_until(lambda: not processes(), 30)
        assert processes() == []
        assert process.returncode == status
        if signum == signal.SIGTERM:
            assert errors == "\nqtuning: ended by signal 15.\n"
        assert (folder / "log.txt").read_text().endswith("\nqtuning: ended by signal 15.\n")
        assert not list(folder.glob("*.json"))
        assert not list(folder.glob("fail*"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    started = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert started == ["[2/3] full data 100x100 seed 0", "[3/3] mask 25x50 seed 0"]
    assert len(list(tmp_path.glob(f"out/*/{RESULT_NAME}"))) == 3


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_the_plan_is_shown_without_running(tmp_path, config, capsys):
    rows = [{"name": "mask", "token_pruning": "mask"}, "random + random"]
    assert cli.main(["compare", "--config", config(pruners=rows, seeds=[0, 1]), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "8 runs, 0 finished" in shown
    # 2 x (nothing + 1 + a third for scoring and a quarter + a quarter, since random scores nothing)
    assert "To do: as much as 3.7 runs on the full data." in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipe": "nowhere.yaml"}, "`recipe` in .* is 'nowhere.yaml': no such file"),
        ({"seeds": [1, 1]}, r"`seeds` in .* is \[1, 1\]: give each seed once"),
        ({"seeds": None}, "`seeds` is missing in"),
        ({"seeds": 3}, r"`seeds` in .* is 3: give a list, such as \[3\]"),
        ({"seeds": ["one"]}, "`seeds` in .* has 'one': give whole numbers"),
        ({"sedes": [1]}, "`sedes` in .* is no key of a comparison: use recipe, pruners"),
        ({"budgets": None}, "`budgets` or `tokens` in .*: give one of them"),
        ({"tokens": [12.5]}, "`budgets` or `tokens` in .*: give one of them"),
        ({"budgets": None, "tokens": [125]}, "`tokens` in .* has 125: give shares of the answer tokens, in per cent"),
        ({"budgets": None, "tokens": [60]}, "`tokens` is 60 and 'mask' has a `token_ratio` of 0.5: 1.2 of the samples"),
        ({"pruners": [3]}, "`pruners` has the entry 3: give a name"),
        ({"pruners": ["random", "random"]}, "`pruners` in .* has two rows for 'random-25x50-seed-0'"),
    ],
)
def test_bad_comparisons_are_refused(config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_comparison(config(**changes))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budgets": ["25x50", "250x50"]}, "`budget` is '250x50': give at most 100 per cent of the samples"),
        ({"pruners": ["random + fastvv"]}, "`token_pruner` is 'fastvv': did you mean 'fastv'?"),
        ({"accuracy": "json:nothing"}, "`accuracy` is 'json:nothing', which cannot be loaded (module 'json' has no"),
    ],
)
def test_bad_options_of_a_run_are_refused_before_the_first_starts(tmp_path, config, capsys, changes, sentence, dry):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--config", config(**changes), *dry])
    assert stopped.value.code == 2
    assert f"qtuning: error: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out/*/result.json"))


# Statistics, on runs with a known answer


def test_mean_and_interval():
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    # s = 1.290994, t(0.975, 3) = 3.182446; 3.182446 * 1.290994 / 2
    assert (estimate.mean, estimate.half_width) == (2.5, pytest.approx(2.054260, rel=1e-6))
    assert Estimate.of([5.0]).half_width is None


def test_the_paired_test_compares_seed_by_seed():
    reference = {0: 0.50, 1: 0.60, 2: 0.90, 9: 0.1}
    better = {0: 0.51, 1: 0.62, 2: 0.93, 3: 0.2}
    # differences .01 .02 .03: mean .02, s .01, t = .02 / (.01 / sqrt 3) = 3.4641 on 2 degrees of freedom: p = 0.0742
    assert paired_p_value(better, reference) == pytest.approx(0.074180, abs=1e-5)
    assert paired_p_value({0: 0.5}, reference) is None
    assert paired_p_value(reference, reference) is None


def result(**figures) -> dict:
    return {
        "seconds": 10.0,
        "seconds_selecting": 4.0,
        "kept_samples": 0.25,
        "kept_tokens": 0.2,
        "peak_bytes": 2**20,
        **figures,
    }


def test_a_row_holds_its_seeds_and_what_failed():
    full = [Run(FULL_DATA, "100x100", seed, {}) for seed in (0, 1, 2)]
    ours = [Run("q_tuning", "25x50", seed, {}) for seed in (0, 1, 2)]
    results = {run: result(eval_loss=value, accuracy=0.9) for run, value in zip(full, (1.0, 2.0, 3.0), strict=True)}
    results |= {ours[0]: result(eval_loss=1.1), ours[1]: {"failure": "it broke"}, ours[2]: result(eval_loss=3.3)}
    rows = summarize(results)
    assert [(row["pruner"], row["seeds"], row["failures"]) for row in rows] == [
        (FULL_DATA, [0, 1, 2], []),
        ("q_tuning", [0, 2], ["seed 1: it broke"]),
    ]
    assert rows[1]["eval_loss"].mean == pytest.approx(2.2)
    assert rows[1]["eval_loss_p"] == paired_p_value({0: 1.1, 2: 3.3}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert "eval_loss_p" not in rows[0]
    text = markdown(rows, "title")
    assert "| q_tuning | 25x50 | 2 | - | - | 2.2000 ± 13.9768 |" in text
    assert "- q_tuning 25x50, seed 1: it broke" in text


def test_a_verdict_stands_where_the_difference_is_significant():
    def row(pruner, losses, accuracies):
        runs = [Run(pruner, "25x50", seed, {}) for seed in range(len(losses))]
        figures = zip(losses, accuracies, strict=True)
        return {run: result(eval_loss=loss, accuracy=right) for run, (loss, right) in zip(runs, figures, strict=True)}

    full = [Run(FULL_DATA, "100x100", seed, {}) for seed in range(3)]
    reference = zip((1.0, 2.0, 3.0), (0.5, 0.6, 0.7), strict=True)
    results = {run: result(eval_loss=loss, accuracy=right) for run, (loss, right) in zip(full, reference, strict=True)}
    # Differences of 0.1, 0.11 and 0.12 in the loss and of 0.1, 0.11 and 0.12 in the accuracy: t = 19.05, p = 0.003.
    results |= row("up", (1.1, 2.11, 3.12), (0.6, 0.71, 0.82))
    results |= row("down", (0.9, 1.89, 2.88), (0.4, 0.49, 0.58))
    results |= row("level", (1.1, 1.9, 3.0), (0.6, 0.5, 0.7))
    # By the seeds that both have, whatever the mean of all is; a model that diverged is no better.
    results |= row("a seed more", (0.9, 1.89, 2.88, 99.0), (0.6, 0.71, 0.82, 0.0))
    results |= row("diverged", (0.9, 1.89, math.nan), (0.6, 0.71, 0.82))
    headings, cells = table_cells(summarize(results))
    verdicts = [
        [cell for heading, cell in zip(headings, line, strict=True) if heading == "p against full"] for line in cells
    ]
    assert verdicts == [
        ["-", "-"], ["0.003 better", "0.003 worse"], ["0.003 worse", "0.003 better"], ["1.000", "1.000"],
        ["0.003 better", "0.003 better"], ["0.003 better", "nan"],
    ]  # fmt: skip


def test_a_written_comparison_can_be_read_back(tmp_path, config):
    comparison = load_comparison(config(title="The title"))
    results = {run: result(eval_loss=1.0 + run.seed, versions={"trl": "1"}) for run in comparison.runs()}
    content = json.loads(json.dumps(to_json(comparison, results)))
    assert rows_from_json(content) == summarize(results)
    assert (content["title"], content["versions"]) == ("The title", {"trl": "1"})
    assert [run["pruner"] for run in content["runs"]] == [ZERO_SHOT, FULL_DATA, "mask"]
    comparison = load_comparison(config(pruners=["random", {"name": "none", "budgets": ["50x100"]}]))
    assert [run.budget for run in comparison.runs()] == ["100x100", "100x100", "25x50", "50x100"]


def test_rows_at_equal_tokens_get_the_samples_that_their_token_ratio_needs(config):
    rows = [
        "random + none",
        "q_tuning",
        {"name": "per answer", "token_budget": "answer", "sample_ratio": 0.16, "tokens": [12.5]},
        {"name": "a quarter", "token_ratio": 0.25, "tokens": [6.25]},
    ]
    runs = load_comparison(config(pruners=rows, budgets=None, tokens=[12.5, 6.25])).runs()[2:]
    facts = [(run.pruner, run.tokens, run.budget, run.options["token_budget"]) for run in runs]
    assert facts == [
        ("random + none", 12.5, "12.5x100", "pool"),
        ("random + none", 6.25, "6.25x100", "pool"),
        ("q_tuning", 12.5, "25x50", "pool"),
        ("q_tuning", 6.25, "12.5x50", "pool"),
        ("per answer", 12.5, "16x50", "answer"),
        ("a quarter", 6.25, "25x25", "pool"),
    ]
    assert all(run.options["budget"] == run.budget for run in runs)
    assert not any({"sample_ratio", "token_ratio"} & run.options.keys() for run in runs)


def test_a_share_of_tokens_that_is_missed_is_marked():
    runs = [Run(name, "25x50", 0, {}, tokens=12.5) for name in ("met", "missed")]
    results = {run: result(eval_loss=1.0, kept_tokens=kept) for run, kept in zip(runs, (0.13, 0.2), strict=True)}
    headings, cells = table_cells(summarize(results))
    column = headings.index("tokens")
    assert [line[column] for line in cells] == ["13.0%", "20.0% (asked: 12.50%)"]


def test_names_stand_for_pairs_of_pruners():
    assert pruner_options("random + hardest")[1] == {"sample_pruner": "random", "token_pruner": "hardest"}
    assert pruner_options("q_tuning")[1] == {"sample_pruner": "q_tuning", "token_pruner": "q_tuning"}
    assert pruner_options({"name": "drop", "token_pruning": "drop"}) == ("drop", {"token_pruning": "drop"})
    runs = Comparison("r", ["a"], [3, 4], "out", budgets=["25x50"]).runs()
    assert [(run.pruner, run.seed) for run in runs] == [
        (ZERO_SHOT, 3), (FULL_DATA, 3), ("a", 3), (ZERO_SHOT, 4), (FULL_DATA, 4), ("a", 4),
    ]  # fmt: skip
    assert Path(runs[2].name).name == "a-25x50-seed-3"
