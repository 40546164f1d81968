"""The model that is evaluated, its tokenizer, and its adapter, with the check that the adapter does something."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import demo
from ..errors import cause

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECK_TEXT = "Question: What is 7 + 5?\nAnswer: 7 + 5 = 12."


def pick_device(device: str | None) -> str:
    """The device asked for, or an accelerator if there is one."""
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(found or "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"`--device` is {device!r}: give one such as 'cpu', 'cuda' or 'cuda:1'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`--device` is {device!r}: PyTorch finds no such device here; give 'cpu'.")
    return device


def find_model(model: str | None, adapter: str | None) -> tuple[str, str | None, str | None]:
    """
    Name or folder of the model to load, of the base model that the adapter names, and the revision to load.

    Raises:
        `ValueError`: If there is none, or it cannot be fetched.
    """
    from transformers import AutoConfig

    named_base = revision = None
    if adapter is not None:
        from peft import PeftConfig

        try:
            config = PeftConfig.from_pretrained(adapter)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"`--adapter` is {adapter!r}, whose adapter_config.json cannot be read ({cause(error)}): give the "
                "folder that training saved the adapter to, or its name on the Hub."
            ) from error
        named_base = config.base_model_name_or_path
        revision = None if model else config.revision
    name = model or named_base
    if name is None:
        raise ValueError(f"`--adapter` is {adapter!r}, which names no base model: give it as `--model`.")
    if name == demo.BASE_MODEL:
        name = demo.base_model_path()
    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        option = f"`--model` is {name!r}" if model else f"`--adapter` names the base model {name!r}"
        raise ValueError(
            f"{option}, which cannot be loaded ({cause(error)}): give `--model` the folder of a model, or a name on "
            "the Hub and a connection to it (`hf auth login` for gated models)."
        ) from error
    return name, named_base, revision


def same_model(name: str, other: str) -> bool:
    """Whether two names or folders are the same model, as far as their names tell."""
    if other == demo.BASE_MODEL:
        other = demo.base_model_path()
    return name == other or Path(name).resolve() == Path(other).resolve()


def load_tokenizer(
    tokenizer: str | None,
    adapter: str | None,
    model: str,
    with_chat_template: bool = False,
    revision: str | None = None,
) -> tuple["PreTrainedTokenizerBase", str]:
    """
    The tokenizer, and where it is from: by default where training saved it, beside the adapter; else the model's
    `revision`.

    Raises:
        `ValueError`: If it cannot be loaded, or lacks the chat template that is to be applied.
    """
    from transformers import AutoTokenizer

    name = tokenizer
    if name is None:
        name = adapter if adapter and (Path(adapter) / "tokenizer_config.json").is_file() else model
    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=revision if name == model else None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer can be loaded from {name!r} ({cause(error)}): name one with `--tokenizer`."
        ) from error
    if with_chat_template and not loaded.chat_template:
        raise ValueError(
            f"`--apply_chat_template` is given, but the tokenizer of {name!r} has no chat template: leave it out, or "
            "name a tokenizer that has one with `--tokenizer`."
        )
    return loaded, name


def load_model(
    name: str, dtype: str, device: str, load_in_4bit: bool, revision: str | None = None
) -> "PreTrainedModel":
    """
    The model in evaluation mode.

    Not by lm-eval's own loader, which cuts the embeddings to the tokenizer's length when there is an adapter (its issue
    #2748), and passes transformers 5 a `load_in_4bit` that it no longer takes.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    return model.eval()


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokenizer_name: str) -> None:
    """Raise a `ValueError` if the tokenizer has tokens that the model has no embedding for."""
    size = len(cast(Any, model.get_input_embeddings()).weight)
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer of {tokenizer_name!r} has {len(tokenizer)} tokens and the model embeds {size}: merge the "
            "adapter into a model with the added tokens and give it as `--model`, or give the base's `--tokenizer`."
        )


def apply_adapter(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", adapter: str, with_base: bool
) -> tuple["PeftModel", dict[str, Any]]:
    """
    Put the adapter on the model, and make sure that it does something.

    PEFT only warns of weights that a module lacks, and says nothing of weights that no module takes.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model, which is changed in place.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): For the text that both are compared on.
        adapter (`str`): Its folder or name.
        with_base (`bool`): Whether the base model is evaluated as well, with the adapter switched off.

    Returns:
        `tuple[PeftModel, dict]`: The model with its adapter; the modules it changes, and by how much the logits of
        `CHECK_TEXT` differ at most.

    Raises:
        `ValueError`: If it does not fit the model, changes nothing, or cannot be switched off.
    """
    import torch
    from peft import PeftModel

    # Some adapters replace biases or embeddings of the base model itself.
    weights = [(weight, weight.sum(dtype=torch.float32)) for weight in model.parameters() if weight.is_floating_point()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
        # Loading again into the same adapter tells what `from_pretrained` does not return.
        keys = adapted.load_adapter(adapter, "default", torch_device=str(model.device))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"`--adapter` is {adapter!r}, which does not fit the model ({cause(error)}): give `--model` the base "
            "model that it was trained on."
        ) from error
    adapted.eval()
    unmatched = [*keys.missing_keys, *keys.unexpected_keys]
    if unmatched:
        raise ValueError(
            f"`--adapter` is {adapter!r}, which does not fit the model ({len(keys.missing_keys)} weights are missing "
            f"and {len(keys.unexpected_keys)} match no module, such as {unmatched[0]}): give `--model` the base model "
            "that it was trained on."
        )
    if with_base and not all(weight.sum(dtype=torch.float32).equal(total) for weight, total in weights):
        raise ValueError(
            f"`--adapter` is {adapter!r}, which replaces weights of the base model that cannot be switched off "
            "(biases or embeddings): evaluate it with `--no_base`, and the base model by itself."
        )
    logits = check_logits(adapted, tokenizer)
    with adapted.disable_adapter():
        base_logits = check_logits(adapted, tokenizer)
    if logits.isnan().any():
        raise ValueError(
            f"`--adapter` is {adapter!r}, with which the logits are not numbers: its training failed, so give another."
        )
    difference = float((logits - base_logits).abs().max())
    if difference == 0:
        raise ValueError(
            f"`--adapter` is {adapter!r}, which changes nothing: the logits of a fixed text are the same with and "
            "without it, as before the first step of training; give the folder of a trained adapter."
        )
    status = adapted.get_model_status()
    return adapted, {
        "type": status.peft_types["default"],
        "modules": status.num_adapter_layers,
        "largest_logit_difference": difference,
        "check_text": CHECK_TEXT,
    }


def check_logits(model: Any, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Logits of `CHECK_TEXT` in float32, of shape (tokens, vocabulary)."""
    import torch

    inputs = tokenizer(CHECK_TEXT, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        return model(input_ids=inputs).logits[0].float()
