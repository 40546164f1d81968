"""The rivals of Q-Tuning: budgets, published rules, gradients, resume, what they cost, and what is refused."""

import math
import re
import sys
from pathlib import Path

import literal
import pytest
import test_trainer
import torch
from conftest import prompt_completion_rows, tiny_llama
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import COMMON, PADDING_FREE, Recorder, assert_same_weights, losses, make_trainer, rows_of
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, pruners
from qtuning_trl.method import SampleSelection, budget_size
from qtuning_trl.pruners import Answers, Pool

ENDS = [f"{axis}_{part}" for axis in ("entropy", "perplexity") for part in ("high", "middle", "low")]
CODE = ["q_tuning_code", "longest_code", "entropy_code"]  # the authors' (tests/test_authors_code.py)
SAMPLES = ["q_tuning", "random", "longest", *ENDS, "excess", "infobatch", "column", *CODE, "none"]
TOKENS = [
    "q_tuning", "random", "easiest", "hardest", "uncertain", "importance", "rho1", "token_cleaning", "fastv",
    "sparsevlm", "q_tuning_code", "none",
]  # fmt: skip
RANKED_TOGETHER = ("rho1", "token_cleaning")

# Few distinct values, so that ties are frequent.
VALUE = st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.0])
POOLS = st.lists(st.tuples(VALUE, VALUE, st.integers(1, 5), VALUE), min_size=1, max_size=40)
RATIO = st.sampled_from([0.0625, 0.125, 0.25, 0.3, 0.5, 0.7, 1.0])


def make_pool(samples, ratio: float, seed: int = 0, **options) -> Pool:
    loss, entropy, length, score = (torch.tensor(values, dtype=torch.float64) for values in zip(*samples, strict=True))
    return Pool(
        lengths=length.long(), sample_ratio=ratio, generator=torch.Generator().manual_seed(seed),
        perplexity=loss.exp(), entropy=entropy, column=score, **options,
    )  # fmt: skip


def survivors_of(name: str, pool: Pool) -> list[int]:
    decided = pruners.sample_pruner(name).prune(pool)
    return (decided.keep if isinstance(decided, SampleSelection) else decided != 0).nonzero().flatten().tolist()


def make_answers(samples: int, positions: int, ratio: float, seed: int) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((samples, positions), generator=generator) < 0.6
    mask[:, 0] = True

    def values() -> torch.Tensor:  # with ties
        return torch.randint(0, 5, (samples, positions), generator=generator).double()

    return Answers(
        answer_mask=mask,
        protected=mask & (torch.rand(mask.shape, generator=generator) < 0.1),
        token_ratio=ratio,
        generator=generator,
        nll=values(), entropy=values(), reference_nll=values(), base_nll=values(),
        attention=lambda layer: list(torch.rand((samples, positions + 1, positions + 1), generator=generator).tril()),
        embeddings=lambda: list(torch.randn((samples, positions + 1, 4), generator=generator)),
    )  # fmt: skip


# Budgets


def test_the_lists_of_this_file_are_complete():
    assert (list(pruners._SAMPLE_PRUNERS), list(pruners._TOKEN_PRUNERS)) == (SAMPLES, TOKENS)


@settings(max_examples=60, deadline=None)
@given(samples=POOLS, ratio=RATIO, seed=st.integers(0, 9))
def test_every_sample_pruner_meets_the_budget_exactly(samples, ratio, seed):
    for name in set(SAMPLES) - {*CODE}:
        expected = len(samples) if name == "none" else budget_size(ratio, len(samples))
        assert len(survivors_of(name, make_pool(samples, ratio, seed))) == expected, name


@settings(max_examples=60, deadline=None)
@given(samples=POOLS, ratio=RATIO, shuffler=st.randoms(use_true_random=False))
def test_the_order_of_the_pool_does_not_matter_where_nothing_is_drawn(samples, ratio, shuffler):
    shuffled = list(samples)
    shuffler.shuffle(shuffled)
    keys = {"q_tuning": (0, 1), "longest": (2,), "column": (3,)}
    keys |= {f"entropy_{end}": (1, 0, 2) for end in ("high", "low")}
    keys |= {f"perplexity_{end}": (0, 1, 2) for end in ("high", "low")}
    for name, fields in keys.items():
        kept = [
            sorted(
                tuple(pool[index][field] for field in fields) for index in survivors_of(name, make_pool(pool, ratio))
            )
            for pool in (samples, shuffled)
        ]
        assert kept[0] == kept[1], name


