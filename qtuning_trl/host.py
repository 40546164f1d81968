"""
What is leant on in TRL and transformers beyond their documented hooks, wrapped in one place.

`QTuningSFTTrainer` overrides public methods only (`get_train_dataloader`, `get_batch_samples`, `training_step`, `log`,
`create_model_card`). The private names below hold for trl 1.16 with transformers 5.18 to 5.23;
`tests/test_host_contract.py` says in plain words which one changed when they no longer do.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any, cast

import torch
import trl.kernels.chunked_logprob as trl_head_kernel
import trl.trainer.utils as trl_head
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .config import QTuningSFTConfig

# Tokens x vocabulary of one tile of the LM head off Triton: 1 MiB in float32, which a core's cache holds. TRL's own
# tiles take 512 MiB; in a trial (SmolLM2-135M's head, one core) small ones took two thirds of their time.
HEAD_TILE = (256, 1024)


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


def load_second_model(
    option: str, args: QTuningSFTConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """
    The model that `option` names, with TRL's fused LM head, the precision, attention and device of `model`.

    Leans on `trl.trainer.utils.add_fused_lm_head`.

    Raises:
        `ValueError`: If it cannot be loaded, or its tokenizer is another one.
    """
    name = str(getattr(args, option))
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        same = AutoTokenizer.from_pretrained(name, **trust).get_vocab() == tokenizer.get_vocab()
        kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
        second = AutoModelForCausalLM.from_pretrained(name, **kwargs, **trust) if same else None
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"`{option}` is {name!r}, which cannot be loaded ({cause}): check the name, or give the folder of a "
            "local model."
        ) from error
    if second is None:
        raise ValueError(
            f"`{option}` is {name!r}, whose tokenizer has another vocabulary than the model that is trained: "
            "choose a model of the same family."
        )
    trl_head.add_fused_lm_head(second, outputs=("log_probs", "entropy"))
    second.requires_grad_(False)
    second.to(args.device)  # type: ignore[arg-type]
    return second


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


@contextmanager
def weighted_losses(model: torch.nn.Module, weights: Tensor) -> Iterator[None]:
    """
    While it is open, the model's fused LM head weights the log-likelihood of each labelled token, and so its loss.

    Leans on the output fields `log_probs` and `label_mask`, as `per_token_values`, and on TRL's loss being their sum.

    Args:
        model (`torch.nn.Module`): The model that is trained.
        weights (`Tensor` of shape `(labelled tokens,)`): In the batch's row-major order.
    """

    def weigh(_module: Any, _inputs: Any, outputs: Any) -> None:
        mask, log_probs = outputs.label_mask, outputs.log_probs
        outputs.log_probs = log_probs * torch.ones_like(log_probs).masked_scatter(mask, weights.to(log_probs))

    handle = model.register_forward_hook(weigh)
    try:
        yield
    finally:
        handle.remove()


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


# Lean scoring


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


ATTENTION_DROPOUT = ("attention_dropout", "dropout")
BY_DOCUMENT = "sdpa_by_document"
# Tokens of each document of the flattened batch that goes through the model. Not every model hands its arguments on to
# its attention (Nemotron does not).
_LENGTHS: ContextVar[list[int]] = ContextVar("lengths of the flattened documents")


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
        stack.enter_context(head_without_top1())
        stack.enter_context(lean_lm_head(device))
        if device.type == "cpu":
            stack.enter_context(lora_in_place())
        if flattened and can_attend_by_document(model, device):
            stack.enter_context(attention_by_document(model))
        yield


def load_scored_model(
    name: str, adapter: str | None, quantization: Any, init_kwargs: dict[str, Any], args: QTuningSFTConfig
) -> PreTrainedModel:
    """
    A model that is only scored by, loaded as `SFTTrainer` loads the one it trains, with an adapter if one is named.

    A quantized model without an adapter gets an untrained LoRA of rank 1 on one layer, which changes no value:
    `Trainer` takes no quantized model that it could not train.

    Leans on `trl.trainer.utils.create_model_from_path`, and on how `SFTTrainer.__init__` calls it.

    Raises:
        `ValueError`: If the adapter cannot be loaded.
    """
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **init_kwargs}
    if quantization is not None:
        init_kwargs["quantization_config"] = quantization
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init_kwargs["device_map"] = None
    model = trl_head.create_model_from_path(name, **init_kwargs)
    if adapter is not None:
        try:
            return cast(PreTrainedModel, PeftModel.from_pretrained(model, adapter))
        except (OSError, ValueError, RuntimeError) as error:
            cause = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            raise ValueError(
                f"`adapter` is {adapter!r}, which cannot be loaded on {name!r} ({cause}): give a folder or a name that "
                "holds an adapter_config.json, and the model it was trained on."
            ) from error
    if quantization is None:
        return model
    linear = (layer for layer, module in model.named_modules() if type(module).__name__.startswith("Linear"))
    untrained = LoraConfig(r=1, target_modules=[next(layer for layer in linear if not layer.endswith("lm_head"))])
    return cast(PreTrainedModel, get_peft_model(model, untrained))
