"""
The real model's study: its data, and what is measured on held-out rows beside their loss.

```bash
python recipes/lab/smollm2_study.py --gsm8k gsm8k.jsonl --squad squad.jsonl --instructions instructions.jsonl \
  --model FOLDER --output runs/lab/smollm2
PYTHONPATH=recipes/lab qtuning compare --config recipes/lab/compare_smollm2_gsm8k.yaml
```
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("runs/lab/smollm2")  # where the comparisons look for the data, from the root of a clone
# Tokens of a question and its answer, for speed: longer for SQuAD, whose answers are a few words after long contexts.
LONGEST = {"gsm8k": 110, "squad": 150, "instructions": 110}
TEST_ROWS, OTHER_ROWS = 48, 16
FEW_ROWS = 256  # to train on for several epochs
PARTS = ("prompt", "completion")
BATCH_SIZE = 8
TITLES = 4  # articles of SQuAD that are held out
MARK = "####"  # GSM8K's final answers follow it
CALCULATION = re.compile(r"<<[^<>=]*=([^<>]*)>>")  # GSM8K's own marks: <<48/2=24>>
TEMPERATURES = (0.7, 0.5)
GREEDY = {"do_sample": False}
WHOLE = {"top_k": 0, "top_p": 1.0}  # sampling from all words
NEW_TOKENS = 16  # SQuAD's answers are shorter


def gsm8k(trainer: Any) -> dict[str, float]:
    """
    Of each held-out row the calculations and the final answer, given the true text before them, and what is forgotten.

    Returns:
        `dict`: `accuracy`, the share of rows all of whose tokens after `####` (the end token left out) are the model's
        first choice; `sampled_accuracy`, the mean probability of sampling them all at temperature 1, and
        `sampled_accuracy_T` at lower ones; `calculations`, `sampled_calculations` and `sampled_calculations_T`, the
        same of the results `<<48/2=24>>`, over all calculations of all rows; `entropy`, of the model's next word, the
        mean over all tokens of the answers, in nats; and the losses of [`others`].
    """
    tokenizer = trainer.processing_class
    rows = [
        (row["input_ids"], next(i for i, label in enumerate(row["labels"]) if label != -100))
        for row in trainer.eval_dataset
    ]
    answers: list[dict[str, float]] = []
    calculations: list[dict[str, float]] = []
    entropies = []
    for (ids, first), logits in zip(rows, _logits(trainer, rows), strict=True):
        entropies.append(_entropy(logits))
        tokens = torch.tensor(ids[first:])
        for result in results_of_calculations([tokenizer.decode(token) for token in tokens]):
            calculations.append(_chances(logits[result], tokens[result], "calculations"))
        end = len(ids) - 1 if ids[-1] == tokenizer.eos_token_id else len(ids)
        start = next(i for i in range(end, 0, -1) if MARK in tokenizer.decode(ids[i - 1 : end]))
        answer = slice(start - first, end - first)
        answers.append(_chances(logits[answer], tokens[answer], "accuracy"))
    return {
        **_means(answers),
        **_means(calculations),
        "entropy": float(torch.cat(entropies).mean()),
        **others(trainer, ("instructions", "squad")),
    }


def _chances(logits: torch.Tensor, tokens: torch.Tensor, name: str) -> dict[str, float]:
    """Whether these tokens are all the first choice, and how probable they are together, at lower temperatures too."""

    def probability(temperature: float) -> float:
        return float((logits / temperature).log_softmax(dim=-1).gather(1, tokens[:, None]).sum().exp())

    first_choice = float((logits.argmax(dim=-1) == tokens).all())
    return {name: first_choice, **{_sampled(name, t): probability(t) for t in (1.0, *TEMPERATURES)}}


def _sampled(name: str, temperature: float) -> str:
    """What a figure is called where it is sampled."""
    return f"sampled_{name}" + ("" if temperature == 1.0 else f"_{temperature}")


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of each distribution, in nats."""
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def _means(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in figures) / len(figures) for name in (figures[0] if figures else ())}


def results_of_calculations(texts: list[str]) -> list[list[int]]:
    """Of the tokens of an answer, by their texts: those of the result of each `<<48/2=24>>`."""
    owners = [token for token, text in enumerate(texts) for _ in text]
    spans = (match.span(1) for match in CALCULATION.finditer("".join(texts)))
    return [sorted(set(owners[start:end])) for start, end in spans if end > start]


def squad(trainer: Any) -> dict[str, float]:
    """
    Answers to the held-out questions, generated up to the end of the line.

    Returns:
        `dict`: `accuracy` (exact match) and `f1` of greedy answers, `sampled_accuracy` and `sampled_f1` at
        temperature 1 and `sampled_accuracy_T`, `sampled_f1_T` at lower ones (SQuAD's metric as in lm-eval, the best of
        the reference answers); `entropy`, of the model's next word in answers sampled at temperature 1, the mean over
        their tokens, in nats; and the losses of [`others`].
    """
    from lm_eval.tasks.super_glue.record.t5_utils import squad_em_agg, squad_f1_agg
    from transformers import set_seed

    tokenizer, model = trainer.processing_class, trainer.model
    model.eval()
    rows = read_rows(FOLDER / "squad" / "test.jsonl")
    figures: dict[str, float] = {}
    entropies = []
    for temperature in (None, 1.0, *TEMPERATURES):
        set_seed(0)
        exact, f1 = [], []
        for batch in (rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)):
            inputs = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True, padding_side="left")
            with torch.no_grad(), trainer.accelerator.autocast():
                output = model.generate(
                    **inputs.to(model.device),
                    **({"do_sample": True, "temperature": temperature, **WHOLE} if temperature else GREEDY),
                    max_new_tokens=NEW_TOKENS,
                    pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                    output_logits=temperature == 1.0,
                )
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            if temperature == 1.0:
                of_batch = _entropy(torch.stack(output.logits, dim=1).float())
                entropies += [row[: _answer_length(tokenizer, own)] for row, own in zip(of_batch, ids, strict=True)]
            for row, tokens in zip(batch, ids, strict=True):
                said = tokenizer.decode(tokens, skip_special_tokens=True).strip().split("\n")[0]
                # Its items are a prediction, and a reference after the number of its question.
                pairs = [(said, "0_" + answer.replace("_", " ")) for answer in row["answers"]]
                exact.append(squad_em_agg(pairs))
                f1.append(squad_f1_agg(pairs))
        for name, found in (("accuracy", exact), ("f1", f1)):
            figures[name if temperature is None else _sampled(name, temperature)] = float(sum(found)) / len(rows)
    figures["entropy"] = float(torch.cat(entropies).mean())
    return figures | others(trainer, ("instructions", "gsm8k"))


