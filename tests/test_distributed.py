"""Two processes for real: `accelerate launch` with gloo on the CPU, LoRA, every selection scope."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from test_pruners import weighted_gradient
from test_trainer import COMMON, Recorder, lora, losses
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from two_processes import IN_LOSS, SCENARIOS, WEIGHTED

from qtuning_trl import load_record
from qtuning_trl.method import budget_size
from qtuning_trl.records.samples import RecordReader
from qtuning_trl.report.report import report_data

TESTS = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("distributed")  # one worker: the processes are launched once


def launch(script: str, output: Path, tokenizer_dir: str, **environment: str) -> None:
    """Run a script of this folder by `accelerate launch` in two processes on the CPU."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(TESTS / script), str(output), tokenizer_dir,
    ]  # fmt: skip
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir) -> Path:
    output = tmp_path_factory.mktemp("two_processes")
    tiny_llama(5).save_pretrained(output / "reference")
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(output / "reference")
    launch("two_processes.py", output, tokenizer_dir)
    return output


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_gradient_equals_plain_sft_on_the_survivors_of_both(runs, tokenizer, tmp_path, name):
    run = torch.load(runs / f"{name}.pt")
    facts = json.loads((runs / f"{name}.json").read_text())
    # A row that weighs twice as much is one that is there twice.
    weights = [of_tokens[0] for of_tokens in run["weights"] if of_tokens]
    assert set(weights) == ({1.0, 2.0} if name == "infobatch" else {1.0})
    rows = run["survivors"]
    if name == "infobatch":
        rows = [row for row, weight in zip(rows, weights, strict=True) for _ in range(int(weight))]
    options = {**COMMON, "max_length": None, "max_steps": 1, "gradient_accumulation_steps": 1}
    options["per_device_train_batch_size"] = len(rows)
    plain = SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    reference = Recorder().attach(plain)
    plain.train()
    scale, loss = 1.0, losses(plain)[0]
    if name == "infobatch":  # both gradients are clipped, and the loss is divided by the tokens of the survivors alone
        loss *= count_labels(rows) / count_labels(run["survivors"])
        scale = norm(run["gradient"]) / norm(reference.gradients[0])
    for parameter, expected in reference.gradients[0].items():
        torch.testing.assert_close(run["gradient"][parameter], scale * expected, rtol=1e-5, atol=2e-6, msg=parameter)
    assert facts["loss"] == pytest.approx(loss, rel=1e-5)


