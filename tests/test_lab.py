"""The laboratory: its data, its comparisons, and the page made of their results."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from qtuning_trl.demo.arithmetic import is_held_out, right_answer
from qtuning_trl.demo.lab import NOISE, corrupted, make_gsm8k, make_sums
from qtuning_trl.demo.make_base_model import batches, make_tokenizer
from qtuning_trl.recipes import load_recipe
from qtuning_trl.scripts import compare, sft
from qtuning_trl.studies.compare import RECIPE_NAME, Run, load_comparison, rows_from_json, summarize

REPOSITORY = Path(__file__).parents[1]
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
            compare._write_recipe(tmp_path / run.name, comparison, run, dry=False)
            arguments = sft.parse(["--config", str(tmp_path / run.name / RECIPE_NAME)]).dataclasses[1]
            seen.add((run.pruner, run.budget))
            assert arguments.max_steps in (20, 32, 40, 60, 100)
    assert ("full data", "100x100") in seen
    assert "q_tuning" in {pruner for pruner, _ in seen} or path.stem in ("compare_sums_4_pools", "compare_sums_2_stop")


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