def test_the_highest_stay():
    pool = make_pool([(1.0, 5.0, 3, 0.0), (4.0, 2.0, 1, 9.0), (2.0, 7.0, 2, 4.0), (3.0, 1.0, 9, 1.0)], 0.5)
    assert survivors_of("perplexity_high", pool) == [1, 3]
    assert survivors_of("perplexity_low", pool) == [0, 2]
    assert survivors_of("perplexity_middle", pool) == [2, 3]
    assert survivors_of("entropy_high", pool) == [0, 2]
    assert survivors_of("entropy_low", pool) == [1, 3]
    assert survivors_of("entropy_middle", pool) == [0, 1]
    assert survivors_of("excess", pool) == [1, 2]  # loss less entropy: -4, 2, -5, 2; the tie goes to the earlier
    assert survivors_of("longest", pool) == [0, 3]
    assert survivors_of("column", pool) == [1, 2]


def test_a_column_of_marks_keeps_exactly_the_marked():
    marks = torch.tensor([True, False, True, True])
    pool = Pool(lengths=torch.ones(4), sample_ratio=0.25, generator=torch.Generator(), column=marks)
    assert survivors_of("column", pool) == [0, 2, 3]


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in CODE])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_every_token_pruner_meets_the_budget_exactly(name, ratio):
    for seed, samples, positions in ((0, 1, 1), (1, 1, 9), (2, 5, 7), (3, 12, 30)):
        answers = make_answers(samples, positions, ratio, seed)
        keep = pruners.token_pruner(name).prune(answers) != 0  # what is weighted is kept
        assert not bool((keep & ~answers.answer_mask).any())
        assert bool((keep | ~answers.protected).all())
        counts = answers.answer_mask.sum(dim=1), answers.protected.sum(dim=1), keep.sum(dim=1)
        if name in RANKED_TOGETHER:
            counts = tuple(count.sum()[None] for count in counts)
        for total, protected, kept in zip(*(count.tolist() for count in counts), strict=True):
            assert kept == (total if name == "none" else max(budget_size(ratio, total), protected))


def test_random_keeps_every_sample_and_token_as_often():
    generator = torch.Generator().manual_seed(0)
    samples, tokens = torch.zeros(6), torch.zeros(1, 5)
    pool = Pool(lengths=torch.ones(6), sample_ratio=0.5, generator=generator)
    mask = torch.ones(1, 5, dtype=torch.bool)
    answers = Answers(mask, torch.zeros_like(mask), 0.4, generator)
    for _ in range(2000):
        samples += pruners.sample_pruner("random").prune(pool)
        tokens += pruners.token_pruner("random").prune(answers)
    torch.testing.assert_close(samples / 2000, torch.full((6,), 0.5), atol=0.04, rtol=0)
    torch.testing.assert_close(tokens / 2000, torch.full((1, 5), 0.4), atol=0.04, rtol=0)


# Published rules


def test_infobatch_is_as_published():
    numbers = torch.Generator().manual_seed(0)
    for seed in range(200):
        size = int(torch.randint(1, 20, (1,), generator=numbers))
        loss = torch.rand(size, generator=numbers, dtype=torch.float64) ** 3
        ratio = [0.125, 0.25, 0.5, 0.7, 0.9, 1.0][seed % 6]
        draws = torch.Generator().manual_seed(seed)
        first, second = (torch.randperm(size, generator=draws).tolist() for _ in range(2))
        expected = literal.infobatch(loss.tolist(), literal.budget(ratio, size), first, second)
        pool = make_pool([(value, 1.0, 1, 0.0) for value in loss.tolist()], ratio, seed)
        assert pruners.sample_pruner("infobatch").prune(pool).tolist() == pytest.approx(expected)


def test_infobatch_leaves_the_expected_gradient_its_direction():
    """At any budget the expected weights of all samples are equal; where nothing is thinned out they are 1."""
    loss = [0.1, 0.2, 0.3, 0.4, 3.0, 4.0]  # four below the mean, so 2 + 2 stay as published
    for ratio, expected in ((0.34, 2 / 4), (0.67, 1.0), (0.84, 1.0)):
        total = torch.zeros(6, dtype=torch.float64)
        pool = make_pool([(value, 1.0, 1, 0.0) for value in loss], ratio)
        for _ in range(3000):
            total += pruners.sample_pruner("infobatch").prune(pool)
        torch.testing.assert_close(total / 3000, torch.full_like(total, expected), atol=0.06, rtol=0)


