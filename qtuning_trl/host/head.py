"""TRL's fused LM head: per-token values, what it costs, and the weights of its losses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.kernels.chunked_logprob as trl_head_kernel
import trl.trainer.utils as trl_head
from torch import Tensor

# Tokens x vocabulary of one tile of the LM head off Triton: 1 MiB in float32, which a core's cache holds. TRL's own
# tiles take 512 MiB; in a trial (SmolLM2-135M's head, one core) small ones took two thirds of their time.
HEAD_TILE = (256, 1024)


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
def lean_lm_head(device: torch.device) -> Iterator[None]:
    """
    While it is open, TRL's fused LM head projects labelled positions only, in small tiles; also off Triton.

    On Triton it projects them only anyway, and nothing is touched. Elsewhere TRL projects every position, for the sake
    of devices that would recompile for each number of labels (Neuron); a CPU does not. The values are the same.

    Leans on `trl.trainer.utils._use_triton` deciding which positions are projected, on `_CHUNKED_LOGPROB_CHUNK_SIZE`
    there and on `trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE`.
    """
    if device.type != "cpu":
        yield
        return
    own = trl_head._use_triton, trl_head_kernel.TOKEN_CHUNK_SIZE, trl_head._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_head._use_triton = lambda device: True
    trl_head_kernel.TOKEN_CHUNK_SIZE, trl_head._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_TILE
    try:
        yield
    finally:
        trl_head._use_triton, trl_head_kernel.TOKEN_CHUNK_SIZE, trl_head._CHUNKED_LOGPROB_CHUNK_SIZE = own


@contextmanager
def head_without_top1() -> Iterator[None]:
    """
    While it is open, TRL's fused LM head leaves out `is_top1`, which only the training metrics read.

    Leans on `trl.trainer.utils._ChunkedLogProbFunction.apply` taking the names of its outputs as the last argument.
    """
    own = trl_head._ChunkedLogProbFunction

    class WithoutTop1:
        @staticmethod
        def apply(*args: Any) -> Any:
            return own.apply(*args[:-1], ("log_probs", "entropy"))

    trl_head._ChunkedLogProbFunction = WithoutTop1  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        trl_head._ChunkedLogProbFunction = own  # type: ignore[misc]


@contextmanager
def weighted_losses(model: torch.nn.Module, weights: Tensor | Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """
    While it is open, the model's fused LM head weights the log-likelihood of each labelled token, and so its loss.

    Leans on the output fields `log_probs` and `label_mask`, as `per_token_values`, and on TRL's loss being their sum.

    Args:
        model (`torch.nn.Module`): The model that is trained.
        weights (`Tensor` of shape `(labelled tokens,)`, or `Callable`): In the batch's row-major order. Or what gives
            them, without gradients, from the log-likelihoods and the entropies of these tokens.
    """

    def weigh(_module: Any, _inputs: Any, outputs: Any) -> None:
        mask, log_probs = outputs.label_mask, outputs.log_probs
        given = weights
        if callable(given):
            given = given(log_probs.detach()[mask], outputs.entropy.detach()[mask])
        outputs.log_probs = log_probs * torch.ones_like(log_probs).masked_scatter(mask, given.to(log_probs))

    handle = model.register_forward_hook(weigh)
    try:
        yield
    finally:
        handle.remove()
