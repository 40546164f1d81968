"""A training step that ran out of memory, done again with less of it: the gradients are those of one that did not."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def step_or_again(
    trainer: Any, step: Callable[[], Tensor], again: Callable[[], Tensor], failed: Callable[[], None]
) -> Tensor:
    """
    The loss of `step`, or that of `again` if it runs out of memory.

    The two must do the same forward and backward pass. What the failed one has added to gradients is not added again,
    and generators and TRL's running metrics are what they were before it.

    Leans on `SFTTrainer._metrics` and `_total_train_tokens`.

    Args:
        trainer: The trainer, in one process: a failed backward pass would leave others waiting.
        step (`Callable`): Runs forward and backward pass.
        again (`Callable`): The same, with less memory.
        failed (`Callable`): Called in between.
    """
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    done: set[Tensor] = set()  # those whose gradient is complete
    hooks = [parameter.register_post_accumulate_grad_hook(done.add) for parameter in parameters]
    before = _state(trainer)
    try:
        return step()
    except torch.OutOfMemoryError:
        pass  # what it holds of the failed pass is freed before the next
    finally:
        for hook in hooks:
            hook.remove()
    failed()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _restore(trainer, before)
    with _without_gradients([parameter for parameter in parameters if parameter in done]):
        return again()


@contextmanager
def _without_gradients(parameters: list[Tensor]) -> Iterator[None]:
    """While it is open, a backward pass adds nothing to the gradients of these parameters."""
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _state(trainer: Any) -> tuple[Any, ...]:
    metrics = {mode: {name: list(values) for name, values in kept.items()} for mode, kept in trainer._metrics.items()}
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return metrics, trainer._total_train_tokens, torch.get_rng_state(), on_cuda


def _restore(trainer: Any, state: tuple[Any, ...]) -> None:
    metrics, trainer._total_train_tokens, on_cpu, on_cuda = state
    for mode, kept in trainer._metrics.items():
        kept.clear()
        kept.update(metrics[mode])
    torch.set_rng_state(on_cpu)
    if on_cuda:
        torch.cuda.set_rng_state_all(on_cuda)
