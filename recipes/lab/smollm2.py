"""
The real model's study: its data, and what is measured on held-out rows beside their loss.

```bash
python recipes/lab/smollm2.py --gsm8k train.jsonl --model FOLDER --output runs/lab/smollm2
PYTHONPATH=recipes/lab qtuning compare --config recipes/lab/compare_smollm2_gsm8k.yaml
```
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

LONGEST = 140  # tokens of a question and its answer, for speed
TEST_ROWS = 96
MARK = "####"  # GSM8K's final answers follow it


def final_answers(trainer: Any) -> dict[str, float]:
    """
    Of each held-out row the final answer, given the true reasoning: the tokens after `####`, the end token left out.

    Returns:
        `dict`: `accuracy`, the share of rows all of whose tokens there are the model's first choice; and
        `sampled_accuracy`, the mean probability of sampling them all at temperature 1.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    model.eval()
    greedy, sampled = [], []
    for row in trainer.eval_dataset:
        ids = torch.tensor(row["input_ids"])
        end = len(ids) - 1 if int(ids[-1]) == tokenizer.eos_token_id else len(ids)
        start = next(i for i in range(end, 0, -1) if MARK in tokenizer.decode(ids[i - 1 : end]))
        with torch.no_grad(), trainer.accelerator.autocast():
            logits = model(input_ids=ids[None, :end].to(model.device)).logits[0, start - 1 : end - 1].float().cpu()
        log_probs = logits.log_softmax(dim=-1)
        answer = ids[start:end]
        greedy.append(bool((log_probs.argmax(dim=-1) == answer).all()))
        sampled.append(float(log_probs.gather(1, answer[:, None]).sum().exp()))
    return {"accuracy": sum(greedy) / len(greedy), "sampled_accuracy": sum(sampled) / len(sampled)}


def make_data(path: Path, model: str, folder: Path) -> None:
    """Rows of GSM8K that are short enough, as `prompt` and `completion`: clean, and with 20% of the answers swapped."""
    from transformers import AutoTokenizer

    from qtuning_trl.demo.lab import corrupted, write_splits

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in rows
        if len(tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]) <= LONGEST
    ]
    random.Random(0).shuffle(rows)
    test, train = rows[:TEST_ROWS], rows[TEST_ROWS:]
    test = [{**row, "kind": "clean"} for row in test]
    write_splits(folder / "gsm8k", corrupted(train, 0, 0.0, 0.0), test)
    write_splits(folder / "gsm8k_swapped", corrupted(train, 0, 0.2, 0.0), test)
    print(f"{len(train)} rows to train on, {len(test)} held out, in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the data of the real model's study.")
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's training split, as JSON lines")
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data")
    arguments = parser.parse_args()
    make_data(arguments.gsm8k, arguments.model, arguments.output)
