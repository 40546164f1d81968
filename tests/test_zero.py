"""DeepSpeed for real: ZeRO-2 and ZeRO-3 on two gloo processes give the runs that whole parameters give."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from test_distributed import launch
from test_trainer import COMMON
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

ALL = {"selection_scope": "all_processes"}
SCENARIOS: dict[str, dict] = {
    # One step of plain gradient descent: the weights show the gradient.
    "gradient": {"budget": "30x50", **ALL, "max_steps": 1, "optim": "sgd", "learning_rate": 1},
    "lora": {"budget": "50x50", "dropout": 0.0, "token_pruning": "drop"},
    "few_survivors": {"sample_ratio": 0.01, **ALL},
    "second_models": {
        "budget": "50x50",
        "scoring_model": "reference",
        "token_pruner": "rho1",
        "reference_model": "reference",
    },
    "uneven": {"budget": "50x50", "scoring_batch_tokens": 48, "score_reuse_epochs": 2, "max_steps": 4},
    "keep_everything": {"budget": "100x100"},
    "plain": {},
}
STAGES = {"zero2": 2, "zero3": 3}
pytestmark = pytest.mark.xdist_group("zero")  # one worker: the processes are launched once


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir) -> Path:
    pytest.importorskip("deepspeed")
    output = tmp_path_factory.mktemp("zero")
    for name, seed in (("model", 0), ("reference", 5)):
        tiny_llama(seed).save_pretrained(output / name)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(output / name)
    launch("zero.py", output, tokenizer_dir, ACCELERATE_USE_CPU="false", DS_ACCELERATOR="cpu")
    return output


@pytest.fixture(params=STAGES)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("name", [*SCENARIOS, "resume", "resume_resumed"])
def test_zero_changes_neither_decisions_nor_training(runs, kind, name):
    zero, ddp = (torch.load(runs / folder / f"{name}.pt") for folder in (kind, "ddp"))
    assert (zero["stage"], ddp["stage"]) == (STAGES[kind], None)
    assert (zero["partitioned"], ddp["partitioned"]) == (kind == "zero3", False)
    assert zero["survivors"] == ddp["survivors"]
    if name != "plain":
        own_to_a_run = {"seconds", "peak_memory", "config"}
        for key in zero["summary"].keys() - own_to_a_run:
            assert zero["summary"][key] == ddp["summary"][key], key
    assert zero["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
    assert zero["weights"].keys() == ddp["weights"].keys()
    for key, value in zero["weights"].items():
        torch.testing.assert_close(value, ddp["weights"][key], rtol=0, atol=2e-4)


def test_gradient_equals_plain_sft_on_the_survivors_in_one_process(runs, kind, tokenizer, tmp_path):
    zero = torch.load(runs / kind / "gradient.pt")
    rows = zero["survivors"]
    assert len(rows) == zero["summary"]["kept"] == 9  # 30% of two processes x 4 micro-batches x 4 rows
    options = COMMON | {"max_steps": 1, "optim": "sgd", "learning_rate": 1, "gradient_accumulation_steps": 1}
    plain = SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path), **options | {"per_device_train_batch_size": len(rows)}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    plain.train()
    for name, value in plain.model.named_parameters():
        torch.testing.assert_close(zero["weights"][name], value, rtol=0, atol=2e-6, msg=name)
    assert (plain.model.lm_head.weight - tiny_llama().lm_head.weight).abs().max() > 1e-2


def test_a_process_with_less_to_score_runs_as_many_forwards(runs, kind):
    """Gathering a shard takes all processes: were one to stop early, the other would wait for ever."""
    ddp, zero = (torch.load(runs / folder / "uneven.pt")["scored"] for folder in ("ddp", kind))
    assert ddp[0] != ddp[1]
    assert zero == [max(ddp)] * 2


def test_keeping_everything_is_plain_sft_bit_for_bit(runs, kind):
    plain, ours = (torch.load(runs / kind / f"{name}.pt")["weights"] for name in ("plain", "keep_everything"))
    assert [key for key in plain if not torch.equal(plain[key], ours[key])] == []


def test_a_resumed_run_ends_bit_equal(runs, kind):
    whole, resumed = (torch.load(runs / kind / f"{name}.pt")["weights"] for name in ("resume", "resume_resumed"))
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_copy_of_a_partitioned_model_is_refused(runs):
    assert (runs / "zero3" / "refused.txt").read_text() == (
        "`token_pruner` is 'of_the_base', which compares with the model before fine-tuning, and ZeRO-3 partitions the "
        "model as it is loaded: train an adapter, or use ZeRO-2."
    )
