"""Run by `accelerate launch` on two gloo processes: runs with whole parameters, and with DeepSpeed's ZeRO-2 and -3."""

import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import Recorder, losses, make_trainer, rows_of
from test_zero import SCENARIOS
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from qtuning_trl import pruners

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def zero(stage: int) -> dict:
    """Options of a run with DeepSpeed; the threshold, since parameters as small as these would stay whole otherwise."""
    sharding = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"deepspeed": {"zero_optimization": sharding, **dict.fromkeys(AUTO, "auto")}, "use_cpu": False}


def deepspeed_on_cpu() -> None:
    """
    Let accelerate see two processes on a CPU.

    It turns DeepSpeed off for `use_cpu`, and without it counts one process (1.15), while DeepSpeed runs on a CPU as
    well. From here on shards, their gathering and the reduction of gradients are the real ones.
    """
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    # Messages over shared memory instead of gloo, which DeepSpeed would compile for a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def whole(parameter: torch.Tensor) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def run(name: str, options: dict, output: Path, tokenizer, resume: str | None = None) -> None:
    folders = output.parent / "model", str(output.parent / "reference")
    options |= {key: folders[1] for key, value in options.items() if value == "reference"}
    if name == "plain":
        options["trainer_class"] = SFTTrainer
    dataset = Dataset.from_list(prompt_completion_rows(40))
    trainer = make_trainer(output / name, tokenizer, dataset, model=str(folders[0]), **{"max_steps": 2, **options})
    seen, forwards = Recorder().attach(trainer), []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.train(resume_from_checkpoint=resume)
    plugin = trainer.accelerator.state.deepspeed_plugin
    facts = {
        "stage": plugin and plugin.zero_stage,
        "partitioned": all(value.numel() == 0 for value in trainer.model.parameters()),
        "losses": losses(trainer),
        "weights": {key: whole(value) for key, value in trainer.model.named_parameters()},
        "survivors": gather_object([row for batch in seen.batches[0] for row in rows_of(batch)]),
        "summary": None if name == "plain" else trainer.summary(),
        "scored": gather_object([forwards.count(False)]),
    }
    if trainer.accelerator.is_main_process:
        torch.save(facts, output / f"{name}{'_resumed' if resume else ''}.pt")


def refused(output: Path, tokenizer, **options) -> None:
    """What is said of a copy of the model before fine-tuning, where the model is partitioned."""
    pruners.register_token_pruner("of_the_base", needs=("base",))(lambda answers: answers.keep_lowest(answers.base_nll))
    try:
        make_trainer(
            output / "refused",
            tokenizer,
            Dataset.from_list(prompt_completion_rows(40)),
            model=str(output.parent / "model"),
            budget="50x50",
            token_pruner="of_the_base",
            **options,
        )
    except ValueError as error:
        (output / "refused.txt").write_text(str(error))


def main() -> None:
    deepspeed_on_cpu()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
    for kind, options in {"ddp": {}, "zero2": zero(2), "zero3": zero(3)}.items():
        output = Path(sys.argv[1]) / kind
        output.mkdir(exist_ok=True)
        for name, scenario in SCENARIOS.items():
            run(name, scenario | options, output, tokenizer)
        saving = {"budget": "50x50", "save_strategy": "steps", "save_steps": 1} | options
        for checkpoint in (None, str(output / "resume" / "checkpoint-1")):
            run("resume", saving, output, tokenizer, checkpoint)
    refused(output, tokenizer, **zero(3))


if __name__ == "__main__":
    main()
