"""The training loop: its loader, the columns it keeps, what it counts, gradient checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME


@contextmanager
def train_loader_of(trainer: Trainer, collator: Callable, batch_size: int) -> Iterator[None]:
    """
    While it is open, `Trainer.get_train_dataloader` builds a loader with this collator and per-device batch size.

    Leans on `Trainer._train_batch_size` and on `Trainer._get_dataloader` reading `self.data_collator`.
    """
    own = trainer.data_collator, trainer._train_batch_size
    trainer.data_collator, trainer._train_batch_size = collator, batch_size
    try:
        yield
    finally:
        trainer.data_collator, trainer._train_batch_size = own


def place_in_stream(checkpoint: str, args: TrainingArguments) -> tuple[int, int]:
    """
    Epochs that are behind a checkpoint of a run on a stream, and batches of the next one, which are to be skipped.

    Leans on the loop's counting a stream's epoch as if it had all of the run's steps: `state.epoch` is the epochs
    before and then the share of these that were made in the last one. Of the steps that the run had then: the state
    that the trainer has loaded knows only those that it has now.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    epoch = int(state.epoch or 0.0)
    steps = round(((state.epoch or 0.0) - epoch) * state.max_steps)
    if steps == 0:  # the run had come to its end within the first epoch, and has more steps now
        epoch, steps = epoch - 1, state.max_steps
    return epoch, 0 if args.ignore_data_skip else steps * args.gradient_accumulation_steps


def keep_column(trainer: Any, column: str) -> None:
    """
    Keep a dataset column in the examples of the train loader, beside the columns that training itself needs.

    Leans on `SFTTrainer._set_signature_columns_if_needed`, which fills `_signature_columns` once.
    """
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = sorted({*(trainer._signature_columns or ()), column})


def count_items(
    trainer: Trainer, micro_batches: list[dict[str, Any]], device: torch.device, tokens: int | None = None
) -> Tensor | int | None:
    """
    Trainable tokens in the micro-batches of one optimizer step, over all processes: what the loss is divided by.

    `tokens` are those of this process where the labels do not tell, since the loss chooses among them or weights them.

    Leans on `Trainer._get_num_items_in_batch` counting labels, all but the first of a row.
    """
    if tokens is not None:
        micro_batches = [{"labels": torch.zeros((1, 1 + tokens), dtype=torch.int64)}]
    return trainer._get_num_items_in_batch(micro_batches, device)


@contextmanager
def without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """
    While it is open, the model keeps its activations; gradient checkpointing is on again afterwards.

    Leans on transformers' layers reading their attribute `gradient_checkpointing` on each call.
    """
    flag = "gradient_checkpointing"
    checkpointed = [module for module in model.modules() if getattr(module, flag, False)]
    for module in checkpointed:
        setattr(module, flag, False)
    try:
        yield
    finally:
        for module in checkpointed:
            setattr(module, flag, True)