def test_infobatch_keeps_everything_at_the_end_where_it_is_asked_to():
    samples = [(float(i), 1.0, 1, 0.0) for i in range(8)]
    for progress, kept in ((0.0, 2), (0.86, 2), (0.875, 8), (0.99, 8)):
        pool = make_pool(samples, 0.25, progress=progress, infobatch_annealing=0.125)
        assert len(survivors_of("infobatch", pool)) == kept
        assert len(survivors_of("infobatch", make_pool(samples, 0.25, progress=progress))) == 2


@pytest.mark.parametrize(("name", "loss"), [("rho1", "nll"), ("token_cleaning", "base_nll")])
def test_excess_loss_is_ranked_as_published(name, loss):
    for seed in range(40):
        answers = make_answers(1 + seed % 5, 1 + seed % 9, [0.1, 0.3, 0.5, 0.7][seed % 4], seed)
        answers.protected[:] = False
        expected = literal.top_excess_loss(
            getattr(answers, loss).tolist(), answers.reference_nll.tolist(), answers.answer_mask.tolist(),
            answers.token_ratio,
        )  # fmt: skip
        assert pruners.token_pruner(name).prune(answers).tolist() == expected


def test_by_hand_attention():
    # Five tokens: a prompt of two, an answer of three. Rows are queries.
    weights = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.5, 0.0, 0.0, 0.0],
            [0.1, 0.7, 0.2, 0.0, 0.0],
            [0.3, 0.1, 0.1, 0.5, 0.0],
            [0.2, 0.2, 0.2, 0.3, 0.1],
        ]
    )
    mask = torch.tensor([[False, True, True, True]])
    # The answer's embeddings are like the prompt's second token, which therefore rates.
    embeddings = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.2], [1.0, -0.2], [1.0, 0.0]])
    layers = []

    def attention(layer):
        layers.append(layer)
        return [weights]

    def kept(name, ratio):
        answers = Answers(
            mask, torch.zeros_like(mask), ratio, torch.Generator(), attention=attention, embeddings=lambda: [embeddings]
        )
        return pruners.token_pruner(name).prune(answers)[0].tolist()

    # Received from the others that see it: (0.1 + 0.2) / 2, 0.3 / 1, and 0 for the last.
    assert kept("fastv", 0.34) == [False, False, True, False]
    assert kept("fastv", 0.67) == [False, True, True, False]
    # Looks at the rater: 0.7, 0.1, 0.2.
    assert kept("sparsevlm", 0.34) == [False, True, False, False]
    assert kept("sparsevlm", 0.67) == [False, True, False, True]
    assert layers == [1, 1, 2, 2]


# In the trainer


@pytest.fixture(scope="module")
def scored() -> Dataset:
    rows = prompt_completion_rows(40)
    return Dataset.from_list([{**row, "score": index * 7 % 40, "mark": index < 3} for index, row in enumerate(rows)])


