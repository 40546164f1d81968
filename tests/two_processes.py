"""Run by `accelerate launch` on two gloo processes: each scenario writes what it saw for the test to read."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import Recorder, losses, make_trainer, rows_of
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

SCENARIOS: dict[str, dict] = {
    "process": {"budget": "50x50"},
    "micro_batch": {"budget": "50x50", "selection_scope": "micro_batch"},
    "all_processes": {"budget": "30x50", "selection_scope": "all_processes"},
    "few_survivors": {"sample_ratio": 0.01, "selection_scope": "all_processes"},
    "padding_free": {"budget": "50x50", "padding_free": True, "max_length": None},
    "packed": {"budget": "50x50", "selection_scope": "all_processes", "packing": True, "max_length": 48},
    "drop": {"budget": "50x50", "token_pruning": "drop"},
    "random": {
        "budget": "30x50",
        "selection_scope": "all_processes",
        "sample_pruner": "random",
        "token_pruner": "random",
    },
    "rho1": {"budget": "50x50", "sample_pruner": "longest", "token_pruner": "rho1"},
    "pool": {"budget": "50x50", "selection_scope": "all_processes", "token_budget": "pool", "token_pruner": "hardest"},
    "pool_q2": {"budget": "50x50", "selection_scope": "all_processes", "token_budget": "pool"},
    "code": {
        "budget": "50x50",
        "selection_scope": "micro_batch",
        "sample_pruner": "q_tuning_code",
        "token_pruner": "q_tuning_code",
    },
    "infobatch": {"budget": "50x50", "selection_scope": "all_processes", "sample_pruner": "infobatch"},
    "hardest": {"budget": "50x50", "sample_pruner": "random", "token_pruner": "hardest"},
}
# The training forward chooses the tokens, so the rows that are collated still hold all of them.
HARDEST_IN_LOSS = {"budget": "50x50", "sample_pruner": "random", "token_pruner": "hardest", "token_pruning": "loss"}
IN_LOSS: dict[str, dict] = {
    "in_loss": HARDEST_IN_LOSS,
    "in_loss_pool": {**HARDEST_IN_LOSS, "selection_scope": "all_processes", "token_budget": "pool"},
}
# What is compared with the gradients of naive losses, each times its weight.
WEIGHTED: dict[str, dict] = {
    "importance": {
        "budget": "50x50",
        "selection_scope": "all_processes",
        "token_budget": "pool",
        "token_pruner": "importance",
    }
}


def run(name: str, options: dict, output: Path, tokenizer, dataset) -> None:
    options = {"reference_model": str(output / "reference"), **options}
    trainer = make_trainer(output / name, tokenizer, dataset, dropout=0.0, max_steps=1, **options)
    seen = Recorder().attach(trainer)
    trainer.train()
    mine = [row for batch in seen.batches[0] for row in rows_of(batch) if any(x != -100 for x in row["labels"])]
    survivors, weights = gather_object(mine), gather_object(seen.weights[0])
    counts = gather_object([[len(mine), len(seen.batches[0])]])
    if trainer.accelerator.is_main_process:
        facts = {"survivors": survivors, "weights": weights, "gradient": seen.gradients[0]}
        torch.save(facts, output / f"{name}.pt")
        facts = {"counts": counts, "loss": losses(trainer)[0], "summary": trainer.summary()}
        (output / f"{name}.json").write_text(json.dumps(facts))


def keep_everything(output: Path, tokenizer, dataset) -> None:
    weights = []
    for trainer_class, options in ((SFTTrainer, {}), (None, {"budget": "100x100"})):
        kwargs = {"trainer_class": trainer_class} if trainer_class else {}
        trainer = make_trainer(output / "all", tokenizer, dataset, dropout=0.1, **kwargs, **options)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    equal = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (output / f"keep_everything_{trainer.args.process_index}.json").write_text(json.dumps(equal))


def resume(name: str, output: Path, tokenizer, dataset, **options) -> None:
    options |= {"budget": "50x50", "selection_scope": "all_processes", "save_strategy": "steps", "save_steps": 1}
    weights = []
    for path in (None, str(output / name / "checkpoint-1")):
        trainer = make_trainer(output / name, tokenizer, dataset, dropout=0.1, max_steps=3, **options)
        trainer.train(resume_from_checkpoint=path)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    equal = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (output / f"{name}_{trainer.args.process_index}.json").write_text(json.dumps(equal))


def reuse_scores(output: Path, tokenizer, dataset) -> None:
    options = {"budget": "50x50", "score_reuse_epochs": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    weights, facts = [], {}
    for path in (None, str(output / "reuse" / "checkpoint-2")):
        trainer = make_trainer(output / "reuse", tokenizer, dataset, dropout=0.0, **options)
        trainer.train(resume_from_checkpoint=path)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        facts = {"known": sorted(trainer.scorer.cache.scores), "stale": trainer.summary()["stale_scores"]}
    facts["equal"] = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (output / f"reuse_{trainer.args.process_index}.json").write_text(json.dumps(facts))


def main() -> None:
    output, tokenizer_dir = Path(sys.argv[1]), sys.argv[2]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    dataset = Dataset.from_list(prompt_completion_rows(40))
    for name, options in {**SCENARIOS, **IN_LOSS, **WEIGHTED}.items():
        run(name, options, output, tokenizer, dataset)
    keep_everything(output, tokenizer, dataset)
    resume("resume", output, tokenizer, dataset)
    resume("resume_rivals", output, tokenizer, dataset, sample_pruner="infobatch", token_pruner="random")
    reuse_scores(output, tokenizer, dataset)


if __name__ == "__main__":
    main()
