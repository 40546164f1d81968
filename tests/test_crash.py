"""Runs that were interrupted: by a kill while a checkpoint was saved, a full disk, SIGTERM, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import assert_same_weights, make_trainer, weights
from transformers import Trainer
from trl import SFTTrainer

from qtuning_trl import QTuningSFTTrainer
from qtuning_trl.host.checkpoints import MARK_NAME, STATE_NAME, checkpoint_to_resume, is_whole
from qtuning_trl.step.score_cache import FILE_NAME

SAVING = {"save_strategy": "steps", "save_steps": 2, "budget": "50x50"}


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing of ours catches it."""


@pytest.fixture
def kill_before(monkeypatch):
    """Lets a method of the host raise `Killed` in its n-th call."""

    def at(name: str, call: int) -> None:
        own, calls = getattr(Trainer, name), []

        def method(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return own(*args, **kwargs)

        monkeypatch.setattr(Trainer, name, method)

    return at


# Checkpoints


@pytest.mark.parametrize("moment", ["_save_optimizer_and_scheduler", "_push_from_checkpoint"])
def test_a_kill_while_saving_leaves_the_checkpoint_before_to_resume_from(
    tmp_path, tokenizer, prompt_completion, kill_before, monkeypatch, caplog, moment
):
    whole = make_trainer(tmp_path / "whole", tokenizer, prompt_completion, dropout=0.1, **SAVING)
    whole.train()
    broken = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, save_total_limit=1, **SAVING)
    if moment == "_push_from_checkpoint":  # the last that a save does, but for removing older checkpoints
        broken.args.push_to_hub = True
        monkeypatch.setattr(Trainer, moment, lambda self, folder: None)
        monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    kill_before(moment, 2)
    with pytest.raises(Killed):
        broken.train()
    monkeypatch.undo()
    assert is_whole(tmp_path / "checkpoint-2")
    assert not is_whole(tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, save_total_limit=1, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    said = f"checkpoint-4: half-written, since a save was interrupted; going on from {tmp_path / 'checkpoint-2'}."
    assert [record.getMessage().endswith(said) for record in caplog.records].count(True) == 1
    assert_same_weights(resumed, whole)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / "checkpoint-6" / MARK_NAME).exists()


@pytest.mark.parametrize("state", [None, "", '{"global_step": 4, "log_hist'])
def test_a_half_written_checkpoint_without_a_mark_is_not_resumed_from(tmp_path, state):
    """As plain `SFTTrainer` leaves them."""
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / STATE_NAME).write_text("{}")
    (tmp_path / "checkpoint-4" / STATE_NAME).write_text("{}")
    if state is not None:
        (tmp_path / "checkpoint-10" / STATE_NAME).write_text(state)
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-4")
    with pytest.raises(
        ValueError, match=r"checkpoint-10', which is no whole checkpoint: give '.*checkpoint-4', or true"
    ):
        checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-10"))
    with pytest.raises(ValueError, match="which is no whole checkpoint: give a folder `checkpoint-<step>`, or true"):
        checkpoint_to_resume(tmp_path, str(tmp_path))
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match="holds no checkpoint but checkpoint-10, which is half-written: leave"):
        checkpoint_to_resume(tmp_path, "true")
    assert checkpoint_to_resume(tmp_path, "false") is None


def test_an_old_checkpoint_that_is_written_anew_is_not_whole_meanwhile(
    tmp_path, tokenizer, prompt_completion, kill_before
):
    make_trainer(tmp_path, tokenizer, prompt_completion, max_steps=2, **SAVING).train()
    assert is_whole(tmp_path / "checkpoint-2")
    again = make_trainer(tmp_path, tokenizer, prompt_completion, max_steps=2, **SAVING)
    kill_before("_save_optimizer_and_scheduler", 1)
    with pytest.raises(Killed):
        again.train()
    assert not is_whole(tmp_path / "checkpoint-2")


