"""Causal models of many kinds: soft-capped logits, sliding windows, experts, ALiBi, state spaces."""

import pytest
import torch
from test_lean_scoring import naive
from test_trainer import COMMON, losses
from transformers import AutoConfig, AutoModelForCausalLM

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.step.sample import split_documents

LLAMA_LIKE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "cohere": {**LLAMA_LIKE, "logit_scale": 0.25},
    "gemma2": {**LLAMA_LIKE, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {**LLAMA_LIKE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_oss": {**LLAMA_LIKE, "sliding_window": 8, "num_local_experts": 4},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4},
    "nemotron": LLAMA_LIKE,
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_scores_are_those_of_full_logits(tmp_path, tokenizer, prompt_completion, name):
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **special, **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # as initialised, all answers are alike
    args = QTuningSFTConfig(str(tmp_path), **COMMON, budget="25x50", max_steps=1, survivor_checkpointing=False)
    trainer = QTuningSFTTrainer(model, args, train_dataset=prompt_completion, processing_class=tokenizer)

    documents = [document for row in trainer.train_dataset for document in split_documents(row)][:8]
    found = trainer.scorer.score(trainer.model, [documents], 64, trainer.state).values
    rows = [torch.from_numpy(document.input_ids) for document in documents]
    model.eval()
    sizes = [len(row) - 1 for row in rows]
    for ours, full in zip((found.nll, found.entropy), naive(model, rows), strict=True):
        sign = -1 if ours is found.nll else 1
        for index, (document, values) in enumerate(zip(documents, full.split(sizes), strict=True)):
            expected = sign * values[torch.from_numpy(document.labels[1:] != -100)]
            torch.testing.assert_close(ours[index][found.answer_mask[index]].double(), expected, rtol=1e-5, atol=1e-5)

    trainer.train()
    assert losses(trainer)[0] > 0
