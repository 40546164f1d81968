"""Every kind of input and option that works with `SFTTrainer` works here, and bad input is refused in one sentence."""

import copy

import pytest
import torch
from conftest import prompt_completion_rows, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_trainer import COMMON, PADDING_FREE, Recorder, assert_same_weights, make_trainer, rows_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DefaultDataCollator
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer

ROWS = prompt_completion_rows(32, seed=3)
DATASETS = {
    "text": [{"text": row["prompt"] + row["completion"]} for row in ROWS],
    "prompt_completion": ROWS,
    "messages": [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": row["completion"][::-1]},
            ]
        }
        for row in ROWS
    ],
    "conversational_prompt_completion": [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in ROWS
    ],
    "tokenized": [
        {"input_ids": [1, *range(4, 10 + i % 7), 2], "labels": [-100, *range(4, 10 + i % 7), 2]} for i in range(32)
    ],
}


@pytest.mark.parametrize("layout", ["padded", "padding_free", "bfd", "bfd_split"])
@pytest.mark.parametrize("kind", list(DATASETS))
def test_every_kind_of_data_in_every_layout(tmp_path, tokenizer, kind, layout):
    layouts = {
        "padded": {},
        "padding_free": PADDING_FREE,
        "bfd": {"packing": True, "max_length": 40},
        "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
    }
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(DATASETS[kind]), budget="25x50", **layouts[layout])
    trainer.train()
    summary = trainer.summary()
    assert summary["steps"] == trainer.state.global_step >= 2
    if layout != "bfd_split":
        assert summary["candidates"] == 64  # two epochs over 32 samples, packed or not
        assert summary["kept"] == trainer.state.global_step * summary["kept"] // trainer.state.global_step
    assert 0 < summary["kept"] <= summary["candidates"] // 4
    assert 0 < summary["answer_tokens"]["kept"] < summary["answer_tokens"]["candidates"]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}])
def test_assistant_only_loss_prunes_assistant_tokens_alone(tmp_path, tokenizer, layout):
    dataset = Dataset.from_list(DATASETS["messages"])
    trainer = make_trainer(
        tmp_path, tokenizer, dataset, budget="50x50", assistant_only_loss=True, max_steps=1, **layout
    )
    seen = Recorder().attach(trainer)
    answers = {tuple(row["input_ids"]): row["labels"] for row in trainer.train_dataset}
    trainer.train()
    rows = [row for batch in seen.batches[0] for row in rows_of(batch)]
    assert len(rows) == trainer.summary()["kept"]
    if not layout:
        for row in rows:
            whole = answers[tuple(row["input_ids"])]
            assert all(label in (-100, was) for label, was in zip(row["labels"], whole, strict=True))


def test_completion_only_loss_switched_off_makes_the_prompt_an_answer_too(tmp_path, tokenizer, prompt_completion):
    tokens = {}
    for completion_only in (True, False):
        trainer = make_trainer(
            tmp_path, tokenizer, prompt_completion, completion_only_loss=completion_only, max_steps=1
        )
        trainer.train()
        tokens[completion_only] = trainer.summary()["answer_tokens"]["candidates"]
    assert tokens[False] > tokens[True]


@pytest.mark.parametrize("options", [{"gradient_checkpointing": False}, {"loss_type": "dft"}, {"bf16": True}])
def test_options_of_the_host_work(tmp_path, tokenizer, prompt_completion, options):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, budget="25x50", **options)
    trainer.train()
    assert trainer.summary()["kept"] == 2 * (4 + 4 + 2)


