"""Run by `accelerate launch` on two gloo processes: runs with whole parameters, and with FSDP's shards of them."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType, gather_object
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import losses, make_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTTrainer

from qtuning_trl import QTuningSFTTrainer

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}
SCENARIOS: dict[str, dict] = {
    "full": {"budget": "50x50"},
    "lora": {"budget": "50x50", "dropout": 0.0},
    "no_checkpointing": {"budget": "50x50", "gradient_checkpointing": False},
    "all_processes": {"budget": "30x50", "selection_scope": "all_processes", "token_pruning": "drop"},
    "padding_free": {"budget": "50x50", "padding_free": True, "max_length": None},
    "rho1": {"budget": "50x50", "sample_pruner": "infobatch", "token_pruner": "rho1"},
    "uneven": {"budget": "50x50", "scoring_batch_tokens": 48, "score_reuse_epochs": 2, "max_steps": 6},
    "keep_everything": {"budget": "100x100"},
    "qlora": {"budget": "50x50", "dropout": 0.0, "storage": torch.uint8},
    "qlora_sharded": {"budget": "50x50", "dropout": 0.0, "storage": torch.float32},
}


def shard_on_cpu() -> None:
    """
    Declare two processes on a CPU to be FSDP's.

    accelerate turns FSDP on for accelerators only, while torch shards on a CPU as well. From here on shards, their
    gathering and the reduction of gradients are the real ones.
    """
    accelerate_state.AcceleratorState._reset_state()
    own = accelerate_state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def four_bit(folder: Path, storage: torch.dtype) -> PreTrainedModel:
    """A model in 4-bit NF4, whose bits are kept as `storage`: FSDP shards floating types only."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)


def run(name: str, options: dict, output: Path, tokenizer, rows: list[dict], resume: str | None = None) -> None:
    if options.get("token_pruner") == "rho1":
        options = {"reference_model": str(output.parent / "reference"), **options}
    storage = (options := dict(options)).pop("storage", None)
    model = None if storage is None else four_bit(output.parent / "reference", storage)
    dataset = Dataset.from_list(rows)
    trainer = make_trainer(output / name, tokenizer, dataset, model=model, **{"max_steps": 3, **options})
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.train(resume_from_checkpoint=resume)
    facts = {
        "losses": losses(trainer),
        "sharded": all(isinstance(value, DTensor) for value in trainer.model.parameters()),
        "weights": {
            key: whole(value)
            for key, value in trainer.model.named_parameters()
            if value.requires_grad or storage is None
        },
        "summary": trainer.summary() if isinstance(trainer, QTuningSFTTrainer) else None,
        "scored": gather_object([forwards.count(False)]),
    }
    if trainer.accelerator.is_main_process:
        torch.save(facts, output / f"{name}{'_resumed' if resume else ''}.pt")


def main() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
    rows = prompt_completion_rows(40)
    for kind in ("ddp", "fsdp"):
        output, options = Path(sys.argv[1]) / kind, FSDP if kind == "fsdp" else {}
        output.mkdir(exist_ok=True)
        if kind == "fsdp":
            shard_on_cpu()
        for name, scenario in SCENARIOS.items():
            run(name, scenario | options, output, tokenizer, rows)
        run("plain", {"trainer_class": SFTTrainer} | options, output, tokenizer, rows)
        saving = {"budget": "50x50", "save_strategy": "steps", "save_steps": 2} | options
        for checkpoint in (None, str(output / "resume" / "checkpoint-2")):
            run("resume", saving, output, tokenizer, rows, checkpoint)


if __name__ == "__main__":
    main()
