"""
What is seen while a run goes on, beside the logged numbers: the EU plane in the trackers, and the progress bar.

Leans on how transformers' callbacks keep their writer and their bar (`TensorBoardCallback.tb_writer`,
`ProgressCallback.training_bar`, `WandbCallback._wandb`, `TrackioCallback._trackio`); `tests/test_live.py` runs each for
real.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..records.run import RunRecord
from .lines import log_line
from .plots import plot_eu_plane

IMAGE_NAME = "qtuning/eu_plane"
# Drawing takes about a third of a second: seldom enough that no run feels it.
LOGS_PER_IMAGE = 10


class PlaneLogger(TrainerCallback):
    """
    Sends the EU plane of the latest pool to TensorBoard, trackio and W&B, whichever `report_to` names.

    At the first log, at every tenth one after it, and at the last step. Without matplotlib nothing is sent.

    Args:
        pool (`Callable`): Returns the latest pool, if there is one, as [`plot_eu_plane`] takes it.
        handler (`CallbackHandler`): Of the trainer; it knows the trackers.
    """

    def __init__(self, pool: Callable[[], dict[str, Any] | None], handler: CallbackHandler):
        self.pool, self.handler = pool, handler
        self.logs = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.logs = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        pool = self.pool()
        if not state.is_world_process_zero or pool is None or "loss" not in (logs or {}):
            return
        due = self.logs % LOGS_PER_IMAGE == 0 or state.global_step >= state.max_steps
        self.logs += 1
        trackers = (TensorBoardCallback, TrackioCallback, WandbCallback)
        named = [cb for cb in self.handler.callbacks if isinstance(cb, trackers)]
        if not due or not named:
            return
        try:
            image = _draw(pool, "quadrant" if args.group_column is None else "group")
        except ImportError:
            return
        for callback in named:
            _send(callback, image, state.global_step)


def _draw(pool: dict[str, Any], color_by: str) -> np.ndarray:
    """The EU plane as pixels, uint8 of shape `(height, width, 3)`."""
    figure = plot_eu_plane(pool, color_by)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _send(callback: Any, image: np.ndarray, step: int) -> None:
    if isinstance(callback, TensorBoardCallback):
        if callback.tb_writer is not None:
            callback.tb_writer.add_image(IMAGE_NAME, image, step, dataformats="HWC")
    elif isinstance(callback, WandbCallback):
        callback._wandb.log({IMAGE_NAME: callback._wandb.Image(image), "train/global_step": step})
    else:
        callback._trackio.log({IMAGE_NAME: callback._trackio.Image(image), "train/global_step": step})


class SelectionProgress(ProgressCallback):
    """
    transformers' progress bar, which also shows how many of the latest pool were kept and the share of time that
    selecting took so far; silent where the output is no terminal. Its log lines fit a terminal.

    Args:
        record (`Callable`): Returns the run's counts and seconds.
        **kwargs: Arguments of [`~transformers.ProgressCallback`].
    """

    def __init__(self, record: Callable[[], RunRecord], **kwargs: Any):
        super().__init__(**kwargs)
        self.record = record

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)  # off without a terminal
        self.current_step = 0

    def on_step_end(self, args, state, control, **kwargs):
        record = self.record()
        if self.training_bar is not None and record.last_step:
            seconds, step = record.totals["seconds"], record.last_step
            selecting = 1 - seconds["training"] / max(sum(seconds.values()), 1e-9)
            self.training_bar.set_postfix_str(
                f"kept {step['kept_samples']:.0f}/{step['pool_samples']:.0f}, selecting {selecting:.0%}", refresh=False
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs or {}, state.global_step, state.max_steps))


class LogLines(PrinterCallback):
    """In the place of transformers' printer, which prints all keys: one line that fits a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            print(log_line(logs or {}, state.global_step, state.max_steps))


def show_progress(handler: CallbackHandler, record: Callable[[], RunRecord]) -> None:
    """Put [`SelectionProgress`] in the place of transformers' bar, and [`LogLines`] in that of its printer."""
    plain = [cb for cb in handler.callbacks if type(cb) is ProgressCallback]
    for callback in plain:
        handler.remove_callback(callback)
        handler.add_callback(SelectionProgress(record, max_str_len=callback.max_str_len))
    if any(type(cb) is PrinterCallback for cb in handler.callbacks):
        handler.remove_callback(PrinterCallback)
        handler.add_callback(LogLines())
