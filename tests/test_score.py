"""`qtuning score`: decisions against naive full-logit scores, resume, processes, formats, training on the result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset, load_dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from test_trainer import COMMON, lora
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

from qtuning_trl import cli
from qtuning_trl.method import select_samples, token_keep_mask, token_scores
from qtuning_trl.report.report import open_run, report_data
from qtuning_trl.scripts import score
from qtuning_trl.step.sample import Sample
from qtuning_trl.studies.dataset_scoring import BatchSize, PartialScores, fingerprint, score_rows, select_rows

ROWS = 90
CPU = ["--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true"]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(ROWS)))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(model_dir, data, output, *options: str) -> list[str]:
    """A command line; an option given twice counts the second time."""
    fixed = ["--model", model_dir, "--dataset", data, "--output", str(output), "--budget", "30x50", *CPU]
    return [*fixed, "--rows_per_part", "20", *options]


def scorer(*options: str) -> score.DatasetScorer:
    return score.DatasetScorer(*score.parse(arguments(*options)).dataclasses)


def run(*options: str) -> None:
    run = scorer(*options)
    run.score()
    run.finish()


def read(path) -> Dataset:
    path = str(path)
    if os.path.isdir(path):
        return load_from_disk(path)
    kind = "json" if path.endswith(".jsonl") else "parquet"
    return load_dataset(kind, data_files=path, split="train")


def naive_scores(model, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NLL and entropy of all positions from full logits, and the answer mask, each of shape `(tokens - 1,)`."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    nll = -log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return nll, -(log_probs.exp() * log_probs).sum(-1), torch.tensor(labels[1:]) != -100


def expected_rows(model, prepared: Dataset, tokenizer, drop: bool = False) -> list[dict]:
    """The result, by the method's functions on naive scores, one row at a time."""
    scores = [naive_scores(model, row["input_ids"], row["labels"]) for row in prepared]
    perplexity = torch.stack([nll[mask].mean().exp() for nll, _, mask in scores])
    entropy = torch.stack([ent[mask].mean() for _, ent, mask in scores])
    selection = select_samples(perplexity, entropy, 0.3)
    rows = []
    for index, row in enumerate(prepared):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        kept = torch.ones(len(ids), dtype=torch.bool)
        if selection.prune_tokens[index]:
            nll, _, mask = scores[index]
            special = torch.isin(ids[1:], torch.tensor([0, 1, 2]))
            keep = token_keep_mask(token_scores(nll.exp()[None], mask[None], 0.5), mask[None], 0.5, special[None])[0]
            kept[1:] = keep | ~mask
        if drop:
            ids, labels = ids[kept], labels[kept]
        else:
            labels = labels.masked_fill(~kept, -100)
        rows.append(
            {
                "perplexity": float(perplexity[index]),
                "entropy": float(entropy[index]),
                "quadrant": int(selection.quadrant[index]),
                "keep": bool(selection.keep[index]),
                "pruned": bool(selection.prune_tokens[index]),
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
            }
        )
    return rows


def plain_preparation(tmp_path, model_dir, dataset: Dataset, **options) -> Dataset:
    """Tokens and labels that plain `SFTTrainer` would train on."""
    args = SFTConfig(str(tmp_path / "plain"), **{**COMMON, **options})
    return SFTTrainer(model_dir, args, train_dataset=dataset).train_dataset


def assert_same_rows(result: Dataset, expected: Dataset) -> None:
    assert result.column_names == expected.column_names
    for name in result.column_names:
        values = expected[name][:]
        assert result[name][:] == (pytest.approx(values, rel=1e-12) if isinstance(values[0], float) else values), name


def assert_result(result: Dataset, expected: list[dict]) -> None:
    assert len(result) == len(expected)
    for name in ("quadrant", "keep", "input_ids", "labels"):
        assert result[name][:] == [row[name] for row in expected], name
    for name in ("perplexity", "entropy"):
        assert result[name][:] == pytest.approx([row[name] for row in expected], rel=1e-5)
    assert result["attention_mask"][:] == [[1] * len(ids) for ids in result["input_ids"]]


