"""Attention: its weights, what kinds there are, and attending within each document of a flattened batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_DOCUMENT = "sdpa_by_document"
# Tokens of each document of the flattened batch that goes through the model. Not every model hands its arguments on to
# its attention (Nemotron does not).
_LENGTHS: ContextVar[list[int]] = ContextVar("lengths of the flattened documents")


def attention_weights(model: PreTrainedModel, input_ids: Tensor, layer: int) -> Tensor:
    """
    Attention weights of a sample, averaged over heads, float32 of shape `(tokens, tokens)`, queries by keys.

    Args:
        model ([`~transformers.PreTrainedModel`]): With eager attention, the only one that has weights to give.
        input_ids (`Tensor` of shape `(tokens,)`): The sample.
        layer (`int`): Number of the layer, from 0; one beyond the last is the last.
    """
    outputs = model(input_ids=input_ids[None], output_attentions=True, use_cache=False, logits_to_keep=1)
    return outputs.attentions[min(layer, len(outputs.attentions) - 1)][0].float().mean(dim=0).cpu()


def sdpa_by_document(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """
    Causal attention within each document of a flattened batch: transformers' SDPA, without padding and without a mask.

    Args:
        query, key, value (`Tensor` of shape `(1, heads, tokens, head size)`): Of all documents, one after the other.
        attention_mask (`None`): None is made for an attention that transformers does not know.

    Returns:
        `tuple[Tensor, None]`: Of shape `(1, tokens, heads, head size)`.
    """
    outputs = []
    start = 0
    # Neighbours of one length go together.
    for length, run in groupby(_LENGTHS.get()):
        end = start + length * len(list(run))
        queries, keys, values = (
            states[0, :, start:end].unflatten(1, (-1, length)).transpose(0, 1) for states in (query, key, value)
        )
        output, _ = sdpa_attention_forward(module, queries, keys, values, attention_mask=None, **kwargs)
        outputs.append(output.flatten(0, 1))
        start = end
    return torch.cat(outputs)[None], None


AttentionInterface.register(BY_DOCUMENT, sdpa_by_document)


def attends_only(model: PreTrainedModel) -> bool:
    """
    Whether attention is all that the model's tokens know of each other, so that documents in one row can be kept apart.

    A state or a convolution (Mamba, Jamba, MiniMax, LFM2) runs on from one document into the next, or needs kernels
    that do not.

    Leans on the config naming the kinds of layers in `layer_types`, and on the model's mark `_is_stateful`.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return not model._is_stateful and {*kinds} <= {"full_attention", "sliding_attention", "chunked_attention"}


def can_attend_by_document(model: PreTrainedModel, device: torch.device) -> bool:
    """
    Whether the model is on a CPU and plain causal SDPA is all that its tokens know of each other.

    Leans on the config's `layer_types` and `sliding_window`, and on the model's mark `_supports_attention_backend`.
    """
    config = model.config.get_text_config()
    return (
        device.type == "cpu"
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and model._supports_attention_backend
        and attends_only(model)
    )


@contextmanager
def attention_by_document(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, the model takes flattened batches only, and attends by [`sdpa_by_document`]."""

    def remember(_module: Any, _inputs: Any, kwargs: dict[str, Any]) -> None:
        _LENGTHS.set(kwargs["cu_seq_lens_q"].diff().tolist())

    own = model.config._attn_implementation
    model.set_attn_implementation(BY_DOCUMENT)
    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        model.set_attn_implementation(own)
