"""What the terminal shows: log lines that fit it, no warning that nobody can act on, and what to do next."""

import json

from test_cli import recipe, run  # noqa: F401 (a fixture)

from qtuning_trl.report.lines import WIDTH, closing_lines, log_line


def test_a_run_shows_short_lines_no_known_warning_and_what_comes_next(recipe, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    path = recipe(logging_steps=1, gradient_checkpointing=True, save_strategy="no")
    done = run("-m", "qtuning_trl", "sft", "--config", path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    logged = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in logged] == ["step 1/2", "step 2/2", "step 2/2"]
    assert all(word in logged[0] for word in ("loss ", "lr ", "kept 2/8", "tokens ", " s a step, selecting "))
    assert all(len(line) <= 100 for line in logged)
    assert "{'loss'" not in done.stdout
    assert "deprecated" not in done.stderr
    assert "gemm_4bit" not in done.stderr
    summary = json.loads((folder / "qtuning_summary.json").read_text())
    tokens = summary["answer_tokens"]
    assert f"Trained on 4 of 16 samples and {tokens['kept']} of {tokens['candidates']} answer tokens (" in done.stdout
    for command in ("report", "eval --adapter", "merge"):
        assert f"\n  qtuning {command} {folder}" in done.stdout


def test_all_keys_are_in_the_history_and_the_line_is_short_without_tqdm_too(recipe, tmp_path, capsys):  # noqa: F811
    from qtuning_trl.scripts import sft

    path = recipe(logging_steps=1, disable_tqdm=True)
    trainer = sft.main(*sft.parse(["--config", path]).dataclasses)
    printed = capsys.readouterr().out
    assert "step 1/2  loss " in printed
    assert "{'loss'" not in printed
    assert {"qtuning/q1", "qtuning/perplexity_low", "entropy", "num_tokens"} <= trainer.state.log_history[0].keys()


def test_log_lines_worked_by_hand():
    figures = {"kept_samples": 16.0, "pool_samples": 64.0, "kept_answer_tokens": 402.0, "pool_answer_tokens": 2185.0}
    figures |= {"seconds_selecting": 0.3, "seconds_training": 0.1, "q1": 19.0}
    logs = {"loss": 0.05747, "learning_rate": 3e-4, **{f"qtuning/{name}": value for name, value in figures.items()}}
    assert log_line(logs, 20, 200) == (
        "step 20/200  loss 0.05747  lr 0.0003  kept 16/64  tokens 18%  0.4 s a step, selecting 75%"
    )
    assert log_line({"loss": 1.0, "learning_rate": 1e-4}, 1, 9) == "step 1/9  loss 1  lr 0.0001"
    assert log_line({"eval_loss": 0.5, "eval_runtime": 2.0, "epoch": 1.0}, 1, 9) == (
        "step 1/9  evaluation  loss 0.5  seconds 2"
    )
    assert (
        log_line({"train_runtime": 83.0, "train_loss": 0.25}, 9, 9) == "step 9/9  done  mean loss 0.25  in 1 min 23 s"
    )
    widest = log_line({f"own/{i}": 0.123456 for i in range(99)}, 1, 9)
    assert (len(widest), widest[-1]) == (WIDTH, "…")


def test_closing_lines_of_a_whole_model_offer_no_merge():
    summary = {
        "steps": 1200, "candidates": 9600, "kept": 1200, "answer_tokens": {"candidates": 100_000, "kept": 9_000},
        "seconds": {"training": 3000.0, "total": 4000.0},
    }  # fmt: skip
    lines = closing_lines(summary, "out", False, True, "s.json").splitlines()
    assert lines == [
        "Trained on 1,200 of 9,600 samples and 9,000 of 100,000 answer tokens (9.0%),",
        "in 1,200 steps and 1 h 6 min, 25% of it to select.",
        "Model saved to out; what was kept: out/s.json",
        "Next:",
        "  qtuning report out",
        "  qtuning eval --model out",
    ]
    assert closing_lines(summary, "out", False, False, "s.json").splitlines() == [*lines[:4], *lines[5:]]
