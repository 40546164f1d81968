"""What only a GPU can show: TRL's Triton kernels, bfloat16, real memory, CUDA's 4-bit layers. Skipped without one."""

import gc
import json

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.records.run import SUMMARY_NAME
from qtuning_trl.step.sample import split_documents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

COMMON = {
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
    "bf16": False,
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def config(tmp_path, **options) -> QTuningSFTConfig:
    return QTuningSFTConfig(str(tmp_path), **{**COMMON, **options})


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 48}], ids=["padded", "packed"])
def test_scores_equal_those_of_full_logits(tmp_path, tokenizer, prompt_completion, options):
    args = config(tmp_path, budget="25x50", max_steps=1, **options)
    trainer = QTuningSFTTrainer(tiny_llama(), args, train_dataset=prompt_completion, processing_class=tokenizer)
    trainer.train()
    model = tiny_llama().to(trainer.model.device).eval()
    drawn = {doc.sample_id: doc for row in trainer.train_dataset for doc in split_documents(row)}
    for sample_id, perplexity, entropy in zip(
        *(trainer.last_pool[name] for name in ("sample_id", "perplexity", "entropy")), strict=True
    ):
        ids, labels = (
            torch.from_numpy(getattr(drawn[sample_id], name)).to(model.device) for name in ("input_ids", "labels")
        )
        answer = labels[1:] != -100
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)[answer]
        nll = -log_probs.gather(1, ids[1:][answer, None])
        assert perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-3)
        assert entropy == pytest.approx(float(-(log_probs.exp() * log_probs).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_keeping_everything_has_the_losses_of_plain_sft(tmp_path, tokenizer, prompt_completion, bf16):
    losses = []
    for trainer_class, config_class, budget in (
        (SFTTrainer, SFTConfig, {}),
        (QTuningSFTTrainer, QTuningSFTConfig, {"budget": "100x100"}),
    ):
        args = config_class(str(tmp_path), **{**COMMON, **budget, "bf16": bf16, "logging_steps": 1})
        trainer = trainer_class(tiny_llama(), args, train_dataset=prompt_completion, processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("token_pruning", ["mask", "drop"])
def test_a_lora_run_in_bfloat16_meets_its_budget(tmp_path, tokenizer, prompt_completion, token_pruning):
    args = config(tmp_path, budget="25x50", bf16=True, token_pruning=token_pruning)
    trainer = QTuningSFTTrainer(
        tiny_llama(), args, train_dataset=prompt_completion, processing_class=tokenizer, peft_config=LORA
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    summary = json.loads((tmp_path / SUMMARY_NAME).read_text())
    assert (summary["candidates"], summary["kept"]) == (32, 8)
    assert summary["peak_memory"]["device"] == torch.cuda.get_device_name()


def test_qlora_scores_and_trains_on_4_bit_layers(tmp_path, model_dir, prompt_completion):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    args = config(tmp_path, budget="25x50", bf16=True)
    trainer = QTuningSFTTrainer(
        model_dir, args, train_dataset=prompt_completion, peft_config=LORA, quantization_config=quantization
    )
    packed = {name: value.clone() for name, value in trainer.model.named_parameters() if value.dtype == torch.uint8}
    assert packed
    trainer.train()
    assert all(torch.equal(value, packed[name]) for name, value in trainer.model.named_parameters() if name in packed)
    assert json.loads((tmp_path / SUMMARY_NAME).read_text())["kept"] == 8


def test_a_pruned_run_peaks_below_a_full_one_and_scoring_does_not_set_the_peak(tmp_path, tokenizer):
    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32768, max_position_embeddings=1024, **shape))

    rows = [{"input_ids": list(range(10, 522)), "labels": [-100] * 256 + list(range(266, 522))} for _ in range(64)]
    peaks = {}
    for name, options in {
        "full": {"budget": "100x100"},
        "small": {"budget": "12.5x50", "micro_batches": "small", "token_pruning": "drop"},
        "small, scored a row at a time": {
            "budget": "12.5x50", "micro_batches": "small", "token_pruning": "drop", "scoring_batch_tokens": 1,
        },
    }.items():  # fmt: skip
        args = config(tmp_path, bf16=True, max_length=None, per_device_train_batch_size=8, **options)
        trainer = QTuningSFTTrainer(
            model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=LORA
        )
        gc.collect()  # trainer and callbacks hold each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        trainer.train()
        peaks[name] = torch.cuda.max_memory_allocated() - start
        del trainer
    assert peaks["small"] <= 0.5 * peaks["full"], peaks
    assert peaks["small"] <= 1.05 * peaks["small, scored a row at a time"], peaks
