"""
What is mended in TRL's trainer for every run: rows are counted and none is trained wrong in silence, checkpoints are
whole or known to be half-written, and a resumed run makes no step too many and finds its place in a stream.

The private names below hold for trl 1.16 with transformers 5.18 to 5.24; `tests/test_host_contract.py` watches them.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from . import checks
from .config import QTuningSFTConfig
from .data_check import DataCheck, count_answers, drop_void_rows, left_out, refuse_short_stream, unusual, without_cuts
from .host.checkpoints import checkpoint_to_resume, warn_of_half_written, whole_checkpoint
from .host.loop import place_in_stream
from .step.selection import special_token_ids

logger = get_logger(__name__)


class CheckedSFTTrainer(SFTTrainer):
    """TRL's [`~trl.SFTTrainer`] with counted data and whole checkpoints; it prunes nothing."""

    args: QTuningSFTConfig
    model: PreTrainedModel
    data_check: DataCheck  # of the training set, from before TRL prepares it
    _whole_rows: Dataset | None = None
    _has_training_set: bool = False

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation, of the training set in two calls: what `max_length` cuts off is counted in between."""
        evaluated = self._has_training_set  # by its place, since an evaluation set may be called "train" too
        self._has_training_set = True
        if not evaluated and isinstance(dataset, Dataset):
            whole = without_cuts(args)
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
            self._whole_rows, formatting_func = dataset, None
        elif evaluated and formatting_func is None:
            dataset, check = drop_void_rows(dataset, args, "eval_dataset")
            for sentence in left_out(check, args, "eval_dataset"):
                logger.warning(sentence)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _check_data(self) -> None:
        """Count what became of the training set, refuse it if nothing is left, and warn of what is left out."""
        args, check = self.args, self.data_check
        if self._whole_rows is not None:
            count_answers(check, self._whole_rows, args, special_token_ids(self._tokenizer, self.model))
            self._whole_rows = None
        checks.refuse_missing_answers(self.train_dataset, check, args)
        if isinstance(self.train_dataset, IterableDataset):
            refuse_short_stream(self.train_dataset, args)
        for sentence in left_out(check, args):
            logger.warning(sentence)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """TRL's `train`, from a whole checkpoint: `True` is the newest. A `ValueError`, if there is none to resume."""
        folder = checkpoint_to_resume(str(self.args.output_dir), resume_from_checkpoint)
        warn_of_half_written(folder)
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        for sentence in unusual(self.data_check, self.args, rows):
            logger.warning(sentence)
        self._go_on_from(folder)
        return super().train(folder, *args, **kwargs)

    def _go_on_from(self, checkpoint: str | None) -> None:
        """What the trainer itself begins anew, or takes up from a checkpoint."""

    def _init_training_state(
        self, max_steps: int, steps_of_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """
        Where a resumed run stands: at the end, if it has made all its steps (the host would make one more); in a
        stream, in the epoch that it had come to (the host would look for it in the first).
        """
        done = super()._init_training_state(max_steps, steps_of_epoch, epochs, resume_from_checkpoint, trial)
        if self.state.global_step >= max_steps:
            return epochs, 0
        if self.state.global_step > 0 and isinstance(self.train_dataset, IterableDataset):
            return place_in_stream(str(resume_from_checkpoint), self.args)
        return done

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """TRL's checkpoint and what the trainer puts beside; marked as half-written until all of it is there."""
        with whole_checkpoint(self, trial) as folder:
            self._save_beside(Path(folder))
            super()._save_checkpoint(model, trial)

    def _save_beside(self, folder: Path) -> None:
        """What the trainer itself saves with a checkpoint."""