@pytest.fixture(scope="module")
def reference_dir(tokenizer_dir, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "reference"
    tiny_llama(5).save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(path)
    return str(path)


@pytest.fixture
def pruned_trainer(tmp_path, tokenizer, scored, reference_dir, monkeypatch):
    """Makes a trainer with a pair of pruners and what they need."""

    def make(samples: str, tokens: str, folder: str = "a", **options):
        if tokens in ("fastv", "sparsevlm"):
            monkeypatch.setattr(test_trainer, "tiny_llama", _eager_llama)
        needed = {"score_column": "score", "reference_model": reference_dir, "budget": "50x50"}
        options = {**needed, "sample_pruner": samples, "token_pruner": tokens, **options}
        return make_trainer(tmp_path / folder, tokenizer, scored, **options)

    return make


def _eager_llama():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


def trained_rows(trainer) -> tuple[list[dict], list[list[float]], Recorder]:
    """Train; the rows of the first step's micro-batches, the weights of their tokens' losses, and the gradients."""
    seen = Recorder().attach(trainer)
    trainer.train()
    return [row for batch in seen.batches[0] for row in rows_of(batch)], seen.weights[0], seen


def weighted_gradient(
    rows: list[dict], weights: list[list[float]], model=None, whole: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Of the sum of the losses of labelled tokens, each times its weight, over their number or that of `whole` answers.

    Without any trainer.
    """
    model = tiny_llama() if model is None else model
    loss, tokens = torch.zeros(()), 0
    for row, of_row in zip(rows, weights, strict=True):
        labels = torch.tensor(row["labels"])[1:]
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100]
        loss = loss + (torch.tensor(of_row) * losses).sum()
        tokens += len(losses)
    (loss / (whole or tokens)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


PAIRS = [
    ("q_tuning", "q_tuning", {"token_budget": "pool"}),
    ("q_tuning_code", "q_tuning_code", {"selection_scope": "micro_batch", "per_device_train_batch_size": 8}),
    ("longest_code", "hardest", {"token_budget": "pool"}),
    ("entropy_code", "easiest", {"token_budget": "pool", "token_pruning": "drop"}),
    ("q_tuning", "hardest", {}),
    ("random", "uncertain", {}),
    ("random", "q_tuning", {}),
    ("longest", "random", {"token_pruning": "drop"}),
    ("entropy_high", "rho1", {}),
    ("perplexity_middle", "fastv", {}),
    ("column", "token_cleaning", {}),
    ("column", "none", {"score_column": "mark"}),
    ("none", "sparsevlm", {}),
    ("infobatch", "none", {}),
    ("infobatch", "random", PADDING_FREE),
    ("infobatch", "rho1", {"token_pruning": "drop", "selection_scope": "micro_batch"}),
    ("q_tuning", "importance", {"token_budget": "pool"}),
    ("random", "importance", {"token_pruning": "drop"}),
    ("random", "importance", {"selection_scope": "micro_batch", "token_budget": "pool"}),
    ("longest", "importance", {"packing": True, "max_length": 48}),
    ("infobatch", "importance", PADDING_FREE),
]


@pytest.mark.parametrize(("samples", "tokens", "options"), PAIRS)
def test_gradient_is_that_of_the_survivors(pruned_trainer, samples, tokens, options):
    trainer = pruned_trainer(samples, tokens, max_steps=1, max_grad_norm=0.0, **options)
    rows, weights, seen = trained_rows(trainer)
    if options.get("score_column") != "mark" and samples != "q_tuning_code" and not options.get("packing"):
        assert trainer.summary()["kept"] == len(rows) == (16 if samples == "none" else 8)
    if tokens == "importance":
        assert len({weight for row in weights for weight in row}) > len(rows)
    else:
        assert (max(map(max, weights)) > 1.0) == (samples == "infobatch")
    whole = seen.whole[0] if tokens == "importance" else None
    for name, expected in weighted_gradient(rows, weights, whole=whole).items():
        torch.testing.assert_close(seen.gradients[0][name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(("samples", "tokens"), [("random", "rho1"), ("longest", "random")])
def test_gradient_equals_plain_sft_on_the_survivors(pruned_trainer, tmp_path, tokenizer, samples, tokens):
    rows, _, seen = trained_rows(pruned_trainer(samples, tokens, max_steps=1))
    options = {**COMMON, "max_length": None, "max_steps": 1, "gradient_accumulation_steps": 1}
    options["per_device_train_batch_size"] = len(rows)
    plain = SFTTrainer(
        tiny_llama(), SFTConfig(str(tmp_path / "plain"), **options), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    reference = Recorder().attach(plain)
    plain.train()
    for name, expected in reference.gradients[0].items():
        torch.testing.assert_close(seen.gradients[0][name], expected, rtol=1e-5, atol=2e-6, msg=name)


def test_nothing_pruned_is_plain_sft_bit_for_bit(pruned_trainer, tmp_path, tokenizer, scored):
    plain = make_trainer(tmp_path / "b", tokenizer, scored, SFTTrainer)
    plain.train()
    ours = pruned_trainer("none", "none")
    ours.train()
    assert losses(ours) == losses(plain)
    assert_same_weights(ours, plain)


@pytest.mark.parametrize(
    ("samples", "tokens", "dropout"),
    [("random", "random", 0.1), ("infobatch", "rho1", 0.1), ("column", "token_cleaning", 0.1),
     ("random", "token_cleaning", None), ("excess", "fastv", None)],
)  # fmt: skip
def test_a_resumed_run_ends_bit_equal(pruned_trainer, samples, tokens, dropout):
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 3, "dropout": dropout}
    whole = pruned_trainer(samples, tokens, "whole", **options)
    whole.train()
    broken = pruned_trainer(samples, tokens, "broken", **options)
    broken.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = pruned_trainer(samples, tokens, "broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same_weights(resumed, whole)
    assert resumed.summary()["answer_tokens"] == whole.summary()["answer_tokens"]


def test_a_run_draws_nothing_from_the_global_generators(pruned_trainer):
    trainer = pruned_trainer("random", "random", max_steps=1)
    states = []
    original = trainer._prune_pool

    def prune_pool(*args):
        states.append(torch.get_rng_state())
        result = original(*args)
        states.append(torch.get_rng_state())
        return result

    trainer._prune_pool = prune_pool
    trainer.train()
    assert torch.equal(*states)


def test_another_seed_and_another_step_draw_other_samples(pruned_trainer):
    def kept(**options):
        pools = []
        trainer = pruned_trainer("random", "none", max_steps=2, data_seed=0, shuffle_dataset=False, **options)
        original = trainer.selector._select_of

        def select_of(*args):
            pools.append(original(*args).keep.tolist())
            return original(*args)

        trainer.selector._select_of = select_of
        trainer.train()
        return pools

    first = kept(seed=1)
    assert first == kept(seed=1)
    assert first != kept(seed=2)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("samples", "tokens", "forwards"),
    [
        ("random", "random", 0),
        ("longest", "none", 0),
        ("column", "none", 0),
        ("random", "hardest", 8),
        ("random", "uncertain", 8),
        ("random", "q_tuning", 8),
        ("entropy_low", "easiest", 16),
        ("none", "easiest", 16),
        ("random", "rho1", 8 + 8),
        ("infobatch", "rho1", 16 + 8),
        ("column", "token_cleaning", 8 + 8),
    ],
)
def test_a_pruner_costs_the_forwards_it_needs_and_no_more(pruned_trainer, samples, tokens, forwards):
    trainer = pruned_trainer(samples, tokens, max_steps=1)
    original, count = trainer.scorer.forward_all, []

    def forward_all(model, pool, now, batch_tokens):
        count.append(len(now))
        return original(model, pool, now, batch_tokens)

    trainer.scorer.forward_all = forward_all
    trainer.train()
    assert sum(count) == forwards
    of_the_model_itself = forwards - 8 if tokens == "rho1" else 0 if tokens == "token_cleaning" else forwards
    assert trainer.summary()["scored"] == of_the_model_itself


@pytest.mark.parametrize("samples", ["random", "perplexity_middle"])  # the survivors are scored, or have been
def test_uncertain_tokens_are_those_that_the_model_is_least_sure_of(pruned_trainer, samples):
    """Against naive logits, whatever the label is."""
    trainer = pruned_trainer(samples, "uncertain", max_steps=1, max_grad_norm=0.0)
    prune_tokens, seen = trainer.selector.prune_tokens, []

    def remember(selection, answers):
        after = prune_tokens(selection, answers)
        seen.extend(zip(selection.survivors, after.survivors, answers[0].protected, strict=True))
        return after

    trainer.selector.prune_tokens = remember
    trainer.train()
    assert len(seen) == 8
    for before, after, protected in seen:
        with torch.no_grad():
            logits = tiny_llama()(torch.from_numpy(before.input_ids)[None]).logits[0, :-1]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        answer, kept = (torch.from_numpy(sample.labels[1:] != -100) for sample in (before, after))
        assert int(kept.sum()) == max(1, int(0.5 * answer.sum()))
        free = protected[: len(answer)].logical_not()
        assert entropy[kept & free].min() >= entropy[answer & ~kept & free].max()


def test_reference_and_base_losses_are_those_of_their_models(pruned_trainer, reference_dir):
    """Against naive logits, for a LoRA run and a full one, after the trained model has moved away from its base."""
    for dropout in (0.0, None):
        trainer = pruned_trainer("random", "token_cleaning", f"run-{dropout}", dropout=dropout, max_steps=3)
        seen = []
        original = trainer.selector.token_pruner.prune
        trainer.selector.token_pruner = pruners.Pruner(
            lambda answers, seen=seen, original=original: seen.append(answers) or original(answers),
            ("base", "reference"),
        )
        drawn = []
        prune_tokens = trainer.selector.prune_tokens

        def remember(selection, *args, drawn=drawn, prune_tokens=prune_tokens):
            (group,) = selection.groups
            drawn.append([group.samples[index] for index in group.decided.keep.nonzero().flatten().tolist()])
            return prune_tokens(selection, *args)

        trainer.selector.prune_tokens = remember
        trainer.train()
        assert len(seen) == 3
        for values, model in ((seen[-1].base_nll, tiny_llama()), (seen[-1].reference_nll, tiny_llama(5))):
            for row, mask, document in zip(values, seen[-1].answer_mask, drawn[-1], strict=True):
                with torch.no_grad():
                    logits = model(torch.from_numpy(document.input_ids)[None]).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(
                    logits, torch.from_numpy(document.labels)[1:], ignore_index=-100, reduction="none"
                )
                expected = nll[nll != 0].double()
                torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-5)


def test_a_step_without_a_marked_sample_trains_on_nothing(pruned_trainer, scored):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 1}
    trainer = pruned_trainer("column", "none", score_column="mark", **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["qtuning/kept_samples"] for entry in logs) == 3
    empty = [entry for entry in logs if entry["qtuning/kept_samples"] == 0]
    assert len(empty) >= 17
    assert all(entry["loss"] == 0.0 and entry["grad_norm"] == 0.0 for entry in empty)


def test_what_is_kept_is_recorded_also_of_rivals(pruned_trainer):
    trainer = pruned_trainer("entropy_high", "easiest", group_column="source", max_steps=1)
    trainer.train()
    pool, summary = trainer.last_pool, trainer.summary()
    threshold = sorted(pool["entropy"])[-8]
    assert pool["kept"] == [entropy >= threshold for entropy in pool["entropy"]]
    assert set(pool["quadrant"]) <= {0, 1, 2, 3, 4}
    assert summary["filled"] == summary["trimmed"] == 0
    unscored = pruned_trainer("random", "random", group_column="source", max_steps=1)
    unscored.train()
    assert unscored.last_pool is None
    assert sum(group["kept"] for group in unscored.summary()["groups"].values()) == 8
    assert not [key for key in unscored.state.log_history[0] if key.endswith(("_low", "_high"))]
    assert "random, random" in _card(unscored)


def _card(trainer) -> str:
    from qtuning_trl.records.card import model_card_section

    return model_card_section(trainer.summary())


# Pruners of one's own


def test_a_registered_pruner_is_found_by_name(pruned_trainer, own_pruners):
    @pruners.register_sample_pruner("shortest")
    def shortest(pool):
        return pool.keep_highest(-pool.lengths)

    @pruners.register_sample_pruner("halved", needs=("weights",))
    def halved(pool):
        return 0.5 * pool.keep_highest(pool.lengths)

    @pruners.register_token_pruner("own_hardest", needs=("scores",))
    def own_hardest(answers):
        return answers.keep_lowest(-answers.nll)

    rows, _, _ = trained_rows(pruned_trainer("shortest", "none", max_steps=1))
    longer, _, _ = trained_rows(pruned_trainer("longest", "none", max_steps=1))
    assert len(rows) == 8
    assert max(len(row["labels"]) for row in rows) < max(len(row["labels"]) for row in longer)
    rows, weights, seen = trained_rows(pruned_trainer("halved", "own_hardest", max_steps=1, max_grad_norm=0.0))
    assert weights == [[0.5] * sum(label != -100 for label in row["labels"][1:]) for row in rows]
    for name, expected in weighted_gradient(rows, weights).items():
        torch.testing.assert_close(seen.gradients[0][name], expected, rtol=1e-4, atol=2e-6, msg=name)


def test_a_name_can_say_which_module_registers_it(tmp_path, monkeypatch, own_pruners):
    (tmp_path / "my_pruners.py").write_text(
        "from qtuning_trl.pruners import register_sample_pruner\n"
        "@register_sample_pruner('first')\n"
        "def first(pool):\n"
        "    return pool.keep_highest(-pool.lengths)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, sample_pruner="my_pruners:first").sample_needs == ()
    )
    assert sys.modules.pop("my_pruners")


def test_a_registration_that_cannot_hold_is_refused(own_pruners):
    with pytest.raises(ValueError, match="There is a sample pruner 'random' already: register yours by another name"):
        pruners.register_sample_pruner("random")
    with pytest.raises(ValueError, match="The token pruner 'mine' needs 'score': choose of 'scores', 'reference'"):
        pruners.register_token_pruner("mine", needs=("score",))


def test_a_pruner_that_gives_a_wrong_shape_is_refused(pruned_trainer, own_pruners):
    pruners.register_sample_pruner("wrong")(lambda pool: torch.ones(3))
    with pytest.raises(ValueError, match=r"gave a tensor of shape \(3,\) for 16 samples"):
        pruned_trainer("wrong", "none").train()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_pruner": "randon"}, "`sample_pruner` is 'randon': did you mean 'random'? choose one of 'q_tuning', "),
        (
            {"token_pruner": "zzz"},
            "`token_pruner` is 'zzz': choose one of 'q_tuning', 'random', .* or register your own",
        ),
        ({"sample_pruner": "nowhere_at_all:x"}, "the module 'nowhere_at_all' cannot be imported"),
        ({"sample_pruner": "column"}, "`sample_pruner` is 'column' and `score_column` is not given: name the dataset"),
        ({"token_pruner": "rho1"}, "`token_pruner` is 'rho1' and `reference_model` is not given: name a model"),
        ({"token_pruner": "token_cleaning"}, "`token_pruner` is 'token_cleaning' and `reference_model` is not given"),
        ({"sample_pruner": "infobatch", "packing": True}, "`sample_pruner` is 'infobatch' and `packing` is on"),
        (
            {"sample_pruner": "infobatch", "loss_type": "dft"},
            "which weights the losses of its samples, and `loss_type`",
        ),
        ({"infobatch_annealing": 1.0}, "`infobatch_annealing` is 1.0: give a share"),
        (
            {"sample_pruner": "infobatch", "infobatch_annealing": 0.1, "pool_factor": 2},
            "set one of them to its default",
        ),
        ({"sample_pruner": "none", "pool_factor": 2}, "`pool_factor` is 2 and `sample_ratio` is 1.0"),
    ],
)
def test_options_that_cannot_hold_are_refused_by_the_configuration(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("column", "values", "options", "message"),
    [
        ("score", None, {}, r"`score_column` is 'score': choose one of the dataset's columns \(prompt, completion"),
        ("score", ["a"] * 40, {}, "`score_column` is 'score', whose value in row 0 is 'a': give every row a number"),
        ("score", [1.0] * 39 + [math.nan], {}, "whose value in row 39 is nan"),
        ("score", [1.0] * 39 + [None], {}, "whose value in row 39 is None"),
        (
            "mark",
            [True] * 40,
            {"pool_factor": 2},
            "which marks samples, and `pool_factor` is 2: set `pool_factor` to 1",
        ),
    ],
)
def test_a_column_that_cannot_select_is_refused(tmp_path, tokenizer, column, values, options, message):
    dataset = Dataset.from_list(prompt_completion_rows(40))
    if values is not None:
        dataset = dataset.add_column(column, values)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, dataset, sample_pruner="column", score_column=column, **options)


def test_attention_that_gives_no_weights_is_refused(tmp_path, tokenizer, prompt_completion):
    with pytest.raises(
        ValueError, match=r"`token_pruner` is 'fastv' and the model's attention is 'sdpa', .* to 'eager'"
    ):
        make_trainer(tmp_path, tokenizer, prompt_completion, token_pruner="fastv")


def test_a_reference_model_that_cannot_be_used_is_refused(tmp_path, tokenizer, prompt_completion):
    with pytest.raises(ValueError, match="`reference_model` is '/nowhere', which cannot be loaded"):
        make_trainer(tmp_path, tokenizer, prompt_completion, token_pruner="rho1", reference_model="/nowhere")


def test_the_pruners_of_the_documentation_work(pruned_trainer, own_pruners):
    text = Path(__file__).parents[1].joinpath("docs", "pruners.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## Your own\n\n```python\n(.*?)```", text, re.S)
    code = code.replace('"runs/own"', '"runs/own", use_cpu=True, bf16=False')
    names: dict = {}
    exec(code, names)
    trainer = pruned_trainer(names["args"].sample_pruner, names["args"].token_pruner, max_steps=1)
    trainer.train()
    assert trainer.summary()["kept"] == 8