def _answer_length(tokenizer: Any, tokens: torch.Tensor) -> int:
    """Generated tokens up to the one that ends the answer: an end token, or a line break after a word."""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length])
        if int(tokens[length - 1]) == tokenizer.eos_token_id or "\n" in text.lstrip():
            return length
    return len(tokens)


def others(trainer: Any, names: tuple[str, ...]) -> dict[str, float]:
    """
    What is forgotten, and what is learned for other tasks.

    Returns:
        `dict`: For each of these files of `others/` the loss of its answers, in nats a token.
    """
    tokenizer = trainer.processing_class
    losses = {}
    for name in names:
        rows = []
        for row in read_rows(FOLDER / "others" / f"{name}.jsonl"):
            prompt, answer = (tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in PARTS)
            rows.append((prompt + answer, len(prompt)))
        answers = [
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]), reduction="none")
            for (ids, first), logits in zip(rows, _logits(trainer, rows), strict=True)
        ]
        losses[f"loss_on_{name}"] = float(torch.cat(answers).mean())
    return losses


def _logits(trainer: Any, rows: list[tuple[list[int], int]]) -> Iterator[torch.Tensor]:
    """Of each row (tokens, and where its answer begins) the logits that predict the answer, in float32."""
    model = trainer.model
    model.eval()
    for batch in (rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)):
        # Padding on the right, which no token before it sees.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
        begin = min(first for _, first in batch) - 1
        with torch.no_grad(), trainer.accelerator.autocast():
            logits = model(input_ids=ids.to(model.device), logits_to_keep=ids.shape[1] - begin).logits
        for row, (tokens, first) in zip(logits, batch, strict=True):
            yield row[first - 1 - begin : len(tokens) - 1 - begin].float().cpu()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def squad_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of SQuAD 1.1 with its own columns, or with those of the study already, as the study has it."""
    if "prompt" in row:
        return row
    answers = row["answers"]["text"]
    prompt = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"
    return {"prompt": prompt, "completion": f" {answers[0]}", "answers": answers, "title": row["title"]}


def make_data(arguments: argparse.Namespace) -> None:
    """
    Rows that are short enough, as `prompt` and `completion`: of GSM8K and SQuAD, each clean and with 20% of the answers
    swapped, and few of them for several epochs; instructions in the model's own chat template.
    """
    from transformers import AutoTokenizer

    from qtuning_trl.demo.lab import corrupted, write_splits

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def length(row: dict[str, Any]) -> int:
        return len(tokenizer(row["prompt"] + row["completion"])["input_ids"])

    def short(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [row for row in rows if length(row) <= LONGEST[name]]
        random.Random(0).shuffle(rows)
        return rows

    gsm8k_rows = short(
        "gsm8k",
        [
            {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
            for row in read_rows(arguments.gsm8k)
        ],
    )
    squad_rows = short("squad", [squad_row(row) for row in read_rows(arguments.squad)])
    titles = sorted({row["title"] for row in squad_rows})
    held_out = set(random.Random(0).sample(titles, TITLES))
    splits = {
        "gsm8k": (gsm8k_rows[:TEST_ROWS], gsm8k_rows[TEST_ROWS:]),
        "squad": (
            [row for row in squad_rows if row["title"] in held_out][:TEST_ROWS],
            [row for row in squad_rows if row["title"] not in held_out],
        ),
    }
    (arguments.output / "others").mkdir(parents=True, exist_ok=True)
    for name, (test, train) in splits.items():
        test = sorted(({**row, "kind": "clean"} for row in test), key=length)  # batches of alike lengths pad little
        write_splits(arguments.output / name, corrupted(train, 0, 0.0, 0.0), test)
        write_splits(arguments.output / f"{name}_swapped", corrupted(train, 0, 0.2, 0.0), test)
        write_splits(arguments.output / f"{name}_few", corrupted(train[:FEW_ROWS], 0, 0.0, 0.0), test)
        write_splits(arguments.output / f"{name}_few_swapped", corrupted(train[:FEW_ROWS], 0, 0.2, 0.0), test)
        print(f"{name}: {len(train)} rows to train on, {len(test)} held out")
    instructions = []
    for row in read_rows(arguments.instructions):
        asked = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        instructions.append({"prompt": prompt, "completion": row["output"] + "<|im_end|>"})
    for name, rows in (
        ("instructions", short("instructions", instructions)),
        *((name, test) for name, (test, _) in splits.items()),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows[:OTHER_ROWS])
        (arguments.output / "others" / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the data of the real model's study.")
    for name, columns in (
        ("gsm8k", "question, answer"),
        ("squad", "title, context, question, answers"),
        ("instructions", "instruction, input, output"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"JSON lines with the columns {columns}")
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data")
    make_data(parser.parse_args())
