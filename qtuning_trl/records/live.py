"""
What is seen while a run goes on, beside the logged numbers: the EU plane in the trackers, and the progress bar.

Leans on how transformers' callbacks keep their writer and their bar (`TensorBoardCallback.tb_writer`,
`ProgressCallback.training_bar`, `WandbCallback._wandb`, `TrackioCallback._trackio`); `tests/test_live.py` runs each for
real.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..report.plots import plot_eu_plane

if TYPE_CHECKING:
    from ..trainer import QTuningSFTTrainer

IMAGE_NAME = "qtuning/eu_plane"
# Drawing takes about a third of a second: seldom enough that no run feels it.
LOGS_PER_IMAGE = 10


class PlaneLogger(TrainerCallback):
    """
    Sends the EU plane of the latest pool to TensorBoard, trackio and W&B, whichever `report_to` names.

    At the first log, at every tenth one after it, and at the last step. Without matplotlib nothing is sent.
    """

    def __init__(self, trainer: "QTuningSFTTrainer"):
        self.trainer = trainer
        self.logs = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.logs = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.trainer.last_pool is None or "loss" not in (logs or {}):
            return
        due = self.logs % LOGS_PER_IMAGE == 0 or state.global_step >= state.max_steps
        self.logs += 1
        trackers = (TensorBoardCallback, TrackioCallback, WandbCallback)
        named = [cb for cb in self.trainer.callback_handler.callbacks if isinstance(cb, trackers)]
        if not due or not named:
            return
        try:
            image = _draw(self.trainer.last_pool, "quadrant" if args.group_column is None else "group")
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
    selecting took so far; silent where the output is no terminal.
    """

    def __init__(self, trainer: "QTuningSFTTrainer", **kwargs: Any):
        super().__init__(**kwargs)
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)  # off without a terminal
        self.current_step = 0

    def on_step_end(self, args, state, control, **kwargs):
        record = self.trainer.run_record
        if self.training_bar is not None and record.last_step:
            seconds, step = record.totals["seconds"], record.last_step
            selecting = 1 - seconds["training"] / max(sum(seconds.values()), 1e-9)
            self.training_bar.set_postfix_str(
                f"kept {step['kept_samples']:.0f}/{step['pool_samples']:.0f}, selecting {selecting:.0%}", refresh=False
            )
        super().on_step_end(args, state, control, **kwargs)


def show_progress(trainer: "QTuningSFTTrainer") -> None:
    """Put [`SelectionProgress`] in the place of transformers' bar, unless tqdm is disabled or a notebook draws it."""
    plain = [cb for cb in trainer.callback_handler.callbacks if type(cb) is ProgressCallback]
    for callback in plain:
        trainer.remove_callback(callback)
        trainer.add_callback(SelectionProgress(trainer, max_str_len=callback.max_str_len))