@pytest.mark.parametrize(("budget", "kept"), [("50x50", [4, 1, 4, 1, 4]), ("100x100", [8, 2, 8, 2, 8])])
def test_epochs_of_a_stream_end_with_a_step_of_what_is_left(tmp_path, tokenizer, budget, kept):
    """As those of a data set do; the host would add its gradient to the next epoch's first step."""
    dataset = Dataset.from_list(prompt_completion_rows(10))
    options = {"max_steps": 5, "budget": budget, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    loaded = make_trainer(tmp_path / "a", tokenizer, dataset, **options)
    loaded.train()
    streamed = make_trainer(tmp_path / "b", tokenizer, dataset.to_iterable_dataset(), **options)
    streamed.train()
    assert_same_weights(streamed, loaded)
    for trainer in (loaded, streamed):
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["qtuning/kept_samples"] for entry in logs] == kept


def test_streaming(tmp_path, tokenizer):
    """A stream is pruned like the dataset behind it: the same order gives the same weights."""
    dataset = Dataset.from_list(ROWS)
    options = {"max_steps": 4, "budget": "50x50", "train_sampling_strategy": "sequential", "group_column": "source"}
    loaded = make_trainer(tmp_path / "a", tokenizer, dataset, **options)
    loaded.train()
    streamed = make_trainer(tmp_path / "b", tokenizer, dataset.to_iterable_dataset(), **options)
    streamed.train()
    # All but the ids: a stream has no row numbers.
    for name in loaded.last_pool.keys() - {"sample_id"}:
        assert streamed.last_pool[name] == loaded.last_pool[name], name
    assert streamed.summary()["groups"] == loaded.summary()["groups"]
    pairs = zip(streamed.model.parameters(), loaded.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_dataset_of_tensors_is_recorded_and_scored_as_one_of_lists(tmp_path, tokenizer, form):
    """Its row numbers come as tensors too: they must name a sample, not an object."""
    dataset = Dataset.from_list(DATASETS["tokenized"])
    options = {"budget": "50x50", "score_reuse_steps": 100}
    lists = make_trainer(tmp_path / "a", tokenizer, dataset, **options)
    lists.train()
    tensors = make_trainer(tmp_path / "b", tokenizer, dataset.with_format(form), **options)
    tensors.train()
    assert_same_weights(tensors, lists)
    assert set(tensors.scorer.cache.scores) == set(range(32))
    assert tensors.summary()["stale_scores"] == lists.summary()["stale_scores"] > 0


def test_an_evaluation_set_called_train_is_none_that_is_trained_on(tmp_path, tokenizer, prompt_completion):
    rows = [*ROWS[:4], {"prompt": "a", "completion": None}]
    trainer = QTuningSFTTrainer(
        tiny_llama(),
        QTuningSFTConfig(str(tmp_path), **COMMON),
        train_dataset=prompt_completion,
        eval_dataset={"train": Dataset.from_list(ROWS[:4]), "val": Dataset.from_list(ROWS[4:8])},
        processing_class=tokenizer,
    )
    assert len(trainer.data_check.answer_lengths) == len(prompt_completion)
    assert "eval_train_loss" in trainer.evaluate({"train": Dataset.from_list(rows)})  # the void row is left out


def test_a_step_of_dummies_needs_no_pad_token_but_the_collators(tmp_path, tokenizer, prompt_completion):
    """TRL gives the tokenizer one only where it makes the collator."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    trainer = QTuningSFTTrainer(
        tiny_llama(),
        QTuningSFTConfig(str(tmp_path), **COMMON, budget="50x100", sample_pruner="column", score_column="marked"),
        train_dataset=prompt_completion.add_column("marked", [False] * len(prompt_completion)),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
    )
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert trainer.summary()["kept"] == 0


def test_evaluation_during_training_sees_every_row_and_changes_nothing(tmp_path, tokenizer, prompt_completion):
    plain = make_trainer(tmp_path / "a", tokenizer, prompt_completion)
    plain.train()
    evaluated = make_trainer(tmp_path / "b", tokenizer, prompt_completion, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert len([entry for entry in evaluated.state.log_history if "eval_loss" in entry]) == 6
    assert not any("qtuning/" in key for e in evaluated.state.log_history if "eval_loss" in e for key in e)
    pairs = zip(evaluated.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("nested", [False, True])
def test_qlora_trains_for_real_on_cpu(tmp_path, tokenizer, model_dir, prompt_completion, nested):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    trainer = QTuningSFTTrainer(
        model_dir,
        QTuningSFTConfig(str(tmp_path), **{**COMMON, "bf16": True}, budget="25x50", max_steps=2),
        train_dataset=prompt_completion,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        quantization_config=quantization,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    seen = Recorder().attach(trainer)
    trainer.train()
    # Scoring must not leave bitsandbytes' inference format behind, which lets no gradient through to lower layers.
    assert all("lora_A" in n or g.abs().sum() > 0 for n, g in seen.gradients[0].items())
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer.summary()["kept"] == 8
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())


def test_a_saved_adapter_loads_and_gives_the_trained_model(tmp_path, tokenizer, model_dir, prompt_completion):
    trainer = QTuningSFTTrainer(
        model_dir,
        QTuningSFTConfig(str(tmp_path), **COMMON, budget="25x50"),
        train_dataset=prompt_completion,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)


def test_rows_without_an_answer_token_are_never_candidates(tmp_path, tokenizer):
    rows = DATASETS["tokenized"][:12] + [{"input_ids": [1, 5, 6], "labels": [-100] * 3}] * 4
    trainer = make_trainer(
        tmp_path, tokenizer, Dataset.from_list(rows), max_length=None, sample_ratio=0.5, num_train_epochs=1
    )
    trainer.train()
    summary = trainer.summary()
    assert (summary["candidates"], summary["unscorable"], summary["kept"]) == (12, 4, 6)


def test_a_step_without_any_candidate_trains_on_nothing(tmp_path, tokenizer):
    rows = [{"input_ids": [1, 5, 6], "labels": [-100] * 3}] * 16 + DATASETS["tokenized"][:16]
    trainer = make_trainer(
        tmp_path, tokenizer, Dataset.from_list(rows), max_length=None, train_sampling_strategy="sequential",
        num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    kept = [entry["qtuning/kept_samples"] for entry in trainer.state.log_history if "loss" in entry]
    assert kept == [0, 2]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_rows_cut_off_by_max_length_are_reported(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "a" * (40 if i < 5 else 4), "completion": "abc"} for i in range(32)]
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), max_length=16)
    assert len(trainer.train_dataset) == 27
    assert "cuts off the whole answer of 5 of 32 rows" in caplog.text


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_ratio": 0.0}, "`sample_ratio` is 0.0: give a share greater than 0 and at most 1"),
        ({"sample_ratio": -0.5}, "`sample_ratio` is -0.5"),
        ({"sample_ratio": float("nan")}, "`sample_ratio` is nan"),
        ({"token_ratio": 12.5}, r"`token_ratio` is 12.5: .* \(did you mean 0.125\?\)"),
        ({"neighbor_weight": 2.0}, "`neighbor_weight` is 2.0: give a weight from 0 to 1"),
        ({"token_pruning": "delete"}, "`token_pruning` is 'delete': choose one of 'mask', 'drop', 'loss'"),
        ({"selection_scope": "node"}, "`selection_scope` is 'node': choose one of 'process', 'all_processes'"),
        ({"pool_factor": 0}, "`pool_factor` is 0: give a whole number of at least 1"),
        ({"pool_factor": 4, "sample_ratio": 0.5}, "their product must not exceed 1.* set `pool_factor` to 2 or less"),
        ({"scoring_batch_tokens": 0}, "`scoring_batch_tokens` is 0"),
        ({"budget": "a lot"}, "`budget` is 'a lot': give samples x tokens in per cent, such as '12.5x50'"),
        ({"budget": "0x50"}, "`budget` is '0x50': give more than 0 per cent"),
        ({"budget": "25x50", "sample_ratio": 0.5}, "`budget` is '25x50' and `sample_ratio` is 0.5: they disagree"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert str(error.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` is 'wrapped': choose 'bfd'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1: set it to 0"),
        ({"packing": True, "pool_factor": 2}, "`pool_factor` is 2 and `packing` is on"),
        ({"packing": True, "group_column": "source"}, "`group_column` is 'source' and `packing` is on"),
        ({"group_column": "kind"}, r"`group_column` is 'kind': choose one of .*\(prompt, completion, source\)"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`accelerator_config.dispatch_batches` is true"),
        ({"accelerator_config": {"split_batches": True}}, "`accelerator_config.split_batches` is true"),
        ({"max_length": 2}, "`max_length` is 2: it cuts off the whole answer of each of the 40 rows"),
    ],
)
def test_unsupported_options_are_refused_before_training(tmp_path, tokenizer, prompt_completion, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, prompt_completion, **options)


def build(tmp_path, tokenizer, dataset, model=None, **kwargs):
    options = {**COMMON, **kwargs.pop("options", {})}
    return QTuningSFTTrainer(
        model or tiny_llama(), QTuningSFTConfig(str(tmp_path), **options), train_dataset=dataset,
        processing_class=tokenizer, **kwargs,
    )  # fmt: skip


def test_unusable_datasets_are_refused_before_training(tmp_path, tokenizer, prompt_completion):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(tmp_path, tokenizer, prompt_completion.select([]))
    with pytest.raises(ValueError, match=r"`max_steps` is -1 and `train_dataset` is streamed: set `max_steps`"):
        build(tmp_path, tokenizer, prompt_completion.to_iterable_dataset())
    named = prompt_completion.add_column("sample_id", [f"row {index}" for index in range(40)])
    for dataset in (named, named.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"has the column 'sample_id'.*: rename it, or give signed"):
            build(tmp_path, tokenizer, dataset, options={"max_steps": 1})
    with pytest.raises(ValueError, match="`train_dataset` has the column 'image'"):
        build(tmp_path, tokenizer, prompt_completion.add_column("image", [None] * 40))
    unlabelled = Dataset.from_list([{"input_ids": [1, 5, 6], "labels": [-100] * 3}] * 8)
    with pytest.raises(ValueError, match="`train_dataset` has no row with an answer token"):
        build(tmp_path, tokenizer, unlabelled, options={"max_length": None})


@pytest.mark.parametrize("given", [True, False])
def test_conversations_need_a_chat_template(tmp_path, tokenizer, model_dir, given):
    dataset = Dataset.from_list(DATASETS["messages"])
    tokenizer.chat_template = None
    if given:
        with pytest.raises(ValueError, match="has no chat template: set `chat_template_path`"):
            build(tmp_path, tokenizer, dataset)
        return
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="has no chat template: set `chat_template_path`"):
        build(tmp_path, None, dataset, model=str(path))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    build(tmp_path, None, dataset, model=str(path), options={"chat_template_path": str(template)})


def test_unsupported_arguments_are_refused(tmp_path, tokenizer, prompt_completion):
    with pytest.raises(ValueError, match="`compute_loss_func` is set"):
        build(tmp_path, tokenizer, prompt_completion, compute_loss_func=lambda *a, **k: 0)
    with pytest.raises(ValueError, match="`data_collator` is a DefaultDataCollator"):
        build(tmp_path, tokenizer, prompt_completion, data_collator=DefaultDataCollator())
    with pytest.raises(ValueError, match="`peft_config` is a PromptTuningConfig: use LoRA"):
        build(
            tmp_path, tokenizer, prompt_completion,
            peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        )  # fmt: skip
    with pytest.raises(TypeError, match="`args` is a SFTConfig: give a QTuningSFTConfig"):
        QTuningSFTTrainer(
            tiny_llama(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=prompt_completion,
            processing_class=tokenizer,
        )  # fmt: skip
