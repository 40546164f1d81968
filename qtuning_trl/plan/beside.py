"""
The plan of a trainer that is there, in one line for the dry run.

It is counted in a process of its own: counting patches libraries, seeds the generators, and must see no GPU.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig
from trl import ModelConfig

from ..config import QTuningSFTConfig
from .lengths import Lengths, prepared_lengths
from .model import refuse_uncounted_kinds
from .plan import GIB, Planner, refuse_sharded, refuse_uncounted_options
from .text import one_line

# By these a process takes itself for one of those that are launched together.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_")
# What a LoRA may have that `ModelConfig` has no word for; each is a mapping, a list or off.
UNCOUNTED_LORA = ("rank_pattern", "layers_to_transform", "layer_replication", "exclude_modules")


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a trainer, as [`Planner`] takes it; `card` is the GiB of the GPU it runs on."""

    config: PreTrainedConfig
    lengths: Lengths
    training_args: QTuningSFTConfig
    model_args: ModelConfig
    processes: int
    card: float | None

    @classmethod
    def of(cls, trainer: Any) -> "Facts":
        """
        Those of a trainer that is not trained yet.

        Raises:
            `ValueError`: If it is of a kind that is not counted.
        """
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            refuse_sharded("fsdp" if trainer.is_fsdp_enabled else "deepspeed")
        model = trainer.accelerator.unwrap_model(trainer.model)
        model_args = _model_args(model)
        refuse_uncounted_options(trainer.args, model_args)
        config = copy.deepcopy(model.config)
        refuse_uncounted_kinds(config, str(model_args.model_name_or_path))
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # `model_args` say it
        lengths = prepared_lengths(trainer.train_dataset, trainer.args)
        return cls(config, lengths, _on_cpu(trainer.args), model_args, trainer.args.world_size, _card(trainer.args))

    def planner(self) -> Planner:
        """The planner; raises what [`Planner`] raises."""
        self.training_args._setup_devices  # noqa: B018 (it starts what accelerate shares in a process)
        return Planner(self.config, self.lengths, self.training_args, self.model_args, self.processes)


def _model_args(model: Any) -> ModelConfig:
    quantization = getattr(model.config, "quantization_config", None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ModelConfig(
        model_name_or_path=model.config._name_or_path or type(base).__name__,
        dtype=str(base.dtype).removeprefix("torch."),
        attn_implementation=model.config._attn_implementation,
        load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        load_in_8bit=bool(getattr(model, "is_loaded_in_8bit", False)),
        use_bnb_nested_quant=bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
        **_lora(model),
    )


def _lora(model: Any) -> dict[str, Any]:
    """The options of an adapter; a `ValueError`, if it is more than they can say."""
    adapters = getattr(model, "peft_config", None) or {}
    if not adapters:
        return {}
    name = ", ".join(adapters)
    lora = next(iter(adapters.values()))
    if len(adapters) > 1 or type(lora) is not LoraConfig:
        kinds = ", ".join(type(adapter).__name__ for adapter in adapters.values())
        raise ValueError(f"The model has the adapters {name} ({kinds}), and only one LoRA is counted.")
    beyond = [option for option in UNCOUNTED_LORA if getattr(lora, option, None)]
    if beyond:
        raise ValueError(f"The LoRA has `{beyond[0]}`, which is not counted.")
    modules = lora.target_modules
    return {
        "use_peft": True,
        "lora_r": lora.r,
        "lora_target_modules": [modules] if isinstance(modules, str) else sorted(modules or []),
        "lora_target_parameters": lora.target_parameters or None,
        "lora_modules_to_save": lora.modules_to_save,
        "lora_dropout": lora.lora_dropout,
        "use_dora": lora.use_dora,
    }


def _on_cpu(training_args: QTuningSFTConfig) -> QTuningSFTConfig:
    """A copy that another process can take, and that finds its device anew."""
    args = copy.copy(training_args)
    args.use_cpu, args.model_init_kwargs, args.distributed_state = True, None, None
    for name in ("_setup_devices", "_n_gpu"):
        args.__dict__.pop(name, None)
    return args


def _card(training_args: QTuningSFTConfig) -> float | None:
    device = training_args.device
    if device.type != "cuda":
        return None
    return round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)


def plan_line(trainer: Any) -> str:
    """
    The plan of a trainer in one line, or why there is none.

    Args:
        trainer ([`QTuningSFTTrainer`]): Not trained yet; nothing of it is changed, and nothing drawn.
    """
    try:
        facts = pickle.dumps(Facts.of(trainer))
    except Exception as error:  # a plan is an extra: the dry run goes on without it
        return _not_counted(error)
    environment = {
        name: value for name, value in os.environ.items() if name not in LAUNCHED and not name.startswith(LAUNCHERS)
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=facts,
        capture_output=True,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    lines = done.stdout.decode().splitlines()
    if done.returncode != 0 or not lines:
        lines = done.stderr.decode().splitlines() or [f"the count ended with status {done.returncode}"]
        return _not_counted(lines[-1])
    return str(json.loads(lines[-1]))


def _not_counted(why: Any) -> str:
    return f"Plan: not counted, since `qtuning plan` says: {' '.join(str(why).split())}"


def main() -> None:
    """Read the facts from the standard input, and print the line as JSON, the last that is printed."""
    facts: Facts = pickle.load(sys.stdin.buffer)
    try:
        line = one_line(facts.planner().plan(card=facts.card))
    except ValueError as error:
        line = _not_counted(error)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
