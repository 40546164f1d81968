"""
Make what the laboratory's comparisons run on: data with planted noise, and small base models.

```bash
python -m qtuning_trl.demo.lab --output runs/lab                      # sums of two and of four digits
python -m qtuning_trl.demo.lab --output runs/lab --gsm8k train.jsonl  # GSM8K's text, from its training split
```

Each takes five to ten minutes. Each folder it makes holds a base model (`base`) and data with a `train`
and a clean `test` split (`data`, or one folder a setting of the noise); [`recipes/lab`](../../recipes/lab) compares
pruners on them.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from . import make_base_model, make_text_model
from .arithmetic import held_out, noisy_arithmetic

# Digits of the numbers: steps of the base model's training, and rows to train on (two digits have 3,600 problems).
DIFFICULTIES = {2: (600, 3200), 4: (1000, 3200)}
# Settings of the noise: shares of mislabelled and of garbled rows, and the folder's name.
NOISE = {
    "data": (0.3, 0.1),
    "no_noise": (0.0, 0.0),
    "more_mislabelled": (0.6, 0.1),
    "more_garbled": (0.3, 0.4),
}

ANNOTATION = re.compile(r"<<[^>]*>>|\n####.*")
GSM8K_SHARES = {"swapped": 0.2, "shuffled": 0.2}
GSM8K_LONGEST = 500  # characters of a question and its answer; longer ones are left out, for speed
GSM8K_PRETRAINING_ROWS, GSM8K_TEST_ROWS = 2000, 300


def corrupted(rows: list[dict[str, str]], seed: int, swapped: float, shuffled: float) -> list[dict[str, str]]:
    """
    Plant faults in rows of text.

    Args:
        rows (`list[dict]`): With the texts `prompt` and `completion`.
        seed (`int`): Seed of the generator; the global one is left alone.
        swapped (`float`): Share of the rows that get the answer of another of them.
        shuffled (`float`): Share of the rows whose answer has its words in random order.

    Returns:
        `list[dict]`: As many rows in random order, with `kind`: `swapped`, `shuffled` or `clean`.

    Raises:
        `ValueError`: If a share is negative, they add up to more than 1, or a single row were to be swapped.
    """
    swaps, shuffles = round(swapped * len(rows)), round(shuffled * len(rows))
    if min(swaps, shuffles) < 0 or swaps + shuffles > len(rows) or swaps == 1:
        raise ValueError(
            f"`swapped` is {swapped} and `shuffled` is {shuffled} of {len(rows)} rows: give shares of at least 0 that "
            "add up to at most 1, and no single row to swap."
        )
    rng = random.Random(seed)
    rows = rng.sample(rows, len(rows))
    answers = [row["completion"] for row in rows[:swaps]]
    result = [
        # Shifted by one, so that no row keeps its own answer.
        {**row, "completion": answer, "kind": "swapped"}
        for row, answer in zip(rows, answers[1:] + answers[:1], strict=False)
    ]
    for row in rows[swaps : swaps + shuffles]:
        words = row["completion"].split()
        result.append({**row, "completion": " " + " ".join(rng.sample(words, len(words))), "kind": "shuffled"})
    result += [{**row, "kind": "clean"} for row in rows[swaps + shuffles :]]
    rng.shuffle(result)
    return result


def write_splits(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    """Write a folder that `dataset_name` can name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def make_sums(folder: Path, digits: int, base_steps: int, num_rows: int) -> None:
    """Sums of numbers with so many digits: the base model, and data with each setting of the noise."""
    for name, (mislabelled, garbled) in NOISE.items():
        train = noisy_arithmetic(num_rows, 0, mislabelled, garbled, digits=digits)
        write_splits(folder / name, train.to_list(), held_out(digits=digits).to_list())
    arguments = ["--output", str(folder / "base"), "--digits", str(digits), "--steps", str(base_steps)]
    make_base_model.main(arguments)


def make_gsm8k(folder: Path, path: Path, base_steps: int = 400) -> None:
    """
    GSM8K's text: a base model that has read two thousand questions with their answers in plain words, without
    `<<48/2=24>>` and `#### 24`, and other rows to fine-tune on, which have both.

    Raises:
        `ValueError`: If the file has too few rows.
    """
    rows = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in Dataset.from_json(str(path)).to_list()
        if len(row["question"]) + len(row["answer"]) <= GSM8K_LONGEST
    ]
    reserved = GSM8K_PRETRAINING_ROWS + GSM8K_TEST_ROWS
    if len(rows) <= reserved:
        raise ValueError(
            f"`--gsm8k` is '{path}' with {len(rows)} rows of at most {GSM8K_LONGEST} characters: give GSM8K's training "
            f"split, or another file with more than {reserved}."
        )
    random.Random(0).shuffle(rows)
    pretraining, test, train = rows[:GSM8K_PRETRAINING_ROWS], rows[GSM8K_PRETRAINING_ROWS:reserved], rows[reserved:]
    clean_test = [{**row, "kind": "clean"} for row in test]
    write_splits(folder / "data", corrupted(train, 0, **GSM8K_SHARES), clean_test)
    write_splits(folder / "no_noise", corrupted(train, 0, 0.0, 0.0), clean_test)
    texts = [row["prompt"] + ANNOTATION.sub("", row["completion"]) for row in pretraining]
    set_seed(0)
    tokenizer = make_text_model.make_tokenizer(texts, vocab_size=2048)
    model = make_text_model.make_model(len(tokenizer), hidden_size=128, num_layers=3)
    batches = make_text_model.batches(tokenizer, texts, size=32)
    make_base_model.train(model, batches, base_steps, learning_rate=2e-3, warm_up=50)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make what the laboratory's comparisons run on.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data and the base models")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's training split, as JSON lines; makes its folder alone")
    arguments = parser.parse_args()
    if arguments.gsm8k is not None:
        if not arguments.gsm8k.is_file():
            parser.error(f"`--gsm8k` is '{arguments.gsm8k}': no such file; give one that exists.")
        make_gsm8k(arguments.output / "gsm8k", arguments.gsm8k)
        return
    for digits, (base_steps, num_rows) in DIFFICULTIES.items():
        make_sums(arguments.output / f"sums_{digits}", digits, base_steps, num_rows)


if __name__ == "__main__":
    main()
