"""PEFT's LoRA layers: adding in place while scoring."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor


def adds_in_place(layer: lora.Linear, x: Tensor) -> bool:
    """Whether a LoRA layer does no more with `x` than `W x + s B A x`, all of one type, so that it can add in place."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.training or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return False
    linears = (layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]])
    return (
        all(type(linear) is torch.nn.Linear and linear.weight.dtype == x.dtype for linear in linears)
        and linears[1].bias is linears[2].bias is None
        and not torch.is_autocast_enabled(x.device.type)
    )


@contextmanager
def lora_in_place() -> Iterator[None]:
    """
    While it is open, LoRA layers add `s B A x` to `W x` in place, where PEFT makes three tensors of that size.

    The values are the same up to rounding, and no weight is touched. Dropout, DoRA, several adapters at once, mixed
    precision and quantized layers stay PEFT's own.

    Leans on `peft.tuners.lora.Linear` computing `base_layer(x) + lora_B(lora_A(dropout(x))) * scaling` for the active
    adapters, those in `lora_variant` excepted.
    """
    own = lora.Linear.forward

    def forward(layer: lora.Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not adds_in_place(layer, x):
            return own(layer, x, *args, **kwargs)
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        down, up = cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight)
        result = layer.base_layer(x)
        result.flatten(0, -2).addmm_(x.flatten(0, -2) @ down.T, up.T, alpha=layer.scaling[name])
        return result

    lora.Linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        lora.Linear.forward = own  # type: ignore[method-assign]
