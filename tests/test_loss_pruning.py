"""`token_pruning: loss`: the training forward chooses the tokens, as masking by a forward of its own would."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pruners import weighted_gradient
from test_trainer import PADDING_FREE, Recorder, assert_same_weights, losses, make_trainer
from transformers import TrainerCallback

from qtuning_trl import QTuningSFTConfig
from qtuning_trl.pruners import Answers, register_token_pruner, tokens
from qtuning_trl.step.loss import split_budget
from qtuning_trl.step.sample import answer_lengths

HARDEST = {"sample_pruner": "random", "token_pruner": "hardest", "budget": "50x50", "token_pruning": "loss"}
ONE_MICRO_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def count_forwards(trainer) -> list[int]:
    """Grows by one entry for each forward of the whole model: its rows."""
    rows: list[int] = []
    trainer.model.register_forward_hook(
        lambda _module, _args, kwargs, _outputs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_pruner": "uncertain"},
        {"token_pruner": "easiest", "protect_special_tokens": False},
        {"loss_type": "dft"},
        PADDING_FREE,
        {"packing": True, "max_length": 48},
        {"selection_scope": "micro_batch"},
        {"token_budget": "pool", **ONE_MICRO_BATCH},
        {"sample_pruner": "none"},
    ],
    ids=str,
)
def test_it_trains_on_the_tokens_that_masking_keeps_without_its_forward(
    tmp_path, tokenizer, prompt_completion, options
):
    runs = {}
    for how in ("mask", "loss"):
        options = {**HARDEST, **options, "token_pruning": how, "max_steps": 3}
        trainer = make_trainer(tmp_path / how, tokenizer, prompt_completion, dropout=0.0, **options)
        seen, forwards = Recorder().attach(trainer), count_forwards(trainer)
        trainer.train()
        runs[how] = trainer, seen, forwards
    (masked, expected, with_scoring), (ours, seen, forwards) = runs["mask"], runs["loss"]
    assert len(seen.gradients) == 3
    for step, reference in zip(seen.gradients, expected.gradients, strict=True):
        for name, gradient in reference.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert losses(ours) == pytest.approx(losses(masked), rel=1e-5)
    summary, reference = ours.summary(), masked.summary()
    assert summary["answer_tokens"] == reference["answer_tokens"]
    assert 0.2 < summary["answer_tokens"]["ratio_reached"] < 0.75
    assert len(forwards) == sum(map(len, seen.batches)) < len(with_scoring)
    scored = [trainer.run_record.totals["counts"]["scored_samples"] for trainer in (ours, masked)]
    assert scored[0] == 0 < scored[1]


def test_micro_batches_share_the_budget_of_the_pool(tmp_path, tokenizer, prompt_completion):
    """Two micro-batches of survivors: together exactly a quarter of the tokens, each its own hardest."""
    options = {**HARDEST, "token_budget": "pool", "protect_special_tokens": False, "max_steps": 4}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    kept = []
    original = trainer.loss_pruner.weights

    def watched(samples, budget, state, log_probs, entropy):
        keep = original(samples, budget, state, log_probs, entropy)
        kept.append((state.global_step, int(keep.sum()), budget.answers.budget, budget.tokens))
        assert sorted(log_probs[keep].tolist()) == sorted(log_probs.tolist())[: int(keep.sum())]
        return keep

    trainer.loss_pruner.weights = watched
    trainer.train()
    assert [step for step, *_ in kept] == [0, 0, 1, 1, 2, 3, 3]  # the third step is the rest of an epoch, half as large
    assert all(tokens == asked for _, tokens, _, asked in kept)
    summary = trainer.summary()
    assert summary["answer_tokens"]["kept"] == sum(tokens for _, tokens, *_ in kept)
    pooled = sum(share for *_, share, _ in kept)
    assert pooled <= 0.25 * summary["answer_tokens"]["candidates"] < pooled + 4


@pytest.mark.parametrize("budget", ["answer", "pool"])
def test_weighted_losses_are_divided_by_all_answer_tokens(tmp_path, tokenizer, prompt_completion, budget):
    """Of all micro-batches: in one of long answers a smaller share stays than in one of short ones."""
    options = {**HARDEST, "token_pruner": "importance", "token_budget": budget, "budget": "50x30", "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, max_grad_norm=0.0, **options)
    seen, rows, weights = Recorder().attach(trainer), [], []
    original = trainer.loss_pruner.weights

    def watched(samples, *rest):
        chosen = original(samples, *rest)
        rows.extend({"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()} for sample in samples)
        weights.extend(part.tolist() for part in chosen.split(answer_lengths(samples)))
        return chosen

    trainer.loss_pruner.weights = watched
    trainer.train()
    shares = {sum(weight > 0 for weight in of_row) / len(of_row) for of_row in weights}
    assert len(seen.batches[0]) == 2
    assert len(shares) > 1
    for name, expected in weighted_gradient(rows, weights).items():
        torch.testing.assert_close(seen.gradients[0][name], expected, rtol=1e-4, atol=2e-6, msg=name)


def test_a_diverged_model_is_said_and_not_trained_on(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **HARDEST, token_budget="pool")
    torch.nn.init.constant_(trainer.model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"Step 1: 4 of 4 candidates have a NaN or infinite score"):
        trainer.train()


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 300))
def test_a_budget_is_split_exactly_and_never_beyond_a_part(sizes, budget):
    parts = split_budget(budget, sizes)
    assert sum(parts) == min(budget, sum(sizes))
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))


def test_a_killed_run_goes_on_bit_equal_with_a_pruner_that_draws_and_weighs(
    tmp_path, tokenizer, prompt_completion, own_pruners
):
    """A pruner may return weights; and what it draws depends on seed and step alone."""

    @register_token_pruner("weighted", needs=["scores"])
    def weighted(answers):
        lots = torch.rand(answers.answer_mask.shape, generator=answers.generator, dtype=torch.float64)
        return 2.0 * answers.keep_lowest(lots / answers.nll)

    options = {**HARDEST, "token_pruner": "weighted", "max_steps": 4, "num_train_epochs": 4}
    whole = make_trainer(tmp_path / "whole", tokenizer, prompt_completion, dropout=0.1, **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 2

    stopped = make_trainer(tmp_path / "run", tokenizer, prompt_completion, dropout=0.1, **options)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = make_trainer(tmp_path / "run", tokenizer, prompt_completion, dropout=0.1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(resumed, whole)


def test_a_pruner_that_misses_the_budget_is_told_so(tmp_path, tokenizer, prompt_completion, own_pruners):
    name = "greedy"
    register_token_pruner(name, needs=["scores"])(lambda answers: answers.answer_mask)
    options = {**HARDEST, "token_pruner": name, "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    with pytest.raises(ValueError, match=rf"`token_pruner` is '{name}', which kept \d+ tokens .* set `token_pruning`"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sample_pruner": "random"}, "pruning` is 'loss' and `token_pruner` is 'q_tuning': set `token_pruning` to"),
        ({"sample_pruner": "random", "token_pruner": "random"}, "loss' and `token_pruner` is 'random': set `token_pr"),
        (
            {"token_pruner": "hardest"},
            "`token_pruning` is 'loss' and `sample_pruner` is 'q_tuning': set `token_pruning` to 'mask', since",
        ),
        (
            {"sample_pruner": "random", "token_pruner": "importance", "loss_type": "dft"},
            "`token_pruner` is 'importance', which weights the losses of its tokens, and `loss_type` is 'dft': set",
        ),
    ],
)
def test_what_the_training_forward_cannot_tell_is_refused(tmp_path, options, told):
    options = {"token_pruning": "loss", **options}
    with pytest.raises(ValueError, match=re.escape(told)):
        QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    keeps_all = QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{**options, "token_ratio": 1.0})
    assert not keeps_all.prunes_in_loss


NLL = torch.tensor(
    [[0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 0.2, 0.05, 3.0], [0.1, 0.02, 0.02, 0.3, 0.02, 0.1, 0.0, 0.0, 0.0, 0.0]],
    dtype=torch.float64,
)
ANSWERS = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])  # of ten tokens, and of six easier ones


@pytest.mark.parametrize("budget", [None, 6], ids=["each answer", "together"])
def test_tokens_drawn_by_importance_stand_for_all_of_them(budget):
    """The mean of many draws is the sum of all: what is left out is made up for by the weights of what is not."""
    generator = torch.Generator().manual_seed(0)
    answers = Answers(ANSWERS, torch.zeros_like(ANSWERS), token_ratio=0.4, generator=generator, nll=NLL, budget=budget)
    draws = torch.stack([tokens.importance(answers) for _ in range(20_000)])
    kept = draws.count_nonzero(dim=2)
    assert (kept.sum(dim=1) == 6).all()
    assert ((kept == torch.tensor([4, 2])).all()) == (budget is None)
    torch.testing.assert_close(draws.mean(dim=0)[ANSWERS], torch.ones(16).double(), rtol=0.1, atol=0)
    assert (draws > 0).double().mean(dim=0)[0, 6] > 5 * (draws > 0).double().mean(dim=0)[0, 0]


def test_processes_that_are_compared_draw_by_importance_as_one():
    """Answer by answer on two processes: tokens and weights are those of both answers on one."""
    lots = torch.rand(ANSWERS.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    meeting, said = Barrier(2), [None, None]

    def on_process(rows: slice, process: int | None) -> torch.Tensor:
        def gather(value):
            said[process] = value
            meeting.wait()
            heard = list(said)
            meeting.wait()
            return heard

        together = {} if process is None else {"gather": gather, "process": process}
        answers = Answers(
            ANSWERS[rows], torch.zeros_like(ANSWERS[rows]), token_ratio=0.4, generator=lots[rows],
            nll=NLL[rows], budget=6, **together,
        )  # fmt: skip
        return tokens.importance(answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape, generator, dtype: generator)
        alone = on_process(slice(None), None)
        with ThreadPoolExecutor(2) as processes:
            both = list(processes.map(on_process, [slice(0, 1), slice(1, 2)], [0, 1]))
    assert alone.count_nonzero() == 6
    torch.testing.assert_close(torch.cat(both), alone, rtol=0, atol=0)