def test_the_best_and_the_last_checkpoint_are_kept_as_the_host_keeps_them(tmp_path, tokenizer, prompt_completion):
    options = {
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    for trainer_class in (SFTTrainer, QTuningSFTTrainer):
        folder = tmp_path / trainer_class.__name__
        trainer = make_trainer(folder, tokenizer, prompt_completion, trainer_class, **options)
        trainer.train()
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")


def test_reused_scores_are_part_of_the_whole_checkpoint(tmp_path, tokenizer, prompt_completion, kill_before):
    options = {**SAVING, "score_reuse_epochs": 2}
    whole = make_trainer(tmp_path / "whole", tokenizer, prompt_completion, **options)
    whole.train()
    broken = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    kill_before("_save_rng_state", 2)
    with pytest.raises(Killed):
        broken.train()
    assert all((tmp_path / f"checkpoint-{step}" / FILE_NAME).is_file() for step in (2, 4)), "before all else"
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("left", [0, 0.5])
def test_damaged_scores_are_named(tmp_path, tokenizer, prompt_completion, left):
    options = {**SAVING, "score_reuse_epochs": 2, "max_steps": 2}
    make_trainer(tmp_path, tokenizer, prompt_completion, **options).train()
    file = tmp_path / "checkpoint-2" / FILE_NAME
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    with pytest.raises(
        ValueError, match=r"checkpoint-2/qtuning_scores.npz' is damaged \(\w+\): resume from an earlier"
    ):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_has_made_all_its_steps_makes_no_more(tmp_path, tokenizer, stream):
    rows = Dataset.from_list(prompt_completion_rows(40))
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "budget": "50x50"}
    dataset = rows.to_iterable_dataset() if stream else rows  # 3 steps an epoch
    trainer = make_trainer(tmp_path, tokenizer, dataset, **options)
    trainer.train()
    resumed = make_trainer(tmp_path, tokenizer, dataset, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.summary()["steps"] == 4
    assert_same_weights(resumed, trainer)
    assert not (tmp_path / "checkpoint-5").exists()


@pytest.mark.parametrize("saved", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("budget", ["50x50", "100x100"])
def test_a_run_on_a_stream_is_resumed_in_the_epoch_it_had_come_to(tmp_path, tokenizer, budget, saved):
    dataset = Dataset.from_list(prompt_completion_rows(26)).to_iterable_dataset()  # 2 steps an epoch
    options = {**SAVING, "save_steps": 1, "max_steps": 6, "budget": budget, "dropout": 0.1}
    whole = make_trainer(tmp_path, tokenizer, dataset, **options)
    whole.train()
    resumed = make_trainer(tmp_path, tokenizer, dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert resumed.state.global_step == 6
    assert resumed.state.epoch == whole.state.epoch
    assert_same_weights(resumed, whole)


def test_a_run_that_ended_in_the_first_epoch_of_a_stream_goes_on_in_it(tmp_path, tokenizer):
    dataset = Dataset.from_list(prompt_completion_rows(58)).to_iterable_dataset()  # 4 steps an epoch
    options = {**SAVING, "budget": "50x50", "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", tokenizer, dataset, max_steps=6, **options)
    whole.train()
    make_trainer(tmp_path, tokenizer, dataset, max_steps=2, **options).train()
    resumed = make_trainer(tmp_path, tokenizer, dataset, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_is_named_and_the_checkpoint_before_is_resumed_from(tmp_path, tokenizer, prompt_completion):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").symlink_to("/dev/full")
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **SAVING)
    sentence = (
        r"checkpoint-4' could not be written whole, and its disk has \d+ MiB free: make room there, or keep fewer"
    )
    with pytest.raises(OSError, match=sentence):
        trainer.train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert all(torch.isfinite(value).all() for value in weights(resumed).values())


# Signals


@pytest.fixture
def training(tmp_path, model_dir):
    """Starts a command that trains for long, in a group of its own, and waits until its first step is done."""
    started: list[subprocess.Popen] = []
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, prompt_completion_rows(24))))
    keys = {
        "model_name_or_path": model_dir,
        "dataset_name": str(tmp_path / "data.jsonl"),
        "per_device_train_batch_size": 4,
        "max_steps": 100_000,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "qtuning_trl", "sft", "--config", str(tmp_path / "recipe.yaml"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        for _ in range(1200):
            if (tmp_path / "run" / "checkpoint-1").is_dir() or process.poll() is not None:
                break
            time.sleep(0.1)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def running(output_dir: Path) -> list[int]:
    """Processes that hold the run's recipe on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(output_dir.parent / "recipe.yaml") in (process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def test_sigterm_to_the_command_alone_ends_the_training_too(tmp_path, training):
    process = training()
    assert len(running(tmp_path / "run")) == 2, "the command, and the training that it has launched"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert running(tmp_path / "run") == []
    assert errors.splitlines()[-1] == "qtuning: error: the run was ended by signal 15."
    assert "Traceback" not in errors


def test_ctrl_c_is_told_in_one_line(tmp_path, training):
    process = training()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher gets it and the training too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert running(tmp_path / "run") == []
    assert [line for line in errors.splitlines() if "qtuning" in line] == ["qtuning: stopped by Ctrl-C."]
    assert "Traceback" not in errors
