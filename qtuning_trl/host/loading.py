"""Loading models that are only scored by."""

from typing import Any, cast

import trl.trainer.utils as trl_head
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import QTuningSFTConfig
from ..errors import cause
from .modes import without_zero3


def load_processing_class(model: Any, args: QTuningSFTConfig) -> Any:
    """Tokenizer (or processor) of a model or of its name, as `SFTTrainer` loads it."""
    init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    return AutoProcessor.from_pretrained(
        model if isinstance(model, str) else model.config._name_or_path,
        revision=init_kwargs.get("revision") if isinstance(model, str) else None,
        trust_remote_code=args.trust_remote_code,
    )


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
        with without_zero3():
            second = AutoModelForCausalLM.from_pretrained(name, **kwargs, **trust) if same else None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{option}` is {name!r}, which cannot be loaded ({cause(error)}): check the name, or give the folder of a "
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
            raise ValueError(
                f"`adapter` is {adapter!r}, which cannot be loaded on {name!r} ({cause(error)}): give a folder or a "
                "name that holds an adapter_config.json, and the model it was trained on."
            ) from error
    if quantization is None:
        return model
    linear = (layer for layer, module in model.named_modules() if type(module).__name__.startswith("Linear"))
    untrained = LoraConfig(r=1, target_modules=[next(layer for layer in linear if not layer.endswith("lm_head"))])
    return cast(PreTrainedModel, get_peft_model(model, untrained))
