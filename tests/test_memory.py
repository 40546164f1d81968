"""Survivors without gradient checkpointing: as far as memory allows, with the same gradients, even after it ran out."""

import pytest
import torch
import yaml
from test_trainer import COMMON, Recorder, assert_same_weights, lora, losses, make_trainer
from transformers import BitsAndBytesConfig

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.host.head import lean_lm_head
from qtuning_trl.scripts.sft import make_parser
from qtuning_trl.step import memory
from qtuning_trl.step.memory import EVERYTHING, Line, MemoryBudget, Needs
from qtuning_trl.step.micro_batches import split_survivors

STEP = {
    "budget": "25x50", "max_steps": 1, "gradient_checkpointing": True, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "free_tokens", "parts"),
    [
        ([3, 9, 5], 9, [([1], False), ([2], False), ([0], False)]),
        ([3, 9, 5], 10, [([1], False), ([2, 0], False)]),
        ([3, 9, 5], 18, [([1, 2], False), ([0], False)]),
        ([3, 9, 5], 4, [([1, 2], True), ([0], False)]),
        ([3, 9, 5], 2, [([1, 2], True), ([0], True)]),
        ([3, 9, 5], 0, [([1, 2], True), ([0], True)]),
        ([3, 9, 5], EVERYTHING, [([1, 2], False), ([0], False)]),
        # Six rows in three slots: one at a time is too many, so the longest are checkpointed, two at a time.
        ([6, 6, 6, 6, 6, 6], 6, [([0, 1], True), ([2, 3], True), ([4, 5], True)]),
        ([6, 6, 6, 6, 3, 3], 6, [([0, 1], True), ([2, 3], True), ([4, 5], False)]),
    ],
)
def test_survivors_go_without_checkpointing_as_far_as_memory_allows(lengths, free_tokens, parts):
    assert split_survivors(lengths, 2, 3, free_tokens) == parts


def run(tmp_path, tokenizer, data, dropout=0.0, **options):
    """One step; the trainer, what it recorded, and how often the first layer ran."""
    trainer = make_trainer(tmp_path, tokenizer, data, dropout=dropout, **{**STEP, **options})
    seen, calls = Recorder().attach(trainer), []
    layers = trainer.model.get_base_model().model.layers

    def count(*_args):
        if trainer.memory.needs is not None or not trainer.memory.counts:  # not while needs are counted
            calls.append(trainer.model.training)

    layers[0].input_layernorm.register_forward_hook(count)
    trainer.train()
    assert all(layer.gradient_checkpointing for layer in layers)
    return trainer, seen, sum(calls)


@pytest.mark.parametrize(
    ("options", "rows", "forwards"),
    [
        ({"survivor_checkpointing": True}, [8], 2),
        ({"survivor_checkpointing": False}, [8], 1),
        ({"survivor_checkpointing": "auto"}, [8], 1),
        ({"survivor_checkpointing": "auto", "survivor_batch_tokens": 60}, [3, 4, 1], 3),
        # The five rows of more than 18 tokens are checkpointed
        ({"survivor_checkpointing": "auto", "survivor_batch_tokens": 18}, None, None),
        ({"survivor_checkpointing": "auto", "survivor_batch_tokens": 1}, [8], 2),
        ({"survivor_checkpointing": "auto", "micro_batches": "small"}, [2, 2, 2, 2], 4),
        ({"survivor_checkpointing": False, "token_pruning": "drop", "padding_free": True, "max_length": None}, None, 1),
    ],
)
def test_survivors_without_checkpointing_give_the_same_gradient(
    tmp_path, tokenizer, prompt_completion, options, rows, forwards
):
    same = {
        name: value for name, value in options.items() if not name.startswith("survivor") and name != "micro_batches"
    }
    _, expected, _ = run(tmp_path, tokenizer, prompt_completion, **same)
    _, seen, count = run(tmp_path, tokenizer, prompt_completion, **options)
    if rows is not None:
        assert [len(batch["labels"]) for batch in seen.batches[0]] == rows
    if forwards is not None:
        assert count == forwards
    for name, gradient in expected.gradients[0].items():
        torch.testing.assert_close(seen.gradients[0][name], gradient, rtol=1e-5, atol=2e-6, msg=name)


