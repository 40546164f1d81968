"""Fake CPU tensors take the path that CUDA would take: its attention kernels, TRL's Triton head, 4-bit products."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import trl.kernels.chunked_logprob as head_kernel
import trl.trainer.utils as trl_head
from torch import Tensor
from transformers import masking_utils

from ..host.ledger import HEAD, Ledger

aten = torch.ops.aten


class Answers:
    """
    What operations return whose result depends on values, which fake tensors do not have.

    Args:
        labelled (`int`): Positions that a boolean index selects: those whose next token is labelled.
        padded (`bool`): Whether rows are padded; without padding no attention mask is made.
    """

    def __init__(self, labelled: int = 0, padded: bool = False):
        self.labelled = labelled
        self.padded = padded
        self.ledger: Ledger | None = None

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return not self.padded if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is aten.nonzero.default:
            return torch.empty((self.labelled, args[0].ndim), dtype=torch.int64)
        if func is aten.index.Tensor and (mask := _boolean(args[1])) is not None:
            index = torch.empty((self.labelled, mask.ndim), dtype=torch.int64)  # CUDA makes it on the way
            self._track(index)
            return args[0].new_empty((self.labelled, *args[0].shape[mask.ndim :]))
        if func is aten.index_put.default and _boolean(args[1]) is not None:
            return torch.empty_like(args[0])
        if func in (aten._index_put_impl_.default, aten.index_put_.default) and _boolean(args[1]) is not None:
            return args[0]
        if func is _gemm_4bit():
            return self._product_4bit(*args)
        return NotImplemented

    def _product_4bit(
        self, inputs: Tensor, _packed: Tensor, shape: Any, _absmax: Tensor, blocksize: int, *_: Any
    ) -> Tensor:
        """As on CUDA for more than a few rows: the weight is unpacked into 16 bits, then cuBLAS multiplies."""
        absmax = torch.empty((math.prod(shape) // blocksize,), dtype=torch.float32)
        self._track(absmax)
        weight = inputs.new_empty(tuple(shape))
        self._track(weight)
        assert self.ledger is not None
        self.ledger.add_flops(2 * inputs.numel() * shape[0])
        return inputs.new_empty((*inputs.shape[:-1], shape[0]))

    def _track(self, tensor: Tensor) -> None:
        assert self.ledger is not None
        self.ledger.track(tensor)


def make_ledger(answers: Answers) -> Ledger:
    """A ledger of fake tensors that has these answers."""
    answers.ledger = Ledger(answers)
    return answers.ledger


def _boolean(indices: Any) -> Tensor | None:
    return next((index for index in indices if index is not None and index.dtype == torch.bool), None)


def _gemm_4bit() -> Any:
    """bitsandbytes' operator, if it is imported; `None` equals no operation."""
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return torch.ops.bitsandbytes.gemm_4bit.default
    return None


def attention_of_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA as CUDA picks it: flash attention in half precision without a mask, else memory-efficient attention."""
    if query.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(-1, query.shape[1], -1, -1)
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def as_on_cuda(ledger: Ledger) -> Iterator[None]:
    """
    While it is open, fake CPU tensors take CUDA's path, and what TRL's head makes counts as the head's.

    transformers makes an attention mask even without padding if a tensor is fake, which it is not told here.

    Leans on `transformers.masking_utils.is_tracing`, on `trl.trainer.utils._use_triton` and `_ChunkedLogProbFunction`,
    and on `_forward_tile`, `_backward_tile` and `_addmm_fp32` of `trl.kernels.chunked_logprob`: its Triton kernels
    allocate nothing.
    """

    def add_product(_sum: Tensor, a: Tensor, b: Tensor) -> None:
        ledger.add_flops(2 * a.shape[0] * a.shape[1] * b.shape[1])

    def never(_tensor: Any = None) -> bool:
        return False

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    head = trl_head._ChunkedLogProbFunction
    forward, backward = head.forward, head.backward

    def counted_forward(*args: Any) -> Any:
        with ledger.part(HEAD):
            return forward(*args)

    def counted_backward(*args: Any) -> Any:
        with ledger.part(HEAD):
            return backward(*args)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.nn.functional, "scaled_dot_product_attention", attention_of_cuda),
            (head_kernel, "_forward_tile", nothing),
            (head_kernel, "_backward_tile", nothing),
            (head_kernel, "_addmm_fp32", add_product),
            (trl_head, "_use_triton", lambda device: True),
            (masking_utils, "is_tracing", never),
            (head, "forward", staticmethod(counted_forward)),
            (head, "backward", staticmethod(counted_backward)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield
