"""The laboratory: its data, its comparisons, and the page made of their results."""

import importlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from datasets import Dataset
from test_trainer import make_trainer
from transformers import AutoModelForCausalLM, set_seed

from qtuning_trl.demo.arithmetic import is_held_out, right_answer
from qtuning_trl.demo.lab import NOISE, corrupted, make_gsm8k, make_sums
from qtuning_trl.demo.make_base_model import batches, make_tokenizer
from qtuning_trl.recipe_files import load_recipe
from qtuning_trl.scripts import compare, sft
from qtuning_trl.studies.compare import RECIPE_NAME, Run, load_comparison, rows_from_json, summarize

REPOSITORY = Path(__file__).parents[1]
# Where Q-Tuning has rows of other names, or none.
WITHOUT_Q_TUNING = tuple(
    f"compare_{name}"
    for name in ("sums_4_pools", "sums_2_stop", "smollm2_rates", "smollm2_seconds", "smollm2_epochs_seconds")
)
COMPARISONS = sorted((REPOSITORY / "recipes" / "lab").glob("compare_*.yaml"))


def text_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question: {n}?\nAnswer:", "completion": f" {n} and {n + 1} are two"} for n in range(count)]


def test_corrupted_rows_are_as_many_as_asked_for_and_what_their_kind_says():
    rows = text_rows(40)
    right = {row["prompt"]: row["completion"] for row in rows}
    result = corrupted(rows, seed=3, swapped=0.3, shuffled=0.1)
    assert Counter(row["kind"] for row in result) == {"swapped": 12, "shuffled": 4, "clean": 24}
    assert {row["prompt"] for row in result} == set(right)
    for row in result:
        same_words = sorted(row["completion"].split()) == sorted(right[row["prompt"]].split())
        assert same_words == (row["kind"] != "swapped")
        assert row["kind"] != "clean" or row["completion"] == right[row["prompt"]]
    swapped = [row for row in result if row["kind"] == "swapped"]
    assert {row["completion"] for row in swapped} == {right[row["prompt"]] for row in swapped}
    assert result == corrupted(rows, seed=3, swapped=0.3, shuffled=0.1) != corrupted(rows, 4, 0.3, 0.1)
    with pytest.raises(ValueError, match=r"`swapped` is 0.9 and `shuffled` is 0.2 of 40 rows: give shares"):
        corrupted(rows, 0, 0.9, 0.2)


def test_sums_of_two_digits(tmp_path):
    make_sums(tmp_path, digits=2, base_steps=1, num_rows=100)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, (mislabelled, garbled) in NOISE.items():
        train, test = (
            [json.loads(line) for line in (tmp_path / name / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "test")
        )
        kinds = Counter(row["kind"] for row in train)
        assert (kinds["mislabelled"], kinds["garbled"]) == (round(100 * mislabelled), round(100 * garbled))
        assert {row["kind"] for row in test} == {"clean"}
        for row in test:
            a, b = map(int, row["prompt"].rstrip("=").split("+"))
            assert 10 <= a <= 99
            assert 10 <= b <= 99
            assert is_held_out(a, b)
            assert row["completion"].endswith(f"answer {right_answer(row['prompt'])}")


def test_the_base_model_reads_numbers_of_as_many_digits():
    tokenizer = make_tokenizer()
    texts = tokenizer.batch_decode(next(batches(tokenizer, 64, seed=0, digits=4))["input_ids"])
    assert any(len(text.split("=")[0]) == 9 and text[4] == "+" for text in texts)  # 1234+5678


def test_text_is_split_without_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr("qtuning_trl.demo.lab.GSM8K_PRETRAINING_ROWS", 30)
    monkeypatch.setattr("qtuning_trl.demo.lab.GSM8K_TEST_ROWS", 10)
    rows = [{"question": f"what is {n}?", "answer": f"{n} is a number"} for n in range(60)]
    rows.append({"question": "long " * 200, "answer": "yes"})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_gsm8k(tmp_path / "gsm8k", path, base_steps=1)
    prompts = {}
    for split in ("train", "test"):
        lines = (tmp_path / "gsm8k" / "data" / f"{split}.jsonl").read_text().splitlines()
        prompts[split] = {json.loads(line)["prompt"] for line in lines}
    assert (len(prompts["train"]), len(prompts["test"])) == (20, 10)
    assert not prompts["train"] & prompts["test"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "gsm8k" / "base")
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"`--gsm8k` is '.*' with 1 rows of at most 500 characters: give GSM8K's"):
        make_gsm8k(tmp_path / "gsm8k", path, base_steps=1)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_run_of_the_laboratory_can_start(path, tmp_path, monkeypatch, own_pruners):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path.parent))  # the variants
    monkeypatch.delitem(sys.modules, "variants", raising=False)
    comparison = load_comparison(path)
    for option in ("model_name_or_path", "dataset_name"):
        folder = Path(comparison.options.get(option) or load_recipe(comparison.recipe)[option])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    seen = set()
    for run in comparison.runs():
        if run.seed == comparison.seeds[0]:
            compare._write_recipe(tmp_path / run.name, comparison, run)
            arguments = sft.parse(["--config", str(tmp_path / run.name / RECIPE_NAME)]).dataclasses[1]
            seen.add((run.pruner, run.budget))
            assert arguments.max_steps in (6, 12, 20, 24, 32, 40, 48, 60, 72, 96, 100, 130, 160, 240)
    assert ("full data", "100x100") in seen
    assert "q_tuning" in {pruner for pruner, _ in seen} or path.stem in WITHOUT_Q_TUNING


@pytest.fixture
def smollm2(tmp_path, monkeypatch):
    """The study's module; its data are two other rows, and three of SQuAD's to answer."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes" / "lab"))
    module = importlib.import_module("smollm2_study")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "MARK", "=")
    monkeypatch.setattr(module, "BATCH_SIZE", 3)
    others = [{"prompt": "a b ?", "completion": " c d"}, {"prompt": "e ?", "completion": " f"}]
    rows = {"others/instructions": others, "others/squad": others[:1], "others/gsm8k": others[1:]}
    rows["squad/test"] = [{"prompt": f"{word} ?", "answers": ["unsaid"]} for word in ("a b", "c", "d")]
    for name, content in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return module


def test_the_study_takes_squads_own_columns(smollm2):
    own = {"title": "T", "context": "It is red.", "question": "Which colour?", "answers": {"text": ["red", "a red"]}}
    row = smollm2.squad_row(own)
    assert row["prompt"] + row["completion"] == "Context: It is red.\nQuestion: Which colour?\nAnswer: red"
    assert (row["answers"], row["title"]) == (["red", "a red"], "T")
    assert smollm2.squad_row(row) == row


def log_probs_of(model, ids: list[int], first: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, first - 1 : len(ids) - 1].log_softmax(dim=-1)


def test_the_studys_figures_are_those_of_naive_logits(smollm2, tmp_path, tokenizer):
    rows = [{"prompt": f"{n} + 1 ?", "completion": f" so {n} + 1 = {n + 1}", "kind": "clean"} for n in range(8)]
    trainer = make_trainer(tmp_path / "run", tokenizer, Dataset.from_list(rows), eval_strategy="no")
    figures, model = smollm2.gsm8k(trainer), tiny_llama()
    right, sampled, halved, entropies = [], [], [], []
    for row in trainer.eval_dataset:
        ids = row["input_ids"]
        first = next(place for place, label in enumerate(row["labels"]) if label != -100)
        log_probs = log_probs_of(model, ids, first)
        entropies += (-(log_probs.exp() * log_probs).sum(dim=-1)).tolist()
        answer = [ids.index(tokenizer.convert_tokens_to_ids("=")) + 1, len(ids) - 1]  # without the end token
        places = range(answer[0] - first, answer[1] - first)
        right.append(all(int(log_probs[place].argmax()) == ids[first + place] for place in places))
        sampled.append(sum(float(log_probs[place, ids[first + place]]) for place in places))
        sharper = (2 * log_probs).log_softmax(dim=-1)
        halved.append(sum(float(sharper[place, ids[first + place]]) for place in places))
    assert figures["accuracy"] == sum(right) / 8
    assert figures["sampled_accuracy"] == pytest.approx(sum(map(math.exp, sampled)) / 8, rel=1e-4)
    assert figures["sampled_accuracy_0.5"] == pytest.approx(sum(map(math.exp, halved)) / 8, rel=1e-4)
    assert figures["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    losses = []
    for prompt, completion in (("a b ?", " c d"), ("e ?", " f")):
        prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        log_probs = log_probs_of(model, prompt + completion, len(prompt))
        losses += [-float(row[token]) for row, token in zip(log_probs, completion, strict=True)]
    assert figures["loss_on_instructions"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert figures["loss_on_squad"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-4)


def test_squads_answers_are_those_that_the_model_writes(smollm2, tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": "a ?", "completion": " b"}] * 8
    trainer = make_trainer(tmp_path / "run", tokenizer, Dataset.from_list(rows), eval_strategy="no")
    assert smollm2.squad(trainer)["accuracy"] == 0.0
    path, said = tmp_path / "squad" / "test.jsonl", []
    for row in smollm2.read_rows(path):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        new = trainer.model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        said.append({**row, "answers": ["unsaid", tokenizer.decode(new, skip_special_tokens=True).strip()]})
    said[2]["answers"] = ["unsaid"]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    figures = smollm2.squad(trainer)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["f1"] == pytest.approx(2 / 3)

    set_seed(0)
    inputs = tokenizer([row["prompt"] for row in said], return_tensors="pt", padding=True, padding_side="left")
    sampled = trainer.model.generate(**inputs, max_new_tokens=16, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)
    entropies = []
    for prompt, ids in zip(inputs["input_ids"], sampled, strict=True):
        new = ids[len(prompt) :].tolist()
        new = new[: new.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in new else new
        prompt = [token for token in prompt.tolist() if token != tokenizer.pad_token_id]
        log_probs = log_probs_of(trainer.model, prompt + new, len(prompt))
        entropies += (-(log_probs.exp() * log_probs).sum(dim=-1)).tolist()
    assert figures["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_the_results_page_is_what_the_committed_results_make():
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "docs" / "make_results.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs" / "results" / "lab").glob("*.json")), ids=lambda p: p.stem)
def test_committed_rows_follow_from_the_committed_runs(path):
    content = json.loads(path.read_text())
    keys = ("pruner", "budget", "seed", "options", "tokens")
    results = {
        Run(*(run.get(key) for key in keys)): {name: value for name, value in run.items() if name not in keys}
        for run in content["runs"]
    }
    assert rows_from_json(content) == summarize(results)
    config = yaml.safe_load((REPOSITORY / "recipes" / "lab" / f"compare_{path.stem}.yaml").read_text())
    assert (content["title"], content["options"]) == (config["title"], config["options"])