# Out of memory


@pytest.mark.parametrize(
    ("where", "dropout", "mode"),
    [("forward", 0.1, "auto"), ("backward", 0.1, "auto"), ("backward", 0.0, "false"), ("last parameter", 0.1, "auto")],
)
def test_a_step_that_runs_out_of_memory_is_done_again_with_the_same_gradients(
    tmp_path, tokenizer, prompt_completion, where, dropout, mode
):
    options = {"budget": "50x50", "max_steps": 2, "survivor_checkpointing": mode, "dropout": dropout}
    whole, expected, _ = run(tmp_path / "whole", tokenizer, prompt_completion, **options)

    trainer = make_trainer(tmp_path / "torn", tokenizer, prompt_completion, **{**STEP, **options})
    seen = Recorder().attach(trainer)
    times = iter(range(100))
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def fail(*_args):
        layer = trainer.model.get_base_model().model.layers[0]
        counting = trainer.memory.counts and trainer.memory.needs is None
        if trainer.model.training and not counting and not layer.gradient_checkpointing and next(times) == 1:
            raise torch.OutOfMemoryError("no room")

    if where == "forward":
        trainer.model.get_base_model().model.layers[1].register_forward_hook(fail)
    elif where == "backward":
        parameters[len(parameters) // 2].register_hook(fail)
    else:
        parameters[0].register_post_accumulate_grad_hook(fail)  # of the first layer: all others are done
    trainer.train()

    assert next(times) >= 2, "it did fail"
    assert len(seen.gradients) == 2
    for step in range(2):
        for name, gradient in expected.gradients[step].items():
            torch.testing.assert_close(seen.gradients[step][name], gradient, rtol=1e-5, atol=2e-6, msg=f"{step} {name}")
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-5)
    for entry, other in zip(trainer.state.log_history, whole.state.log_history, strict=True):
        assert {name: entry[name] for name in ("num_tokens", "entropy") if name in entry} == pytest.approx(
            {name: other[name] for name in ("num_tokens", "entropy") if name in other}, rel=1e-5
        )
    assert 0 < trainer.memory.free_tokens < whole.memory.free_tokens


def test_what_is_checkpointed_already_fails_as_ever(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.0, **STEP)

    def fail(*_args):
        if trainer.model.training:
            raise torch.OutOfMemoryError("no room")

    trainer.model.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        trainer.train()


# What batches need


