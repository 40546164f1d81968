"""
Why a pruner wins or loses: how its gradients lie to those of full data, on the same pools and the same weights.

Nothing is learned (the learning rate is 0), so each arm sees the same model. Of each step's gradient, and of the mean
of all, the cosine with the mean gradient of full data: the first is what a step gives, the second what is left when
steps average, which 1 would say is not biased.

```bash
python recipes/lab/gradients.py --model FOLDER --dataset runs/lab/smollm2/gsm8k --pools 24 --output gradients.json
```
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer

WEIGHTED = {"token_pruner": "importance", "token_pruning": "loss"}
ARMS: dict[str, dict[str, Any]] = {
    "full data": {"budget": "100x100"},
    "q_tuning": {},
    "q_tuning_code": {"sample_pruner": "q_tuning_code", "token_pruner": "q_tuning_code"},
    "q_tuning + none": {"budget": "12.5x100", "token_pruner": "none"},
    "q_tuning + hardest": {"token_pruner": "hardest"},
    "random + none": {"budget": "12.5x100", "sample_pruner": "random", "token_pruner": "none"},
    "random + random": {"sample_pruner": "random", "token_pruner": "random"},
    "random + easiest": {"sample_pruner": "random", "token_pruner": "easiest"},
    "random + hardest": {"sample_pruner": "random", "token_pruner": "hardest"},
    "random + uncertain": {"sample_pruner": "random", "token_pruner": "uncertain"},
    "random + importance": {"sample_pruner": "random", **WEIGHTED},
    "random + importance (a quarter)": {"budget": "50x25", "sample_pruner": "random", **WEIGHTED},
    "all + importance": {"budget": "100x12.5", "sample_pruner": "none", **WEIGHTED},
}


class Gradients(TrainerCallback):
    """The gradient of each step, flattened."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(gradients).clone())


def gradients(model: str, dataset: str, pools: int, options: dict[str, Any]) -> torch.Tensor:
    """
    Gradients of an arm, float32 of shape `(pools, parameters)`: of LoRA's B, since those of A are 0 at the start.

    Args:
        model, dataset (`str`): Folders.
        pools (`int`): How many, of 16 candidates each; the same for all arms.
        options (`dict`): Of the arm.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = Gradients()
    with tempfile.TemporaryDirectory() as folder:
        args = QTuningSFTConfig(
            folder, **{"budget": "25x50", "token_budget": "pool", **options}, learning_rate=0.0, max_steps=pools,
            per_device_train_batch_size=16, gradient_accumulation_steps=1, gradient_checkpointing=False,
            max_length=160, max_grad_norm=0.0, bf16=True, use_cpu=True, seed=0, save_strategy="no", report_to="none",
            record=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = QTuningSFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            args,
            train_dataset=load_dataset(dataset, split="train"),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[found],
        )
        trainer.train()
    return torch.stack(found.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="How the gradients of pruned steps lie to those of full data.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--dataset", required=True, help="folder of the data, as smollm2_study.py makes it")
    parser.add_argument("--pools", type=int, default=24, help="steps of 16 candidates")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    whole = None
    print("| arm | a step's cosine | the mean's | norm of a step | of the mean |\n|---|---|---|---|---|")
    for name, options in ARMS.items():
        steps = gradients(arguments.model, arguments.dataset, arguments.pools, options)
        mean = steps.mean(dim=0)
        whole = mean if whole is None else whole
        cosines = torch.nn.functional.cosine_similarity(steps, whole[None], dim=1)
        rows[name] = {
            "step": float(cosines.mean()),
            "mean": float(torch.nn.functional.cosine_similarity(mean, whole, dim=0)),
            "norm": float(steps.norm(dim=1).mean()),
            "norm_of_mean": float(mean.norm()),
        }
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in rows[name].values()) + " |", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
