"""The demo: its data, its grading, the base model that ships, and its report."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.demo import base_model_path, load_demo_dataset, make_text_model
from qtuning_trl.demo.arithmetic import (
    COPIES,
    KINDS,
    SHARES,
    final_answer,
    held_out,
    noisy_arithmetic,
    right_answer,
    worked_sum,
)
from qtuning_trl.demo.make_base_model import CHARACTERS, document, make_tokenizer
from qtuning_trl.demo.report import PLOT_NAME, POOLS_KEPT, DemoReport, PoolCollector, accuracy

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return noisy_arithmetic(1000, seed=3).to_list()


def operands(prompt: str) -> frozenset[str]:
    return frozenset(prompt.removesuffix("=").split("+"))


# Data


def test_worked_sum():
    assert worked_sum(247, 385) == "7+5=12, 4+8+1=13, 2+3+1=6, answer 632"
    assert worked_sum(999, 999) == "9+9=18, 9+9+1=19, 9+9+1=19, answer 1998"
    assert worked_sum(247, 385, dropped=(0,)) == "7+5=12, 4+8=12, 2+3+1=6, answer 622"
    assert worked_sum(3, 4) == "3+4=7, answer 7"


def test_the_shares_are_exact(rows):
    counts = Counter(row["kind"] for row in rows)
    assert counts == {"clean": 350, **{kind: round(share * 1000) for kind, share in SHARES.items()}}
    none = noisy_arithmetic(50, mislabelled=0.0, garbled=0.0, easy=0.0, duplicate=0.0)
    assert set(none["kind"]) == {"clean"}
    with pytest.raises(ValueError, match="add up to at most 1"):
        noisy_arithmetic(50, mislabelled=0.9)


def test_the_same_seed_gives_the_same_rows_and_leaves_the_global_generator_alone(rows):
    random.seed(5)
    state = random.getstate()
    assert noisy_arithmetic(1000, seed=3).to_list() == rows
    assert held_out(20, seed=1).to_list() == held_out(20, seed=1).to_list()
    assert random.getstate() == state
    assert noisy_arithmetic(1000, seed=4).to_list() != rows


def test_what_each_kind_holds(rows):
    for row in rows:
        prompt, completion = row["prompt"], row["completion"]
        a, b = prompt.removesuffix("=").split("+")
        right = worked_sum(int(a), int(b))
        if row["kind"] in ("clean", "easy", "duplicate"):
            assert completion == right
            assert final_answer(completion) == int(a) + int(b)
        elif row["kind"] == "mislabelled":
            assert completion.rpartition(" ")[0] == right.rpartition(" ")[0]
            assert final_answer(completion) != int(a) + int(b)
        else:
            assert sorted(completion) == sorted(right)
            assert completion != right
        assert (len(a) == 1) == (row["kind"] == "easy")


def test_duplicates_repeat_and_clean_rows_do_not(rows):
    prompts = {kind: Counter(row["prompt"] for row in rows if row["kind"] == kind) for kind in ("clean", "duplicate")}
    assert set(prompts["clean"].values()) == {1}
    assert set(prompts["duplicate"].values()) == {COPIES}
    assert not prompts["clean"].keys() & prompts["duplicate"].keys()


def test_held_out_problems_are_in_no_training_data(rows):
    problems = [operands(prompt) for prompt in held_out(300, seed=9)["prompt"]]
    assert len(set(problems)) == 300
    assert not set(problems) & {operands(row["prompt"]) for row in rows}
    rng = random.Random(0)
    seen = {operands(document(rng).split("=")[0] + "=") for _ in range(3000)}
    every = {operands(prompt) for prompt in held_out(3000, seed=9)["prompt"]}
    assert not every & seen


def test_the_splits():
    splits = load_demo_dataset(seed=1)
    assert set(splits) == {"train", "test"}
    assert splits["train"].column_names == ["prompt", "completion", "kind"]
    assert splits["train"][0] != load_demo_dataset(seed=0)["train"][0]


# Grading


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+5=12, 4+8+1=13, 2+3+1=6, answer 632", 632),
        ("answer 5, answer 632", 632),
        ("answer 0632", 632),
        ("7+5=12, 4+8", None),
        ("answer ", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_right_answer():
    assert right_answer("247+385=") == 632


# Base model


@pytest.fixture(scope="module")
def base() -> tuple[LlamaForCausalLM, object]:
    path = base_model_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def test_the_base_model_is_a_small_llama_that_cannot_do_the_task(base):
    model, tokenizer = base
    files = [path for path in Path(base_model_path()).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert type(model) is LlamaForCausalLM
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert accuracy(model, tokenizer, held_out(50)) < 0.3


def test_easy_rows_are_easy_for_the_base_model(base):
    model, tokenizer = base
    rows = noisy_arithmetic(400, seed=1)

    def mean_loss(kind: str) -> float:
        losses = []
        for row in rows.filter(lambda row: row["kind"] == kind).select(range(20)):
            start = len(row["prompt"])
            ids = tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, :start] = -100
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        return sum(losses) / len(losses)

    assert mean_loss("easy") < 0.05
    assert mean_loss("easy") < mean_loss("clean") < mean_loss("mislabelled") < mean_loss("garbled")


def test_the_tokenizer_gives_the_text_back(base):
    for tokenizer in (base[1], make_tokenizer()):
        for text in (CHARACTERS, "247+385=", worked_sum(247, 385), " two  spaces "):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_accuracy_counts_right_final_answers_and_restores_the_mode(base, monkeypatch):
    model, tokenizer = base
    problems = Dataset.from_dict({"prompt": ["1+1=", "247+385=", "2+2="]})
    replies = ["answer 2<eos>", "answer 1<eos>", "2+2=4, answer 4<eos>"]

    def generate(input_ids, **kwargs):
        assert input_ids[0, 0] == tokenizer.pad_token_id
        assert not model.training
        made = tokenizer(replies, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    model.train()
    assert accuracy(model, tokenizer, problems) == pytest.approx(2 / 3)
    assert model.training
    with pytest.raises(ValueError, match="no problem"):
        accuracy(model, tokenizer, problems.select([]))


# Report


def make_trainer(output_dir: Path, **options) -> QTuningSFTTrainer:
    args = QTuningSFTConfig(
        output_dir=str(output_dir),
        group_column="kind",
        max_steps=3,
        per_device_train_batch_size=16,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return QTuningSFTTrainer(base_model_path(), args, train_dataset=noisy_arithmetic(64))


def test_report_of_a_short_run(tmp_path, capsys):
    trainer = make_trainer(tmp_path, budget="25x50")
    report = DemoReport(trainer, held_out(8))
    trainer.train()
    report.finish(tmp_path)
    assert (tmp_path / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert len(report.collector.pools) == 3
    assert len(report.collector.pool()["kept"]) == 48
    printed = capsys.readouterr().out
    for kind in ("clean", *SHARES):
        assert kind in printed
    for words in ("before", "after", "seconds selecting", "seconds training", "qtuning_summary.json"):
        assert words in printed
    assert str(tmp_path / PLOT_NAME) in printed


def test_report_of_a_run_that_keeps_everything_draws_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path, budget="100x100")
    report = DemoReport(trainer, held_out(4))
    trainer.train()
    report.finish(tmp_path)
    assert not (tmp_path / PLOT_NAME).exists()
    assert "no step selected" in capsys.readouterr().out


def test_the_collector_keeps_the_last_pools():
    class Trainer:
        last_pool = None

    trainer = Trainer()
    collector = PoolCollector(trainer)
    collector.on_step_end(None, None, None)
    assert collector.pool() is None
    for step in range(POOLS_KEPT + 2):
        trainer.last_pool = {
            "kept": [step],
            "thresholds": dict.fromkeys(("perplexity_low", "perplexity_high", "entropy_low", "entropy_high"), step),
        }
        collector.on_step_end(None, None, None)
    together = collector.pool()
    assert together["kept"] == list(range(2, POOLS_KEPT + 2))
    assert together["thresholds"]["entropy_low"] == pytest.approx((2 + POOLS_KEPT + 1) / 2)


def test_the_recipe_runs_and_reports(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "qtuning_trl", "sft", "--config", str(REPOSITORY / "recipes" / "demo.yaml"),
            "--max_steps", "2", "--output_dir", str(tmp_path / "run"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        assert f"│ {kind} " in done.stdout
    assert "accuracy on clean held-out problems" in done.stdout
    assert {"qtuning_summary.json", "eu_plane.png", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_help_needs_neither_torch_nor_trl():
    code = "import sys; from qtuning_trl import cli; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "sft" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "trl", "transformers"}


def test_a_base_model_is_made_of_a_text_column(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    texts = ["Ann has 12 apples.", "Bo eats 3 of them, naïvely."]
    data.write_text("\n".join(json.dumps({"question": text}) for text in texts))
    command = ["make_text_model", "--data", str(data), "--output", str(tmp_path / "base"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--column", "question", "--vocab_size", "300"])
    make_text_model.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts] == texts
    assert model.config.vocab_size == len(tokenizer)
    assert torch.isfinite(model(**tokenizer(texts[0], return_tensors="pt", return_token_type_ids=False)).logits).all()

    monkeypatch.setattr(sys, "argv", [*command, "--column", "answer"])
    with pytest.raises(SystemExit):
        make_text_model.main()
    assert "`--column` is 'answer': choose one of question." in capsys.readouterr().err
