"""
What is leant on in TRL and transformers beyond their documented hooks, wrapped in one place.

`QTuningSFTTrainer` overrides public methods only (`get_train_dataloader`, `get_batch_samples`, `training_step`, `log`,
`create_model_card`). The private names below hold for trl 1.16 with transformers 5.18 to 5.23;
`tests/test_host_contract.py` says in plain words which one changed when they no longer do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer


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


def keep_column(trainer: Any, column: str) -> None:
    """
    Keep a dataset column in the examples of the train loader, beside the columns that training itself needs.

    Leans on `SFTTrainer._set_signature_columns_if_needed`, which fills `_signature_columns` once.
    """
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = sorted({*(trainer._signature_columns or ()), column})


def count_items(trainer: Trainer, micro_batches: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
    """
    Trainable tokens in the micro-batches of one optimizer step, over all processes: what the loss is divided by.

    Leans on `Trainer._get_num_items_in_batch`.
    """
    return trainer._get_num_items_in_batch(micro_batches, device)


def per_token_values(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """
    Log-likelihood and predictive entropy of the batch's labelled tokens, in nats, by TRL's fused LM head.

    Leans on the `fused_lm_head=True` forward that `SFTTrainer.__init__` installs, and on its output fields `log_probs`,
    `entropy` and `label_mask`.

    Returns:
        `tuple[Tensor, Tensor]`: Two vectors of length `labelled tokens`, in the batch's row-major order.
    """
    outputs = model(**batch, fused_lm_head=True)
    return outputs.log_probs[outputs.label_mask], outputs.entropy[outputs.label_mask]


@contextmanager
def scoring_mode(model: PreTrainedModel) -> Iterator[None]:
    """
    Evaluation mode without gradients, in which dropout and gradient checkpointing are off; the mode before is restored.

    bitsandbytes 0.50 repacks a `Linear4bit` for inference when it runs in evaluation mode on a CPU with AVX512-BF16:
    the scales are rounded, and the layer has no backward pass any more. It has no other use for the mode, so 4-bit
    layers stay in training mode.
    """
    was_training = model.training
    model.eval()
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.train()
    try:
        # no_grad and not inference_mode: tensors cached inside would poison autograd
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