def count_labels(rows: list[dict]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return torch.cat([part.flatten() for part in gradient.values()]).norm().item()


def test_tokens_chosen_inside_the_loss_give_the_gradient_of_masked_ones(runs):
    masked, ours = (torch.load(runs / f"{name}.pt")["gradient"] for name in ("hardest", "in_loss"))
    for parameter, expected in masked.items():
        torch.testing.assert_close(ours[parameter], expected, rtol=1e-4, atol=1e-6, msg=parameter)
    masked, ours = (json.loads((runs / f"{name}.json").read_text()) for name in ("hardest", "in_loss"))
    assert ours["loss"] == pytest.approx(masked["loss"], rel=1e-5)
    assert ours["summary"]["answer_tokens"] == masked["summary"]["answer_tokens"]


def test_gradient_is_that_of_the_weighted_tokens_of_both(runs, tokenizer, tmp_path):
    run = torch.load(runs / "importance.pt")
    data = Dataset.from_list(run["survivors"])
    model = SFTTrainer(
        tiny_llama(), SFTConfig(str(tmp_path), **COMMON), train_dataset=data, processing_class=tokenizer,
        peft_config=lora(),
    ).model  # fmt: skip
    weights = [of_row for of_row in run["weights"] if of_row]
    assert len({weight for of_row in weights for weight in of_row}) > len(weights)
    gradient = weighted_gradient(run["survivors"], weights, model)
    ours = torch.cat([of_parameter.flatten() for of_parameter in run["gradient"].values()])
    expected = torch.cat([gradient[name].flatten() for name in run["gradient"]])
    # The trainer's is clipped: only its direction is compared.
    torch.testing.assert_close(ours / ours.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_budgets_are_exact_over_both_processes(runs):
    facts = {name: json.loads((runs / f"{name}.json").read_text()) for name in {**SCENARIOS, **IN_LOSS, **WEIGHTED}}
    pool = 32  # two processes x 4 micro-batches x 4 rows
    expected = {
        "process": 16,
        "micro_batch": 16,
        "all_processes": 9,
        "few_survivors": 1,
        "padding_free": 16,
        "drop": 16,
        "random": 9,
        "rho1": 16,
        "infobatch": 16,
    }
    for name, kept in expected.items():
        summary = facts[name]["summary"]
        assert (summary["candidates"], summary["kept"], summary["num_processes"]) == (pool, kept, 2), name
        assert sum(count for count, _ in facts[name]["counts"]) == kept, name
    # One budget for the answer tokens of both processes.
    for name in ("pool", "pool_q2", "in_loss_pool", "importance"):
        tokens = facts[name]["summary"]["answer_tokens"]
        assert tokens["kept"] == budget_size(0.25, tokens["candidates"]), name
    packed = facts["packed"]["summary"]
    assert packed["kept"] == packed["candidates"] // 2


def test_both_processes_run_as_many_micro_batches_and_share_the_survivors(runs):
    for name in SCENARIOS:
        (first, batches), (second, other_batches) = json.loads((runs / f"{name}.json").read_text())["counts"]
        assert batches == other_batches
        if name == "all_processes":
            assert abs(first - second) <= 1
        if name == "few_survivors":
            assert (first, second, batches) == (1, 0, 1)


def test_keeping_everything_is_plain_sft_bit_for_bit(runs):
    assert [json.loads((runs / f"keep_everything_{rank}.json").read_text()) for rank in (0, 1)] == [True, True]


@pytest.mark.parametrize("name", ["resume", "resume_rivals"])
def test_a_resumed_run_ends_bit_equal(runs, name):
    assert [json.loads((runs / f"{name}_{rank}.json").read_text()) for rank in (0, 1)] == [True, True]


def test_reused_scores_are_known_to_both_processes_and_survive_a_resume(runs):
    first, second = (json.loads((runs / f"reuse_{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["known"] == list(range(40))  # each process drew about half of them
    assert first["stale"] == 40  # the whole second epoch
    assert first["equal"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("random", "rho1", "hardest")])
def test_the_record_of_both_processes_says_what_the_summary_says(runs, name):
    summary = json.loads((runs / f"{name}.json").read_text())["summary"]
    frame = load_record(runs / name, as_frame=True)
    assert set(frame.process) == {0, 1}
    assert not frame.duplicated(["step", "process", "sample_id"]).any()
    assert (len(frame), frame.kept.sum()) == (summary["candidates"], summary["kept"])
    assert frame.answer_tokens.sum() == summary["answer_tokens"]["candidates"]
    assert frame.kept_tokens.sum() == summary["answer_tokens"]["kept"]
    assert (frame.reason == "fill").sum() == summary["filled"]
    comparisons = frame[["process", "perplexity_low", "perplexity_high", "entropy_low", "entropy_high"]]
    compared = {"all_processes": 1, "micro_batch": 8}.get(SCENARIOS[name].get("selection_scope", "process"), 2)
    assert len(comparisons.drop(columns="process").drop_duplicates()) == compared

    [shown] = report_data([RecordReader(runs / name)], [name])["runs"]
    for fact in ("candidates", "kept", "answer_tokens", "quadrants", "filled", "num_processes"):
        assert shown["facts"][fact] == summary[fact]
    assert "not recorded" not in json.dumps(shown)


def test_a_resumed_record_of_two_processes_has_neither_gap_nor_double(runs):
    frame = load_record(runs / "resume", as_frame=True)
    assert frame.groupby(["process", "step"]).size().to_dict() == {
        (process, step): size for process in (0, 1) for step, size in ((1, 16), (2, 4), (3, 16))
    }
