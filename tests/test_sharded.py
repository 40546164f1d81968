"""FSDP for real: parameters sharded over two gloo processes give the runs that whole parameters give."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from sharded import SCENARIOS
from test_distributed import launch
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.xdist_group("sharded")  # one worker: the processes are launched once


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir) -> Path:
    output = tmp_path_factory.mktemp("sharded")
    tiny_llama(5).save_pretrained(output / "reference")
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(output / "reference")
    launch("sharded.py", output, tokenizer_dir)
    return output


@pytest.mark.parametrize("name", [*SCENARIOS, "resume", "resume_resumed"])
def test_sharded_parameters_change_neither_decisions_nor_training(runs, name):
    fsdp, ddp = torch.load(runs / "fsdp" / f"{name}.pt"), torch.load(runs / "ddp" / f"{name}.pt")
    whole_bytes = name == "qlora"  # 4-bit weights in bytes, which FSDP leaves whole
    assert (fsdp["sharded"], ddp["sharded"]) == (not whole_bytes, False)
    own_to_a_run = {"seconds", "peak_memory", "config"}
    for key in fsdp["summary"].keys() - own_to_a_run:
        assert fsdp["summary"][key] == ddp["summary"][key], key
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
    assert fsdp["weights"].keys() == ddp["weights"].keys()
    rounding = 1e-3 if name.startswith("qlora") else 1e-4  # TRL trains adapters of 4-bit weights in bfloat16
    for key, value in fsdp["weights"].items():
        torch.testing.assert_close(value, ddp["weights"][key], rtol=0, atol=rounding)


def test_four_bit_weights_train_alike_sharded_and_whole(runs):
    whole, sharded = (torch.load(runs / "fsdp" / f"{name}.pt")["weights"] for name in ("qlora", "qlora_sharded"))
    assert [key for key in whole if not torch.equal(whole[key], sharded[key])] == []


@pytest.mark.parametrize("name", ["full", "uneven"])
def test_a_process_with_less_to_score_runs_as_many_forwards(runs, name):
    """Gathering a shard takes all processes: were one to stop early, the other would wait for ever."""
    ddp, fsdp = (torch.load(runs / kind / f"{name}.pt")["scored"] for kind in ("ddp", "fsdp"))
    assert ddp[0] != ddp[1]
    assert fsdp == [max(ddp)] * 2


def test_keeping_everything_is_plain_sft_bit_for_bit(runs):
    plain, ours = (torch.load(runs / "fsdp" / f"{name}.pt")["weights"] for name in ("plain", "keep_everything"))
    assert [key for key in plain if not torch.equal(plain[key], ours[key])] == []


def test_a_resumed_run_ends_bit_equal(runs):
    whole, resumed = (torch.load(runs / "fsdp" / f"{name}.pt")["weights"] for name in ("resume", "resume_resumed"))
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
