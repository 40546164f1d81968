"""What makes a scoring forward cheaper on a CPU: the same values, and everything as it was afterwards."""

import inspect

import pytest
import torch
import trl.trainer.utils as trl_head
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from test_trainer import PACKED, PADDING_FREE, make_trainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
)
from transformers import Qwen3ForCausalLM as Qwen3
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qtuning_trl.host import attention, head, modes
from qtuning_trl.host.lora import adds_in_place, lora_in_place
from qtuning_trl.step.sample import split_documents

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def with_lora(model: torch.nn.Module, seed: int = 1, **options):
    """The model with an adapter that changes it: LoRA's B is zero before training."""
    trl_head.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


def naive(model, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood and entropy of all tokens but the first of each row, by full logits, a row at a time."""
    log_probs, entropies = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(row[None]).logits[0, :-1].double().log_softmax(-1)
            log_probs.append(logits.gather(-1, row[1:, None]).squeeze(-1))
            entropies.append(-(logits.exp() * logits).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


def rows_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 45, (length,), generator=generator) for length in lengths]


def batch_of(rows: list[torch.Tensor], flattened: bool) -> dict[str, torch.Tensor]:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flattened)
    return collator([{"input_ids": row.tolist()} for row in rows])


@pytest.mark.parametrize("make_model", [tiny_llama, lambda: Qwen3(Qwen3Config(**SIZES))], ids=["llama", "qwen3"])
@pytest.mark.parametrize("flattened", [True, False])
def test_lean_scoring_gives_the_values_of_full_logits(make_model, flattened):
    model, rows = with_lora(make_model()), rows_of(9, 9, 7, 2, 12)
    assert attention.can_attend_by_document(model, CPU)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = naive(model, rows)
    batch = batch_of(rows, flattened)
    with modes.lean_scoring(model, CPU, flattened):
        found = head.per_token_values(model, batch)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_everything_is_as_it_was_after_lean_scoring():
    model = with_lora(tiny_llama())
    model.train()
    before = lora.Linear.forward, trl_head._ChunkedLogProbFunction, trl_head._use_triton
    with modes.lean_scoring(model, CPU, flattened=True):
        assert model.config._attn_implementation == attention.BY_DOCUMENT
        assert not model.training
    with pytest.raises(RuntimeError), modes.lean_scoring(model, CPU, flattened=True):
        raise RuntimeError
    assert (lora.Linear.forward, trl_head._ChunkedLogProbFunction, trl_head._use_triton) == before
    assert model.config._attn_implementation == "sdpa"
    assert model.training


# LoRA


def layers_of(model) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def test_lora_is_added_in_place_where_it_is_plain():
    layer = layers_of(with_lora(tiny_llama()))[0]
    x = torch.randn(2, 3, 64)
    assert adds_in_place(layer, x)
    with torch.no_grad():
        expected = layer(x)
        with lora_in_place():
            found = layer(x)
    assert not torch.equal(expected, layer.base_layer(x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_lora_that_is_more_than_a_product_stays_pefts():
    x = torch.randn(2, 64)
    layer = layers_of(with_lora(tiny_llama()))[0]
    assert not adds_in_place(layer, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not adds_in_place(layer, x)
    layer.train()
    assert not adds_in_place(layer, x), "dropout is on in training mode"
    dora, biased = (layers_of(with_lora(tiny_llama(), **{option: True}))[0] for option in ("use_dora", "lora_bias"))
    assert not adds_in_place(dora, x)
    assert not adds_in_place(biased, x)
    model = with_lora(tiny_llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    assert not adds_in_place(layers_of(model)[0], x)
    model.base_model.set_adapter("second")
    assert adds_in_place(layers_of(model)[0].eval(), x)
    with model.disable_adapter():
        assert not adds_in_place(layers_of(model)[0], x)


def test_a_disabled_adapter_is_left_out_while_scoring():
    model, rows = with_lora(tiny_llama()), rows_of(6, 5)
    batch = batch_of(rows, flattened=True)
    with model.disable_adapter():
        expected = naive(model, rows)[0]
        with modes.lean_scoring(model, CPU, flattened=True):
            found = head.per_token_values(model, batch)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# Attention


def test_attention_is_by_document_only_where_it_is_plain():
    sliding = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4))
    stateful = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1))
    assert not attention.can_attend_by_document(sliding, CPU)
    assert not attention.can_attend_by_document(stateful, CPU)
    assert attention.attends_only(sliding)
    assert not attention.attends_only(stateful)
    linear = AutoConfig.for_model("minimax", **SIZES, layer_types=["linear_attention", "full_attention"])
    assert not attention.attends_only(AutoModelForCausalLM.from_config(linear))
    model = tiny_llama()
    assert not attention.can_attend_by_document(model, torch.device("cuda"))
    model.set_attn_implementation("eager")
    assert not attention.can_attend_by_document(model, CPU)


@pytest.mark.parametrize("options", [{}, PADDING_FREE, PACKED], ids=str)
def test_a_trainer_on_a_cpu_scores_without_padding(tmp_path, tokenizer, prompt_completion, options):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", **options)
    assert trainer.scorer.collator.padding_free
    assert trainer.data_collator.padding_free == bool(options), "training is not touched"
    documents = [document for row in trainer.train_dataset for document in split_documents(row)][:8]
    found = trainer.scorer.score(trainer.model, [documents], 64, trainer.state).values
    rows = [torch.from_numpy(document.input_ids) for document in documents]
    trainer.model.eval()
    log_probs = naive(trainer.model, rows)[0].split([len(row) - 1 for row in rows])
    for index, document in enumerate(documents):
        expected = -log_probs[index][torch.from_numpy(document.labels[1:] != -100)]
        torch.testing.assert_close(found.nll[index][found.answer_mask[index]], expected, rtol=1e-5, atol=1e-5)


# What is leant on


def test_peft_computes_lora_as_we_do():
    source = inspect.getsource(lora.Linear.forward)
    for line in (
        "result = self.base_layer(x, *args, **kwargs)",
        "for active_adapter in self.active_adapters:",
        "if active_adapter not in self.lora_variant:",
        "result = result + lora_B(lora_A(dropout(x))) * scaling",
    ):
        assert line in source, f"peft.tuners.lora.Linear no longer holds `{line}`: check host.lora.lora_in_place."


def test_trls_head_names_its_outputs_last():
    assert list(inspect.signature(trl_head._ChunkedLogProbFunction.forward).parameters)[-1] == "outputs", (
        "the last argument of TRL's chunked head is no longer `outputs`: adapt host.head.head_without_top1."
    )
    model = tiny_llama()
    trl_head.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), head.head_without_top1():
        assert model(input_ids=ids, labels=ids, fused_lm_head=True).is_top1 is None
    assert model(input_ids=ids, labels=ids, fused_lm_head=True).is_top1 is not None


def test_transformers_makes_no_mask_for_an_attention_it_does_not_know():
    model, masks = tiny_llama(), []
    with torch.no_grad(), attention.attention_by_document(model):
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        model(torch.tensor([[4, 5, 6]]), cu_seq_lens_q=torch.tensor([0, 1, 3]))
    assert masks == [None], "transformers makes a mask now: adapt host.attention.sdpa_by_document."