@pytest.mark.parametrize("token_pruning", ["mask", "drop"])
def test_decisions_are_those_of_the_method_on_naive_scores(tmp_path, model_dir, data, token_pruning):
    run(model_dir, data, tmp_path / "scored.parquet", "--token_pruning", token_pruning)
    rows = prompt_completion_rows(ROWS)
    prepared = plain_preparation(tmp_path, model_dir, Dataset.from_list(rows))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    expected = expected_rows(model, prepared, tokenizer, drop=token_pruning == "drop")
    result = read(tmp_path / "scored.parquet")
    assert_result(result, expected)
    assert sum(result["keep"]) == 27
    assert sum(row["pruned"] for row in expected) > 5
    assert result.select_columns(["prompt", "completion", "source"])[:] == Dataset.from_list(rows)[:]
    assert result["sample_id"][:] == list(range(ROWS))


def test_conversations_in_any_form_with_assistant_only_loss(tmp_path, model_dir):
    turns = [
        [
            {"from": "human" if n % 2 == 0 else "gpt", "value": row[key]}
            for n, key in enumerate(("prompt", "completion"))
        ]
        + [{"from": "human", "value": row["completion"]}, {"from": "gpt", "value": row["prompt"]}]
        for row in prompt_completion_rows(40)
    ]
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(json.dumps({"talk": talk, "sample_id": 7}) for talk in turns))
    output = tmp_path / "scored.parquet"
    run(model_dir, str(file), output, "--messages_column", "talk", "--assistant_only_loss", "true")
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"messages": [{"role": roles[t["from"]], "content": t["value"]} for t in talk]} for talk in turns]
    prepared = plain_preparation(tmp_path, model_dir, Dataset.from_list(messages), assistant_only_loss=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    result = read(output)
    assert_result(result, expected_rows(model, prepared, tokenizer))
    assert result["talk"][:] == turns
    assert result["sample_id"][:] == [7] * 40  # the data set's own column, as it is


def test_the_recipe_of_a_training_run_scores_its_data(tmp_path, model_dir, data):
    recipe = tmp_path / "recipe.yaml"
    options = {
        "model_name_or_path": model_dir, "dataset_name": data, "budget": "30x50", "use_cpu": True, "bf16": False,
        "packing": True, "use_peft": True, "eval_strategy": "steps", "eval_steps": 1, "scored_share": 0.5,
        "score_reuse_epochs": 2, "group_column": "source", "push_to_hub": True, "resume_from_checkpoint": True,
        "prompt_template": "{prompt} ?", "completion_template": "{completion}", "shuffle_dataset": True,
    }  # fmt: skip
    recipe.write_text(json.dumps(options))
    parsed = score.parse(
        ["--config", str(recipe), "--output", str(tmp_path / "scored.jsonl"), "--disable_tqdm", "true"]
    )
    one = score.DatasetScorer(*parsed.dataclasses)
    one.score()
    one.finish()
    result = read(tmp_path / "scored.jsonl")
    assert result["completion"][:] == [row["completion"] for row in prompt_completion_rows(ROWS)]
    ids = AutoTokenizer.from_pretrained(model_dir)(result[0]["prompt"] + " ?")["input_ids"]
    assert result[0]["input_ids"][: len(ids)] == ids
    assert sum(result["keep"]) == 27


def test_rows_without_an_answer_token_are_left_out_and_counted(tmp_path, model_dir, capsys):
    rows = prompt_completion_rows(30)
    rows[3]["prompt"] = "a" * 60
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    run(model_dir, str(file), tmp_path / "scored.parquet", "--max_length", "40")
    assert read(tmp_path / "scored.parquet")["sample_id"][:] == [n for n in range(30) if n != 3]
    printed = capsys.readouterr().out
    assert "29 rows scored" in printed
    assert "8 kept" in printed
    assert "1 rows without an answer token are left out" in printed


# Interruptions and processes


@pytest.fixture
def whole(tmp_path, model_dir, data) -> bytes:
    run(model_dir, data, tmp_path / "whole.parquet")
    return (tmp_path / "whole.parquet").read_bytes()


KILLED = """
import os, signal, sys
from qtuning_trl.scripts import score
from qtuning_trl.step.scoring import Scorer
calls, original = [], Scorer.forward
def forward(self, model, documents):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, model, documents)
Scorer.forward = forward
score.run(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path, model_dir, data, whole, monkeypatch):
    output = tmp_path / "scored.parquet"
    command = [sys.executable, "-c", KILLED, *arguments(model_dir, data, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not output.exists()
    done = sorted(path.name for path in Path(f"{output}.partial").glob("scores-*"))
    assert done == ["scores-000000.parquet", "scores-000001.parquet"]

    again = scorer(model_dir, data, output)
    scored = []
    original = again.trainer.scorer.forward
    forward = lambda model, docs: scored.extend(docs) or original(model, docs)  # noqa: E731
    monkeypatch.setattr(again.trainer.scorer, "forward", forward)
    again.score()
    again.finish()
    assert len(scored) == ROWS - 40
    assert output.read_bytes() == whole
    assert not Path(f"{output}.partial").exists()


@pytest.mark.parametrize("name", ["scored.parquet", "scored"])
def test_a_run_killed_when_its_result_was_there_is_finished_by_the_next_start(
    tmp_path, model_dir, data, monkeypatch, name
):
    output, partial = tmp_path / name, tmp_path / f"{name}.partial"
    with monkeypatch.context() as patch:
        patch.setattr(PartialScores, "remove", lambda self: None)
        run(model_dir, data, output, "--budget", "25x50")
    assert partial.is_dir()
    again = scorer(model_dir, data, output, "--budget", "50x70")
    assert again.partial.missing(again.parts) == []
    again.score()
    again.finish()
    assert sum(read(output)["keep"]) == 45
    assert list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*")) == []
    partial.mkdir()
    (partial / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="which exists: remove it"):  # not the folder of the run that wrote it
        run(model_dir, data, output)
    assert sum(read(output)["keep"]) == 45


def test_another_budget_needs_no_new_scores_but_another_model_or_length_does(tmp_path, model_dir, data):
    output = tmp_path / "scored.parquet"
    scorer(model_dir, data, output).score()
    run(model_dir, data, output, "--budget", "50x70")
    assert sum(read(output)["keep"]) == 45

    other = tmp_path / "other"
    scorer(model_dir, data, other).score()
    for option, value, name in (
        ("--max_length", "10", "tokens of the data set"),
        ("--rows_per_part", "30", "rows_per_part"),
        ("--dtype", "bfloat16", "dtype"),
    ):
        with pytest.raises(ValueError, match=f"holds scores of a run whose `{name}` was .* remove the folder to start"):
            scorer(model_dir, data, other, option, value)


def test_a_change_of_any_row_is_seen():
    rows = [{"input_ids": [1, 2, row], "labels": [-100, 2, row]} for row in range(2500)]
    whole = fingerprint(Dataset.from_list(rows))
    assert fingerprint(Dataset.from_list(rows).select(range(2500))) == whole
    rows[1]["labels"], rows[2]["labels"] = rows[2]["labels"], rows[1]["labels"]
    assert fingerprint(Dataset.from_list(rows)) != whole


def test_two_processes_write_what_one_writes(tmp_path, model_dir, data, whole):
    output = tmp_path / "scored.parquet"
    command = [
        sys.executable, "-m", "qtuning_trl", "score", *arguments(model_dir, data, output),
        "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("90 rows scored") == 1
    assert output.read_bytes() == whole


def test_no_process_writes_before_all_have_seen_what_is_missing(tmp_path, model_dir, data, monkeypatch):
    """One that looked later would see fewer missing parts, and share out others."""
    ours = scorer(model_dir, data, tmp_path / "scored.parquet")
    accelerator, written = ours.trainer.accelerator, []
    meet = accelerator.wait_for_everyone

    def wait_for_everyone():
        written.append(len(list(ours.partial.folder.glob("scores-*.parquet"))))
        meet()

    monkeypatch.setattr(accelerator, "wait_for_everyone", wait_for_everyone)
    ours.score()
    assert written == [0, ours.parts]


# The forward pass


@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_more_than_fits_is_halved_until_it_fits_and_no_row_is_lost(kind):
    lengths = [3, 9, 4, 12, 5, 7, 2, 8, 6, 10]
    documents = [Sample(np.zeros(n, int), np.full(n, 5), sample_id=n) for n in lengths]
    tried = []

    def forward(batch):
        cells = len(batch) * max(len(document.input_ids) for document in batch)
        tried.append(cells)
        if cells > 30:
            if kind == "CPU":
                torch.empty(2**60)
            raise torch.OutOfMemoryError("too much")
        values = torch.cat([torch.full((len(document.input_ids) - 1,), document.sample_id / 10) for document in batch])
        return -values, values

    size = BatchSize(None, torch.device("cuda"))
    scores = score_rows(documents, forward, size, padding_free=False)
    assert scores.column("row").to_pylist() == lengths
    np.testing.assert_allclose(scores.column("entropy").to_numpy(), [n / 10 for n in lengths], rtol=1e-6)
    assert scores.column("nll").to_pylist()[0] == pytest.approx([0.3, 0.3])
    assert max(tried) == 120
    tried.clear()
    score_rows(documents, forward, size, padding_free=False)
    assert max(tried) <= 30  # it has learnt what fits
    with pytest.raises(ValueError, match="a single row of 31 tokens does not fit into memory; lower `max_length`"):
        score_rows([Sample(np.zeros(31, int), np.full(31, 5), sample_id=0)], forward, size, False)


def test_batches_grow_on_a_gpu_while_they_fit_and_stay_where_they_are_given():
    lengths = [1000] * 200
    grown = BatchSize(None, torch.device("cuda"))
    assert [len(batch) for batch in grown.batches(lengths, False)] == [16, 32, 65, 87]
    given = BatchSize(8000, torch.device("cuda"))
    assert {len(batch) for batch in given.batches(lengths, False)} == {8}
    cpu = BatchSize(None, torch.device("cpu"))
    batches = list(cpu.batches(lengths, False))
    assert {len(batch) for batch in batches} == {4}
    assert sorted(index for batch in batches for index in batch) == list(range(200))


def test_a_model_that_gives_no_numbers_is_named_as_the_cause(tmp_path, model_dir, data):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="20 of 20 rows have a NaN or infinite score, row 0 first"):
        scorer(str(tmp_path / "broken"), data, tmp_path / "scored.parquet").score()


def perplexities(path) -> np.ndarray:
    return np.array(read(path)["perplexity"])


def test_an_adapter_changes_the_scores_to_those_of_the_merged_model(tmp_path, model_dir, data):
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "merged")
    run(model_dir, data, tmp_path / "base.parquet")
    run(model_dir, data, tmp_path / "adapter.parquet", "--adapter", str(tmp_path / "adapter"))
    run(str(tmp_path / "merged"), data, tmp_path / "merged.parquet")
    base, adapter, merged = (perplexities(tmp_path / f"{name}.parquet") for name in ("base", "adapter", "merged"))
    np.testing.assert_allclose(adapter, merged, rtol=1e-4)
    assert np.abs(adapter / base - 1).min() > 1e-3


def test_a_model_in_four_bits_scores_as_it_is(tmp_path, model_dir, data):
    run(model_dir, data, tmp_path / "four.parquet", "--load_in_4bit", "true")
    run(model_dir, data, tmp_path / "full.parquet")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantization)
    model.train()  # bitsandbytes repacks for inference otherwise
    prepared = plain_preparation(tmp_path, model_dir, Dataset.from_list(prompt_completion_rows(ROWS)[:10]))
    scores = [naive_scores(model, row["input_ids"], row["labels"]) for row in prepared]
    expected = [float(nll[mask].mean().exp()) for nll, _, mask in scores]
    np.testing.assert_allclose(perplexities(tmp_path / "four.parquet")[:10], expected, rtol=1e-3)
    difference = perplexities(tmp_path / "four.parquet") / perplexities(tmp_path / "full.parquet") - 1
    assert np.abs(difference).max() > 1e-2


# Selection


def test_pools_are_drawn_at_random_of_even_size_and_each_keeps_its_share():
    generator = np.random.default_rng(0)
    perplexity, entropy = generator.lognormal(size=100), generator.normal(size=100) ** 2
    decisions = select_rows(perplexity, entropy, 0.25, pool=30, seed=5)
    pools = np.array_split(np.random.default_rng(5).permutation(100), 4)
    for rows in map(np.sort, pools):
        selection = select_samples(torch.tensor(perplexity[rows]), torch.tensor(entropy[rows]), 0.25)
        assert decisions.keep[rows].tolist() == selection.keep.tolist()
        assert decisions.quadrant[rows].tolist() == selection.quadrant.tolist()
        assert decisions.prune_tokens[rows].tolist() == selection.prune_tokens.tolist()
    assert decisions.keep.sum() == 24
    everything = select_rows(perplexity, entropy, 0.25)
    assert (
        everything.keep.tolist() == select_samples(torch.tensor(perplexity), torch.tensor(entropy), 0.25).keep.tolist()
    )
    assert select_rows(perplexity, entropy, 0.25, pool=500).keep.tolist() == everything.keep.tolist()


# What comes out


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jsonl", []), ("folder", []), ("b", ["--output_format", "parquet"]), ("c", ["--output_format", "jsonl"])],
)
def test_every_format_holds_the_same_rows(tmp_path, model_dir, data, name, options):
    run(model_dir, data, tmp_path / "scored.parquet")
    run(model_dir, data, tmp_path / name, *options)
    kind = options[-1] if options else None
    path = shutil.copy(tmp_path / name, tmp_path / f"copy.{kind}") if kind else tmp_path / name
    assert_same_rows(read(path), read(tmp_path / "scored.parquet"))
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize("token_pruning", ["mask", "drop"])
def test_the_report_of_a_result_strikes_out_what_was_pruned(tmp_path, model_dir, data, capsys, token_pruning):
    path = tmp_path / "scored.parquet"
    run(model_dir, data, path, "--token_pruning", token_pruning)
    assert capsys.readouterr().out.endswith(f"Next:\n  qtuning report {path} --tokenizer {model_dir}\n")
    [shown] = report_data([open_run(path, model_dir)], ["a"])["runs"]
    result, rows = read(path), read(data)
    for number in range(5):
        name = "between" if number == 0 else f"q{number}"
        assert shown["quadrants"][name]["candidates"] == result["quadrant"][:].count(number)
    answers = [[*row["completion"], "</s>"] for row in rows]  # a token a character, and the end
    assert result["answer_tokens"][:] == list(map(len, answers))
    kept = [sum(label != -100 for label in row["labels"]) if row["keep"] else 0 for row in result]
    assert shown["facts"]["answer_tokens"]["ratio_reached"] == sum(kept) / sum(map(len, answers))
    pruned = 0
    for card in shown["cards"]:
        whole, left = answers[card["id"]], kept[card["id"]]
        all_tokens, struck = (
            re.findall(r"</s>|\S", "".join(piece for piece, kind in card["answer"] if kind in kinds))
            for kinds in ((0, 1), (1,))
        )
        if result[card["id"]]["keep"] and left < len(whole):
            pruned += 1
            assert card["tokens"] == [left, len(whole)]
            taken_out = token_pruning == "drop"
            assert (len(struck), len(all_tokens)) == ((0, left) if taken_out else (len(whole) - left, len(whole)))
        else:
            assert (card["tokens"], all_tokens, struck) == (None, whole, [])
    assert pruned > 5


def test_only_kept_rows_with_the_columns_another_trainer_takes(tmp_path, model_dir, data):
    run(model_dir, data, tmp_path / "all.parquet")
    kept = read(tmp_path / "all.parquet").filter(lambda row: row["keep"])
    expected = {
        "all": kept.column_names,
        "tokens": ["input_ids", "attention_mask", "labels"],
        "original": ["prompt", "completion", "source"],
    }
    for columns, names in expected.items():
        output = tmp_path / f"{columns}.jsonl"
        run(model_dir, data, output, "--kept_only", "true", "--columns", columns)
        assert_same_rows(read(output), kept.select_columns(names))


def test_a_folder_of_the_three_columns_goes_through_a_padding_collator_as_it_is(tmp_path, model_dir, data):
    """How LLaMA-Factory reads `tokenized_path`: all columns go into a subclass of this collator."""
    run(model_dir, data, tmp_path / "kept", "--kept_only", "--columns", "tokens")
    rows = [dict(row) for row in load_from_disk(str(tmp_path / "kept"))]
    batch = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir))([dict(row) for row in rows])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row, labels, mask in zip(rows, batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert [label for label in labels if label != -100] == [label for label in row["labels"] if label != -100]
        assert sum(mask) == len(row["input_ids"])


def test_plain_sft_trainer_trains_on_the_result_and_counts_exactly_the_kept_tokens(tmp_path, model_dir, data):
    run(model_dir, data, tmp_path / "scored.parquet", "--kept_only", "true")
    dataset = read(tmp_path / "scored.parquet")
    counted = []

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
            counted.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    options = {**COMMON, "max_steps": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 13}
    options["shuffle_dataset"] = False
    trainer = Counting(
        model_dir, SFTConfig(str(tmp_path / "run"), **options), train_dataset=dataset, peft_config=lora()
    )
    assert trainer.train_dataset["labels"][:] == dataset["labels"][:]
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    answers = [sum(label != -100 for label in labels[1:]) for labels in dataset["labels"]]
    prepared = plain_preparation(tmp_path, model_dir, Dataset.from_list(prompt_completion_rows(ROWS)))
    in_full = [sum(label != -100 for label in labels[1:]) for labels in prepared["labels"]]
    assert sum(tokens for tokens, _ in counted) in {sum(answers) - size for size in answers}  # 26 of the 27 rows
    assert all(tokens == items for tokens, items in counted)
    assert sum(answers) < sum(in_full[row] for row in dataset["sample_id"])
    changed = [name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)]
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_failed_push_leaves_the_result_and_says_so(tmp_path, model_dir, data):
    one = scorer(model_dir, data, tmp_path / "scored.parquet", "--hub_dataset_id", "nobody/scored")
    one.score()
    with pytest.raises(ValueError, match=r"`hub_dataset_id` is 'nobody/scored', .* the result is in .*scored.parquet"):
        one.finish()
    assert len(read(tmp_path / "scored.parquet")) == ROWS
    assert not (tmp_path / "scored.parquet.partial").exists()


# Memory


def test_memory_does_not_grow_with_the_rows_beyond_their_statistics(tmp_path):
    """Anonymous memory of a process that selects, prunes and writes 5,000 rows, and 50,000."""
    script = Path(__file__).parent / "score_memory.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peaks = []
    for rows in (5_000, 50_000):
        command = [sys.executable, str(script), str(tmp_path / str(rows)), str(rows)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(int(done.stdout))
    # The two statistics take 16 bytes a row, and selecting by them some 200; rows that pile up would take thousands.
    assert peaks[1] - peaks[0] < 1000 * 45_000, peaks


# Refusals


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["score", *argv])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if "error:" in line)
    return line


def test_bad_options_end_in_one_line_before_anything_is_launched(tmp_path, model_dir, data, capsys):
    (tmp_path / "there.parquet").write_text("something")
    foreign = tmp_path / "mine.parquet.partial"
    foreign.mkdir()
    (foreign / "thesis.docx").write_text("something")
    out = ["--output", str(tmp_path / "scored.parquet"), *CPU]
    both = ["--model", model_dir, "--dataset", data]
    cases = [
        (["--dataset", data, *out], "`model_name_or_path` is not given"),
        (["--model", "./nowhere", "--dataset", data, *out], "`model_name_or_path` is './nowhere': no such folder"),
        (["--model", model_dir, *out], "`dataset_name` is not given"),
        (["--model", model_dir, "--dataset", "nowhere.jsonl", *out], "`dataset_name` is 'nowhere.jsonl': no such file"),
        ([*both, *CPU], "`output` is not given: name a file that ends in .parquet or .jsonl, or a folder"),
        ([*both, "--output", str(tmp_path / "there.parquet"), *CPU], "which exists: remove it, or give another name."),
        ([*both, "--output", str(tmp_path / "mine.parquet"), *CPU], "is no folder of an interrupted `qtuning score`"),
        ([*both, *out, "--output_format", "jsonl"], "they disagree, so give only one of the two."),
        ([*both, *out, "--columns", "tokens"], "`columns` is 'tokens' and `kept_only` is false: add `--kept_only`"),
        ([*both, *out, "--sample_pruner", "random"], "`qtuning score` selects as Q-Tuning does"),
        ([*both, *out, "--pool", "1"], "`pool` is 1: give at least 2 rows to compare"),
        ([*both, *out, "--rows_per_part", "0"], "`rows_per_part` is 0: give a number of rows, such as 1024."),
        ([*both, *out, "--dataset_streaming", "true"], "`dataset_streaming` is true: set it to false"),
        ([*both, *out, "--budget", "lots"], "`budget` is 'lots': give samples x tokens in per cent"),
        ([*both, *out, "--sampel_ratio", "0.5"], "did you mean `--sample_ratio`?"),
        ([*both, *out, "--pool", "many"], "`qtuning score --help` explains each option."),
    ]
    for argv, expected in cases:
        assert expected in refusal(capsys, *argv), argv
    assert (tmp_path / "there.parquet").read_text() == "something"


def test_what_cannot_be_loaded_is_named(tmp_path, model_dir, data):
    output = tmp_path / "scored.parquet"
    with pytest.raises(ValueError, match="`model_name_or_path` is 'nobody/nothing', which cannot be loaded"):
        scorer("nobody/nothing", data, output)
    with pytest.raises(ValueError, match="`adapter` is 'nobody/nothing', which cannot be loaded"):
        scorer(model_dir, data, output, "--adapter", "nobody/nothing")
    with pytest.raises(
        ValueError, match=r"`dataset_train_split` is 'dev': choose one of the splits there are \(train\)"
    ):
        scorer(model_dir, data, output, "--dataset_train_split", "dev")
    with pytest.raises(ValueError, match="`prompt_template` names the column 'question'"):
        scorer(model_dir, data, output, "--prompt_template", "{question}", "--completion_template", "{completion}")


def test_scores_without_their_settings_are_not_gone_on_with(tmp_path):
    folder = tmp_path / "scored.partial"
    partial = PartialScores(folder, {"model": "a"})
    partial.open()
    (folder / "scores-000000.parquet").write_bytes(b"")
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds scores without their settings.json: remove the folder"):
        partial.open()
