"""Checkpoints: which of them are whole, which one a run goes on from, and how one is saved whole."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

# transformers' names, written out here so that a command line is checked without importing it.
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
STATE_NAME = "trainer_state.json"
MARK_NAME = "checkpoint-is-incomplete.txt"
# How torch, safetensors and the system say that a file could not be written.
UNWRITTEN = ("unexpected pos", "iostream error", "No space left on device", "Disk quota exceeded")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    if not Path(output_dir).is_dir():
        return []
    folders = [folder for folder in Path(output_dir).iterdir() if CHECKPOINT.match(folder.name) and folder.is_dir()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    found = CHECKPOINT.match(folder.name)
    return int(found[1]) if found else -1


def is_whole(checkpoint: Path) -> bool:
    """
    Whether the save of a checkpoint came to its end: it has lost its mark, and its state can be read.

    Leans on `Trainer._save_checkpoint` writing the state last, for checkpoints that were never marked: those of plain
    `SFTTrainer`, and of our versions up to 0.1.
    """
    if (checkpoint / MARK_NAME).exists():
        return False
    try:
        return isinstance(json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def checkpoint_to_resume(output_dir: str | Path, wanted: Any) -> str | None:
    """
    The folder that `resume_from_checkpoint` means: `true` is the newest whole checkpoint in `output_dir`.

    Raises:
        `ValueError`: If there is none, or the one that is named is not whole.
    """
    if wanted is None or str(wanted).lower() == "false":
        return None
    found = list_checkpoints(output_dir)
    whole = next(filter(is_whole, found), None)
    if str(wanted).lower() == "true":
        if whole is None:
            half_written = f" but {found[0].name}, which is half-written" if found else ""
            raise ValueError(
                f"`resume_from_checkpoint` is true and `output_dir` {str(output_dir)!r} holds no checkpoint"
                f"{half_written}: leave `resume_from_checkpoint` out to start anew, or give the `output_dir` of the "
                "interrupted run."
            )
        return str(whole)
    wanted = os.path.expanduser(str(wanted))
    if not os.path.isdir(wanted):
        raise ValueError(f"`resume_from_checkpoint` is {wanted!r}: no such folder; give a checkpoint's, or true.")
    if not is_whole(Path(wanted)):
        newest = next(filter(is_whole, list_checkpoints(Path(wanted).absolute().parent)), None)
        remedy = "give a folder `checkpoint-<step>`" if newest is None else f"give {str(newest)!r}"
        raise ValueError(f"`resume_from_checkpoint` is {wanted!r}, which is no whole checkpoint: {remedy}, or true.")
    return wanted


def warn_of_half_written(checkpoint: str | None) -> None:
    """Say which checkpoints are newer than the one to resume from, but half-written."""
    from accelerate.logging import get_logger

    if checkpoint is None:
        return
    step, folder = _step(Path(checkpoint)), Path(checkpoint).absolute().parent
    names = [other.name for other in list_checkpoints(folder) if _step(other) > step and not is_whole(other)]
    if names:
        sentence = "half-written, since a save was interrupted; going on from"
        get_logger(__name__).warning(f"{', '.join(names)}: {sentence} {checkpoint}.")


@contextmanager
def whole_checkpoint(trainer: "Trainer", trial: Any) -> Iterator[Path]:
    """
    While it is open, `Trainer._save_checkpoint` saves into a marked folder; then the mark goes, and older ones may.

    The mark is transformers' own, of its checkpoints on SIGTERM: it is there before the first file and goes when every
    process has written its last one. Only then is `save_total_limit` applied, so that a kill at any moment leaves a
    whole checkpoint, if there was one.

    Leans on `Trainer._save_checkpoint` saving into `checkpoint-<step>` in `Trainer._get_output_dir`, and on its calling
    `transformers.trainer.rotate_checkpoints`.

    Raises:
        `OSError`: If a file cannot be written for want of room; in one sentence.
    """
    import transformers.trainer as host

    folder = Path(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")
    mark = folder / MARK_NAME
    rotate = host.rotate_checkpoints
    put_off: list[dict[str, Any]] = []
    host.rotate_checkpoints = lambda **arguments: put_off.append(arguments)
    try:
        with explained_if_full(folder):
            if trainer.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                mark.write_text("This checkpoint is being saved, or its save was interrupted.\n", encoding="utf-8")
            trainer.accelerator.wait_for_everyone()
            yield folder
    finally:
        host.rotate_checkpoints = rotate
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        mark.unlink()
    for arguments in put_off:
        rotate(**arguments)


@contextmanager
def explained_if_full(folder: Path) -> Iterator[None]:
    """
    Say in one sentence that a folder's files could not be written: torch says `unexpected pos 377920 vs 377812`.

    Raises:
        `OSError`: Instead of the error, if it speaks of that.
    """
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in UNWRITTEN):
            raise
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        raise OSError(
            f"'{folder}' could not be written whole, and its disk has {shutil.disk_usage(there).free / 2**20:.0f} MiB "
            "free: make room there, or keep fewer checkpoints (`save_total_limit`), and go on from the last whole one "
            "with `--resume_from_checkpoint true`."
        ) from error
