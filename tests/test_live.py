"""What is seen while a run goes on: the EU plane in TensorBoard, trackio and W&B, each for real; the progress bar."""

import fcntl
import os
import pty
import re
import sqlite3
import struct
import subprocess
import sys
import termios
from pathlib import Path

from test_trainer import make_trainer
from transformers import ProgressCallback

from qtuning_trl.report import live
from qtuning_trl.report.live import IMAGE_NAME, SelectionProgress

TESTS = Path(__file__).parent
LOGGED = ("qtuning/q1", "qtuning/q4", "qtuning/filled", "qtuning/seconds_selecting", "qtuning/seconds_training")


def train(tmp_path, tokenizer, dataset, **options):
    trainer = make_trainer(tmp_path, tokenizer, dataset, budget="50x50", **options)
    trainer.train()
    return trainer


def test_tensorboard_shows_the_plane_and_the_numbers(tmp_path, tokenizer, prompt_completion, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(live, "LOGS_PER_IMAGE", 4)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    train(tmp_path, tokenizer, prompt_completion, report_to="tensorboard", group_column="source")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    images = events.Images(IMAGE_NAME)
    assert [image.step for image in images] == [1, 5, 6]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width > 400 for image in images)
    scalars = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in LOGGED} <= scalars


def test_trackio_shows_the_plane_and_the_numbers(tmp_path, tokenizer_dir):
    run_with_tracker(tmp_path, tokenizer_dir, "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [str(row) for row in connection.execute("select * from metrics")]
    images = [row for row in rows if IMAGE_NAME in row]
    assert len(images) == 2
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2
    for name in LOGGED:
        assert any(f"train/{name}" in row for row in rows), name


def test_wandb_takes_the_plane_offline(tmp_path, tokenizer_dir):
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb"), "WANDB_SILENT": "true"}
    (tmp_path / "wandb").mkdir()
    run_with_tracker(tmp_path, tokenizer_dir, "wandb", environment)
    images = list((tmp_path / "wandb").rglob("files/media/images/qtuning/*.png"))
    assert len(images) == 2
    [log] = (tmp_path / "wandb").rglob("*.wandb")
    for name in LOGGED:
        assert f"train/{name}".encode() in log.read_bytes(), name


def run_with_tracker(tmp_path, tokenizer_dir, tracker: str, environment: dict[str, str]) -> None:
    """Three steps in a process of its own, since trackers leave threads and global state behind."""
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import make_trainer
from transformers import PreTrainedTokenizerFast

dataset = Dataset.from_list(prompt_completion_rows(40))
tokenizer = PreTrainedTokenizerFast.from_pretrained({tokenizer_dir!r})
trainer = make_trainer({str(tmp_path / "out")!r}, tokenizer, dataset, budget="50x50", max_steps=3,
                       report_to={tracker!r}, trackio_space_id=None)
trainer.train()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=tmp_path,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_is_drawn_for_nobody_nor_without_matplotlib(tmp_path, tokenizer, prompt_completion, monkeypatch):
    def refuse(*args):
        raise AssertionError("drawn")

    monkeypatch.setattr(live, "_draw", refuse)
    train(tmp_path / "a", tokenizer, prompt_completion, max_steps=1)
    monkeypatch.undo()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(tmp_path / "b", tokenizer, prompt_completion, max_steps=1, report_to="tensorboard")


# Progress bar


def test_the_bar_in_a_terminal_shows_what_was_kept_and_the_time(tmp_path, tokenizer, prompt_completion, monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows, columns
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(tmp_path, tokenizer, prompt_completion, max_steps=3, disable_tqdm=False)
        monkeypatch.undo()
        written = os.read(ours, 65536).decode()
    os.close(ours)
    assert re.search(r"3/3 .*kept 4/8, selecting \d+%", written)


def test_no_bar_without_a_terminal(tmp_path, tokenizer, prompt_completion, capsys):
    train(tmp_path, tokenizer, prompt_completion, max_steps=3, disable_tqdm=False)
    printed = capsys.readouterr()
    assert "3/3" not in printed.err
    assert printed.out.count("  kept ") == 3  # the logs are printed all the same


def test_the_bar_takes_the_place_of_the_hosts(tmp_path, tokenizer, prompt_completion):
    for disable, expected in ((False, [SelectionProgress]), (True, [])):
        trainer = make_trainer(tmp_path, tokenizer, prompt_completion, disable_tqdm=disable)
        bars = [type(cb) for cb in trainer.callback_handler.callbacks if isinstance(cb, ProgressCallback)]
        assert bars == expected