@pytest.mark.parametrize("four_bit", [False, True], ids=["bfloat16", "nf4"])
def test_needs_are_those_of_longer_batches(tmp_path, model_dir, prompt_completion, four_bit):
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
        )
    options = {**COMMON, **STEP, "bf16": True, "survivor_checkpointing": "auto"}
    trainer = QTuningSFTTrainer(
        model_dir,
        QTuningSFTConfig(str(tmp_path), **options, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=prompt_completion,
        peft_config=lora(),
        quantization_config=quantization,
    )
    state = torch.get_rng_state()
    trainer.model.gradient_checkpointing_enable()
    needs = trainer._count_needs()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.training

    cpu = torch.device("cpu")
    with lean_lm_head(cpu):
        scoring, training, free = (memory._bytes_of(trainer.model, cpu, work) for work in works(trainer, tokens=128))
    assert needs.scoring.bytes(128) == pytest.approx(scoring, rel=0.05)
    assert needs.training.bytes(128) == pytest.approx(training, rel=0.08)
    assert needs.free.bytes(128) == pytest.approx(free, rel=0.08)
    assert scoring < training < free
    assert needs.scoring_tokens(128) > 128
    assert needs.scoring.per_token * needs.scoring_tokens(128) <= needs.training.per_token * 128


def works(trainer, tokens: int) -> list:
    """Scoring, training and training without checkpointing of a row of so many tokens."""
    found = []
    own = memory._bytes_of
    memory._bytes_of = lambda model, device, work: found.append(work) or 0
    lengths, memory.PROBED = memory.PROBED, (tokens // 2, tokens)
    try:
        trainer._count_needs()
    finally:
        memory._bytes_of, memory.PROBED = own, lengths
    return found[1::2]


def test_a_line_goes_through_its_points():
    line = Line.through((32, 1032), (64, 1064))
    assert (line.fixed, line.per_token, line.bytes(100), line.tokens(1100.5)) == (1000, 1, 1100, 100)
    assert line.tokens(10) == 0


def test_a_gpu_is_looked_at_after_its_first_step(monkeypatch):
    args = QTuningSFTConfig("x", use_cpu=True, bf16=False, gradient_checkpointing=True, survivor_checkpointing="auto")
    monkeypatch.setattr(QTuningSFTConfig, "device", torch.device("cuda"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2000)
    budget, needs = MemoryBudget(args), Needs(Line(10, 1), Line(100, 10), Line(100, 20))
    assert budget.counts
    budget.begin_step(lambda: needs)
    assert (budget.needs, budget.free_tokens) == (needs, 0)
    budget.begin_step(lambda: pytest.fail("counted twice"))
    assert budget.free_tokens == (0.9 * 2000 - 100) // 20
    budget.shrink(50)
    assert budget.free_tokens == 25
    budget.begin_step(lambda: pytest.fail("counted twice"))
    assert budget.free_tokens == 25  # not looked at again


def test_a_card_too_full_to_count_on_keeps_to_the_micro_batches(monkeypatch):
    args = QTuningSFTConfig("x", use_cpu=True, bf16=False, gradient_checkpointing=True, survivor_checkpointing="auto")
    monkeypatch.setattr(QTuningSFTConfig, "device", torch.device("cuda"))

    def fail():
        raise torch.OutOfMemoryError("no room")

    budget = MemoryBudget(args)
    budget.begin_step(fail)
    budget.begin_step(fail)
    assert budget.free_tokens == 0
    assert budget.needs is not None
    assert budget.needs.scoring_tokens(77) == 77


@pytest.mark.parametrize(
    ("given", "meant"), [("true", "true"), ("false", "false"), ("auto", "auto"), (True, "true"), (False, "false")]
)
def test_survivor_checkpointing_is_a_word_or_as_it_was_a_truth_value(tmp_path, given, meant):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"survivor_checkpointing": given}))
    model = ["--use_cpu", "true", "--bf16", "false"]
    assert (
        make_parser().parse(["--config", str(tmp_path / "r.yaml"), *model]).dataclasses[1].survivor_checkpointing
        == meant
    )
    assert QTuningSFTConfig("x", use_cpu=True, bf16=False, survivor_checkpointing=given).survivor_checkpointing == meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"survivor_checkpointing": "sometimes"},
            "`survivor_checkpointing` is 'sometimes': choose one of 'true', 'auto'",
        ),
        ({"survivor_batch_tokens": 0, "survivor_checkpointing": "auto"}, "`survivor_batch_tokens` is 0: give a number"),
        ({"survivor_batch_tokens": 99}, "`survivor_checkpointing` is 'true': set `survivor_checkpointing` to 'auto'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QTuningSFTConfig("x", use_cpu=True, bf16=False, **options)


def test_scoring_is_sized_by_counted_bytes_on_a_gpu(tmp_path, tokenizer, prompt_completion, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50")
    monkeypatch.setattr(QTuningSFTConfig, "device", torch.device("cuda"))
    needs = Needs(Line(10, 1), Line(100, 4), Line(100, 20))
    lengths = [10] * 16
    assert trainer.scorer.batch_tokens(lengths, 40, 4, needs) == 4 * 40
    assert trainer.scorer.batch_tokens(lengths, 40, 4) == 40  # not counted, so no more than is trained at once
    assert trainer.scorer.batch_tokens([300], 300, 1, Needs(Line(10, 5), Line(10, 1), Line(10, 9))) == 300
    assert trainer.memory.counts
    trainer.args.scoring_batch_tokens = 8
    assert not trainer.memory.counts


def test_auto_is_resumed_bit_equal_on_a_cpu(tmp_path, tokenizer, prompt_completion):
    options = {**STEP, "max_steps": 4, "survivor_checkpointing": "auto", "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "a", tokenizer, prompt_completion, dropout=0.1, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "b", tokenizer, prompt_completion, dropout=0.1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_weights(resumed, whole)
