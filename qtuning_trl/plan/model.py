"""A model in shapes only: its config, a copy with fewer layers, plain or in 4 bits, with or without an adapter."""

import copy
import json
import math
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig, get_peft_config

from .. import demo
from ..config import QTuningSFTConfig
from ..errors import cause

# Quantized weights have one scale a block, and nested quantization one scale for so many of these.
NESTED_BLOCK = 256
BLOCK = 64
# How configs name the number of experts in a layer.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_config(model_args: ModelConfig, training_args: QTuningSFTConfig) -> PreTrainedConfig:
    """
    The config of the model that a recipe names: the only thing that is downloaded, and not for the recipes' own models.

    Raises:
        `ValueError`: If there is none to be had, or it is of a kind that cannot be planned for.
    """
    name = str(model_args.model_name_or_path)
    shipped = json.loads(resources.files(__package__).joinpath("shapes.json").read_text(encoding="utf-8"))
    if name in shipped:
        shape = dict(shipped[name])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    try:
        config = AutoConfig.from_pretrained(
            demo.base_model_path() if name == demo.BASE_MODEL else name,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, whose config.json cannot be had ({cause(error)}): check the name and "
            "the connection, or give a folder with the model's config.json, which is all that a plan needs."
        ) from error
    refuse_uncounted_kinds(config, name)
    return config


def refuse_uncounted_kinds(config: PreTrainedConfig, name: str) -> None:
    """Raise a `ValueError` if a model of this config, named `name`, is of a kind that cannot be planned for."""
    if type(config) not in AutoModelForCausalLM._model_mapping or config.get_text_config() is not config:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, of the kind {config.model_type!r}: plan for a causal language model "
            "that transformers has a class for; vision models and code of the model's own are not counted."
        )
    if any(getattr(config, name, None) for name in EXPERTS):
        raise ValueError(
            f"`model_name_or_path` is {name!r}, a mixture of experts, whose tokens go where their values say: plan for "
            "a dense model, or measure a few steps of it on the card, with `--max_steps 3`."
        )


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """
    The kinds of layers that a model has, in words: one, if its memory and time are linear in their number.

    Layers are alike if their parameters have the same names and shapes, and their attention is of one kind.
    """
    types = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = [_shapes_of(layer) for layer in _layers(bare_model(config, attention="eager"))]
    numbered: dict[Any, str] = {}
    for number, kind in enumerate(zip(types, layers, strict=False)):
        numbered.setdefault(kind, f"{kind[0]} from layer {number}")
    return list(numbered.values())


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _shapes_of(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def bare_model(
    config: PreTrainedConfig, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa"
) -> PreTrainedModel:
    """The model on the meta device, with its first layers only if their number is given."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def build(config: PreTrainedConfig, model_args: ModelConfig, layers: int | None) -> PreTrainedModel:
    """
    The model as `SFTTrainer` is given it, on the meta device: quantized, frozen and with an adapter, as asked for.

    A flash attention kernel is planned for as SDPA's, which is the same.
    """
    from peft import get_peft_model

    named = model_args.dtype
    dtype: torch.dtype = config.dtype if named in (None, "auto") else getattr(torch, str(named))  # type: ignore[assignment]
    attention = "eager" if model_args.attn_implementation == "eager" else "sdpa"
    model: Any = bare_model(config, layers, dtype, attention)
    if model_args.load_in_4bit:
        quantize(model, dtype, bool(model_args.use_bnb_nested_quant))
    peft_config: Any = get_peft_config(model_args)
    if peft_config is not None:
        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
        if model_args.load_in_4bit:
            for parameter in model.parameters():
                if parameter.requires_grad:  # as SFTTrainer does
                    parameter.data = parameter.data.to(torch.bfloat16)
    return model


def quantize(model: PreTrainedModel, compute_dtype: torch.dtype, nested: bool) -> None:
    """
    Replace linear layers, the head excepted, by bitsandbytes' `Linear4bit` with weights of the packed size.

    Raises:
        `ValueError`: If bitsandbytes is not installed.
    """
    from types import SimpleNamespace

    from transformers import BitsAndBytesConfig

    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise ValueError(
            "`load_in_4bit` is true and bitsandbytes cannot be imported: install it (pip install bitsandbytes)."
        ) from error
    head = model.get_output_embeddings()
    with torch.device("meta"):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child is not head:
                    setattr(module, name, _packed(Linear4bit, child, compute_dtype, nested))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]
    model.hf_quantizer = SimpleNamespace(  # type: ignore[assignment]
        is_trainable=True,
        is_qat_trainable=False,
        is_compileable=False,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )


def _packed(linear_class: Any, linear: nn.Linear, compute_dtype: torch.dtype, nested: bool) -> nn.Module:
    from bitsandbytes.functional import QuantState

    number = linear.in_features * linear.out_features
    blocks = math.ceil(number / BLOCK)
    constants = None
    if nested:
        scales = torch.empty(math.ceil(blocks / NESTED_BLOCK))
        constants = QuantState(scales, code=torch.empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=compute_dtype,
        offset=torch.empty(()) if nested else None,
        state2=constants,
    )
    weight: Any = nn.Parameter(torch.empty((math.ceil(number / 2), 1), dtype=torch.uint8), requires_grad=False)
    facts = {"quant_state": state, "compress_statistics": nested, "quant_type": "nf4", "bnb_quantized": True}
    for name, value in {**facts, "blocksize": BLOCK, "quant_storage": torch.uint8}.items():
        setattr(weight, name, value)
    new = linear_class.__new__(linear_class)
    nn.Module.__init__(new)
    new.weight, new.bias, new.quant_state = weight, linear.bias, state
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.compute_dtype, new.compute_type_is_set, new.quant_storage = compute_dtype, True, torch.uint8
    new.support_avx512bf16_for_cpu = False
    return new


def materialize(model: nn.Module) -> None:
    """Meta tensors -> CPU tensors, in the fake mode that is open: `Module.to` cannot swap fake parameters."""
    memo: dict[int, tuple[Any, Any]] = {}  # with the old tensor, so that its id is not used again

    def fresh(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                for name, value in tensor.__dict__.items():
                    setattr(new, name, value)
            memo[id(tensor)] = (tensor, new)
        return memo[id(tensor)][1]

    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = fresh(tensor)
        state = getattr(module, "quant_state", None)
        for owner in (state, getattr(state, "state2", None)):
            for name in ("code", "absmax", "offset"):
                tensor = getattr(owner, name, None)
                if tensor is not None and tensor.device.type == "meta":
                    setattr(owner, name, fresh(tensor))
