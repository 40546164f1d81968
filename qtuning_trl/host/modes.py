"""Modes of a model: scoring, which is lean and without noise."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import transformers.integrations.deepspeed as host_deepspeed
from transformers import PreTrainedModel

from .attention import attention_by_document, can_attend_by_document
from .head import head_without_top1, lean_lm_head
from .lora import lora_in_place

ATTENTION_DROPOUT = ("attention_dropout", "dropout")


def has_dropout(model: torch.nn.Module) -> bool:
    """
    Whether the model drops anything out in training.

    Leans on transformers' attention naming its share `attention_dropout` or `dropout` where that is no module.
    """
    return any(
        (isinstance(module, torch.nn.Dropout) and module.p > 0)
        or any(isinstance(p, float) and p > 0 for p in (getattr(module, name, 0) for name in ATTENTION_DROPOUT))
        for module in model.modules()
    )


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


@contextmanager
def without_zero3() -> Iterator[None]:
    """
    While it is open, models are loaded and run whole, as if ZeRO-3 were off: it partitions the trained one alone.

    Leans on `transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref`, by which the hosts know of it.
    """
    own = host_deepspeed._hf_deepspeed_config_weak_ref
    host_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        host_deepspeed._hf_deepspeed_config_weak_ref = own


def is_partitioned(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the model's parameters; leans on how it marks them."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def lean_scoring(model: PreTrainedModel, device: torch.device, flattened: bool) -> Iterator[None]:
    """
    All that makes a scoring forward cheaper without changing its values: what is measured to help on a CPU.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that scores.
        device (`torch.device`): Where it is.
        flattened (`bool`): Whether batches come flattened, without padding.
    """
    with ExitStack() as stack:
        stack.enter_context(scoring_mode(model))
        if not is_partitioned(model):
            stack.enter_context(without_zero3())
        stack.enter_context(head_without_top1())
        stack.enter_context(lean_lm_head(device))
        if device.type == "cpu":
            stack.enter_context(lora_in_place())
        if flattened and can_attend_by_document(model, device):
            stack.enter_context(attention_by_document(model))
        yield
