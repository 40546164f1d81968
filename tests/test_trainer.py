"""The trainer against plain `SFTTrainer`: the same run when it keeps all, the same gradients on the same survivors."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import prompt_completion_rows, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.method import select_samples, token_keep_mask, token_scores
from qtuning_trl.records.run import SUMMARY_NAME
from qtuning_trl.step.sample import loss_weights, split_documents, whole_answer_lengths

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "num_train_epochs": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
}
PADDING_FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 48}


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")


def make_trainer(tmp_path, tokenizer, dataset, trainer_class=QTuningSFTTrainer, dropout=None, model=None, **options):
    options = {**COMMON, **options}
    config_class = QTuningSFTConfig if trainer_class is QTuningSFTTrainer else SFTConfig
    return trainer_class(
        tiny_llama() if model is None else model,
        config_class(str(tmp_path), **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if dropout is None else lora(dropout),
        **({"eval_dataset": dataset.select(range(8))} if options.get("eval_strategy") else {}),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Recorder(TrainerCallback):
    """Keeps what each optimizer step trained on and the gradient it got."""

    def __init__(self):
        self.batches: list[list[dict]] = []
        self.weights: list[list[list[float]]] = []  # of the losses of each survivor's answer tokens
        self.whole: list[int] = []  # answer tokens of all survivors before any was pruned
        self.gradients: list[dict[str, torch.Tensor]] = []

    def attach(self, trainer):
        trainer.add_callback(self)
        self.trainer = trainer
        original = trainer.get_batch_samples

        def get_batch_samples(*args):
            batches, num_items = original(*args)
            self.batches.append([batch for batch in batches if batch["input_ids"].numel()])
            survivors = [document for batch in batches for document in batch.get("survivors", ())]
            self.weights.append([loss_weights([document]).tolist() for document in survivors])
            self.whole.append(sum(whole_answer_lengths(survivors)))
            return batches, num_items

        trainer.get_batch_samples = get_batch_samples
        return self

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = self.trainer.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


def rows_of(batch: dict) -> list[dict]:
    """The collated micro-batch as the rows a plain `SFTTrainer` would be given."""
    if "attention_mask" in batch:
        return [
            {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        ]
    ends = batch["cu_seq_lens_q"].tolist()[1:-1]
    pieces = zip(batch["input_ids"][0].tensor_split(ends), batch["labels"][0].tensor_split(ends), strict=True)
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pieces]


# Keep everything: the very run of SFTTrainer


@pytest.mark.parametrize(
    ("options", "dropout"),
    [
        ({}, None),
        ({}, 0.1),
        (PADDING_FREE, None),
        (PACKED, None),
        ({"loss_type": "dft"}, None),
        ({"gradient_checkpointing": False, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}, 0.1),
        ({"eval_strategy": "steps", "eval_steps": 1}, 0.1),
    ],
)
def test_keeping_everything_is_plain_sft_bit_for_bit(tmp_path, tokenizer, prompt_completion, options, dropout):
    plain = make_trainer(tmp_path / "a", tokenizer, prompt_completion, SFTTrainer, dropout, **options)
    plain.train()
    ours = make_trainer(tmp_path / "b", tokenizer, prompt_completion, dropout=dropout, budget="100x100", **options)
    ours.train()
    assert losses(ours) == losses(plain)
    assert len(losses(ours)) >= 2
    assert_same_weights(ours, plain)
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "num_tokens", "entropy", "mean_token_accuracy")
    assert [[entry.get(key) for key in keys] for entry in ours.state.log_history] == [
        [entry.get(key) for key in keys] for entry in plain.state.log_history
    ]
    assert ours.state.total_flos == plain.state.total_flos
    summary = ours.summary()
    assert summary["candidates"] == summary["kept"] == 80


# The gradient on the survivors


@pytest.mark.parametrize("token_pruning", ["mask", "drop"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        PADDING_FREE,
        PACKED,
        {"loss_type": "dft"},
        {"selection_scope": "micro_batch"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "padded",
)
def test_gradient_equals_plain_sft_on_the_survivors(tmp_path, tokenizer, prompt_completion, options, token_pruning):
    ours = make_trainer(
        tmp_path / "a", tokenizer, prompt_completion, dropout=0.0, budget="50x50", max_steps=1,
        token_pruning=token_pruning, **options,
    )  # fmt: skip
    seen = Recorder().attach(ours)
    ours.train()
    survivors = [row for batch in seen.batches[0] for row in rows_of(batch)]
    assert len(survivors) == ours.summary()["kept"]

    # A plain SFTTrainer, fed nothing but the survivors in one padded batch.
    plain_options = {
        name: value
        for name, value in {**COMMON, **options}.items()
        if name not in ("padding_free", "packing", "selection_scope")
    }
    plain_options |= {"max_length": None, "per_device_train_batch_size": len(survivors), "max_steps": 1}
    plain_options["gradient_accumulation_steps"] = 1
    plain = SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path / "b"), **plain_options),
        train_dataset=Dataset.from_list(survivors),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    reference = Recorder().attach(plain)
    plain.train()
    for name, expected in reference.gradients[0].items():
        torch.testing.assert_close(seen.gradients[0][name], expected, rtol=1e-5, atol=2e-6, msg=name)
    assert losses(ours)[0] == pytest.approx(losses(plain)[0], rel=1e-5)


def test_gradient_is_bit_equal_on_the_same_micro_batches_with_lora_dropout_on(tmp_path, tokenizer, prompt_completion):
    """Fed the survivors in the same micro-batches, a plain run draws the same dropout and gets the same gradient."""
    ours = make_trainer(tmp_path / "a", tokenizer, prompt_completion, dropout=0.2, budget="50x50", max_steps=1)
    seen = Recorder().attach(ours)
    torch.manual_seed(7)
    ours.train()
    plain = make_trainer(tmp_path / "b", tokenizer, prompt_completion, SFTTrainer, 0.2, max_steps=1)
    reference = Recorder().attach(plain)
    step = seen.batches[0]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
    empty = {"input_ids": torch.empty((1, 0), dtype=torch.int64)}
    draw = plain.get_batch_samples

    def get_batch_samples(*args):
        draw(*args)  # what the loader draws from the random state is drawn here too
        return [dict(batch) for batch in step] + [empty] * (4 - len(step)), items

    plain.get_batch_samples = get_batch_samples
    original = plain.training_step

    def training_step(model, inputs, num_items):
        return original(model, inputs, num_items) if inputs["input_ids"].numel() else torch.zeros(())

    plain.training_step = training_step
    torch.manual_seed(7)
    plain.train()
    assert len(step) == 2
    for name, expected in reference.gradients[0].items():
        assert torch.equal(seen.gradients[0][name], expected), name


# Budgets, steps and records


@pytest.mark.parametrize("scope", ["process", "micro_batch", "all_processes"])
@pytest.mark.parametrize("ratio", [0.0625, 0.125, 0.3, 0.5, 0.7, 1.0])
def test_kept_counts_are_exact_also_in_the_ragged_last_step(tmp_path, tokenizer, scope, ratio):
    dataset = Dataset.from_list(prompt_completion_rows(37))  # 16 + 16 + 5 candidates; micro-batches of 4, 4, ..., 1
    trainer = make_trainer(
        tmp_path, tokenizer, dataset, sample_ratio=ratio, selection_scope=scope, num_train_epochs=1
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    pools = [[4] * 4, [4] * 4, [4, 1]] if scope == "micro_batch" else [[16], [16], [5]]
    assert [entry["qtuning/pool_samples"] for entry in logs] == [16, 16, 5]
    expected = [sum(max(1, math.floor(ratio * n + 1e-9)) for n in step) for step in pools]
    assert [entry["qtuning/kept_samples"] for entry in logs] == expected
    for entry in logs:
        corners = [entry[f"qtuning/{name}"] for name in ("q1", "q2", "q3", "q4", "between")]
        assert sum(corners) == entry["qtuning/pool_samples"]
        kept = entry["qtuning/q2"] + entry["qtuning/q4"] + entry["qtuning/filled"] - entry["qtuning/trimmed"]
        assert kept == entry["qtuning/kept_samples"]


@pytest.mark.parametrize("rows", [32, 37, 40])
def test_steps_schedule_and_logging_are_those_of_the_full_run(tmp_path, tokenizer, rows):
    dataset = Dataset.from_list(prompt_completion_rows(rows))
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "logging_steps": 2}
    plain = make_trainer(tmp_path / "a", tokenizer, dataset, SFTTrainer, **options)
    ours = make_trainer(tmp_path / "b", tokenizer, dataset, **options)
    plain.train()
    ours.train()
    assert ours.state.global_step == plain.state.global_step
    keys = ("step", "epoch", "learning_rate")
    assert [[entry.get(key) for key in keys] for entry in ours.state.log_history] == [
        [entry.get(key) for key in keys] for entry in plain.state.log_history
    ]


def test_answer_tokens_are_pruned_to_the_budget_in_q2_alone(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, budget="50x50", protect_special_tokens=False, max_steps=1
    )
    seen = Recorder().attach(trainer)
    trainer.train()
    whole = {}
    for row in trainer.train_dataset:
        whole[tuple(row["input_ids"])] = sum(label != -100 for label in row["labels"][1:])
    rows = [row for batch in seen.batches[0] for row in rows_of(batch)]
    kept = [(whole[tuple(row["input_ids"])], sum(x != -100 for x in row["labels"][1:])) for row in rows]
    pruned = [pair for pair in kept if pair[0] != pair[1]]
    assert all(after == max(1, before // 2) for before, after in pruned)
    entry = trainer.state.log_history[0]
    in_q2 = sum(q == 2 and k for q, k in zip(trainer.last_pool["quadrant"], trainer.last_pool["kept"], strict=True))
    assert in_q2 <= len(pruned) < len(kept)
    assert entry["qtuning/kept_answer_tokens"] == sum(after for _, after in kept)


def test_special_tokens_stay_in_the_loss_by_default(tmp_path, tokenizer, prompt_completion):
    for protect in (True, False):
        trainer = make_trainer(
            tmp_path, tokenizer, prompt_completion, budget="50x10", protect_special_tokens=protect, max_steps=1
        )
        seen = Recorder().attach(trainer)
        trainer.train()
        ends = [row["labels"][-1] for batch in seen.batches[0] for row in rows_of(batch)]
        assert all(end == tokenizer.eos_token_id for end in ends) == protect


def test_dropping_shortens_the_answer_and_never_the_prompt(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, budget="50x50", token_pruning="drop", max_steps=1
    )  # fmt: skip
    seen = Recorder().attach(trainer)
    trainer.train()
    prompts = {
        tuple(i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
        for row in trainer.train_dataset
    }
    lengths = {len(row["input_ids"]) for row in trainer.train_dataset}
    rows = [row for batch in seen.batches[0] for row in rows_of(batch)]
    for row in rows:
        prompt = tuple(i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
        assert prompt in prompts
    assert sum(len(row["input_ids"]) for row in rows) < 8 * max(lengths)


def test_pool_factor_draws_more_candidates_and_trains_on_a_full_step(tmp_path, tokenizer):
    dataset = Dataset.from_list(prompt_completion_rows(128))
    trainer = make_trainer(tmp_path, tokenizer, dataset, budget="12.5x100", pool_factor=8, num_train_epochs=1)
    seen = Recorder().attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    entry = trainer.state.log_history[0]
    assert (entry["qtuning/pool_samples"], entry["qtuning/kept_samples"]) == (128, 16)
    assert [len(batch["input_ids"]) for batch in seen.batches[0]] == [4, 4, 4, 4]


def test_survivors_fill_as_few_micro_batches_as_they_need(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="50x100", max_steps=2)
    seen = Recorder().attach(trainer)
    trainer.train()
    assert [[len(batch["input_ids"]) for batch in step] for step in seen.batches] == [[4, 4], [4, 4]]


def test_selection_is_deterministic_and_draws_no_random_number(tmp_path, tokenizer, prompt_completion):
    pools = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, max_steps=2)
        state = {}
        original = trainer._prune_pool

        def prune_pool(*args, original=original, state=state):
            state["before"] = torch.get_rng_state()
            result = original(*args)
            state["after"] = torch.get_rng_state()
            return result

        trainer._prune_pool = prune_pool
        trainer.train()
        assert torch.equal(state["before"], state["after"])
        pools.append(trainer.last_pool)
    assert pools[0] == pools[1]


@pytest.mark.parametrize("options", [{}, PADDING_FREE, PACKED], ids=["padded", "padding-free", "packed"])
def test_scores_and_decisions_equal_those_of_naive_full_logits(tmp_path, tokenizer, prompt_completion, options):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", max_steps=1, **options)
    seen = Recorder().attach(trainer)
    trainer.train()
    pool = trainer.last_pool
    model = tiny_llama().eval()  # the weights the first step is scored with
    drawn = {doc.sample_id: doc for row in trainer.train_dataset for doc in split_documents(row)}
    protected = torch.tensor(sorted(trainer.selector.protected_ids))
    perplexities, entropies, kept_rows = [], [], []
    for sample_id in pool["sample_id"]:
        ids, labels = (torch.from_numpy(getattr(drawn[sample_id], name)) for name in ("input_ids", "labels"))
        answer = labels[1:] != -100
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        nll = -log_probs.gather(1, ids[1:, None]).squeeze(1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        perplexities.append(nll[answer].mean().exp())
        entropies.append(entropy[answer].mean())
        scores = token_scores(nll.exp()[None], answer[None], 0.5)
        keep = token_keep_mask(scores, answer[None], 0.5, torch.isin(ids[1:], protected)[None])[0]
        kept_rows.append([labels[0].item(), *torch.where(keep, labels[1:], -100).tolist()])
    assert pool["perplexity"] == pytest.approx([float(value) for value in perplexities], rel=1e-5)
    assert pool["entropy"] == pytest.approx([float(value) for value in entropies], rel=1e-5)

    selection = select_samples(torch.stack(perplexities), torch.stack(entropies), 0.25)
    assert pool["kept"] == selection.keep.tolist()
    expected = []
    for index in selection.keep.nonzero().flatten().tolist():
        document = drawn[pool["sample_id"][index]]
        labels = kept_rows[index] if selection.prune_tokens[index] else document.labels.tolist()
        expected.append((document.input_ids.tolist(), labels))
    trained = [
        (doc.input_ids.tolist(), doc.labels.tolist())
        for batch in seen.batches[0]
        for row in rows_of(batch)
        for doc in split_documents(row)
    ]
    # A padding-free batch marks the first token of each document as none to predict.
    strip = lambda pairs: sorted((ids, labels[1:]) for ids, labels in pairs)  # noqa: E731
    assert strip(trained) == strip(expected)


# Interruption


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, tokenizer, prompt_completion):
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 3, "budget": "50x50", "group_column": "source"}
    whole = make_trainer(tmp_path / "whole", tokenizer, prompt_completion, dropout=0.1, **options)
    whole.train()
    broken = make_trainer(tmp_path / "broken", tokenizer, prompt_completion, dropout=0.1, **options)
    broken.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", tokenizer, prompt_completion, dropout=0.1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same_weights(resumed, whole)
    assert resumed.last_pool == whole.last_pool
    a, b = resumed.summary(), whole.summary()
    for key in ("steps", "candidates", "kept", "answer_tokens", "quadrants", "filled", "trimmed", "groups"):
        assert a[key] == b[key], key
    assert a["seconds"]["training"] > 0


def test_a_checkpoint_of_plain_sft_can_be_resumed(tmp_path, tokenizer, prompt_completion):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, tokenizer, prompt_completion, SFTTrainer, max_steps=2, **options).train()
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.summary()["steps"] == 2


def test_a_diverged_model_stops_the_run_and_leaves_the_last_checkpoint_whole(tmp_path, tokenizer, prompt_completion):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data[5] = float("nan")

    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, save_strategy="steps", save_steps=2)
    trainer.add_callback(Diverge())
    with pytest.raises(FloatingPointError, match=r"Step 4: \d+ of 16 candidates .* lower `learning_rate` than 0.01"):
        trainer.train()
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 6
    assert all(value.isfinite().all() for value in weights(resumed).values())


# What a run leaves behind


def test_summary_and_model_card_state_the_runs_facts(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, dropout=0.0, budget="25x50", group_column="source",
        save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    summary = json.loads(Path(tmp_path, SUMMARY_NAME).read_text())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert summary["steps"] == len(logs) == 6
    assert summary["candidates"] == sum(entry["qtuning/pool_samples"] for entry in logs) == 80
    assert summary["kept"] == sum(entry["qtuning/kept_samples"] for entry in logs) == 2 * (4 + 4 + 2)
    assert summary["sample_ratio_reached"] == 0.25
    assert summary["answer_tokens"]["kept"] == sum(entry["qtuning/kept_answer_tokens"] for entry in logs)
    assert sum(group["candidates"] for group in summary["groups"].values()) == 80
    assert sum(group["kept"] for group in summary["groups"].values()) == summary["kept"]
    assert set(summary["seconds"]) == {"scoring", "selection", "collation", "training", "total"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert summary["peak_memory"]["bytes"] > 2**20
    assert summary["config"]["sample_ratio"] == 0.25
    assert summary["versions"]["trl"]

    trainer.create_model_card(model_name="tiny")
    card = Path(tmp_path, "README.md").read_text()
    assert "arxiv" in card.lower()
    assert "2509.23873" in card
    assert "80 samples" in card
    assert card.count("## Q-Tuning") == 1
    assert "{{" not in card.split("## Citations")[0]


def test_metrics_are_logged_under_qtuning(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", logging_steps=3)
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = {
        "pool_samples", "kept_samples", "pool_answer_tokens", "kept_answer_tokens", "q1", "q2", "q3", "q4", "between",
        "filled", *(f"filled_{name}" for name in ("q1", "q2", "q3", "q4", "between")),
        "trimmed", "unscorable_samples", "scored_samples", "stale_scores", "stale_share",
        "perplexity_low", "perplexity_high", "entropy_low", "entropy_high", "pool_nll", "pool_entropy",
        "seconds_selecting", "seconds_training",
        *(f"kept_{what}_{share}" for what in ("samples", "answer_tokens") for share in ("asked", "share")),
    }  # fmt: skip
    assert {key.removeprefix("qtuning/") for key in entry if key.startswith("qtuning/")} == expected
    assert entry["qtuning/pool_samples"] == pytest.approx((16 + 16 + 8) / 3)
    assert 0 < entry["qtuning/perplexity_low"] <= entry["qtuning/perplexity_high"]
