"""`token_budget: pool` in the trainer: met exactly in tokens, whatever the batching, and after a crash."""

import json

import pytest
from test_pruners import pruned_trainer, reference_dir, scored  # noqa: F401 (fixtures)
from test_trainer import PADDING_FREE, assert_same_weights
from transformers import TrainerCallback

from qtuning_trl.method import budget_size
from qtuning_trl.records.card import model_card_section
from qtuning_trl.step.sample import answer_lengths

SETTINGS = {
    "process": {},
    "micro batches": {"selection_scope": "micro_batch"},
    "drop": {"token_pruning": "drop"},
    "padding-free": PADDING_FREE,
    "packed": {"packing": True, "max_length": 48, "token_pruner": "hardest"},
    "unprotected": {"protect_special_tokens": False},
    "half of the pool is scored": {"scored_share": 0.5},
    "stops at the budget": {"bisection": "budget"},
    "random and hardest": {"sample_pruner": "random", "token_pruner": "hardest"},
    "the longest and random": {"sample_pruner": "longest", "token_pruner": "random"},
}


def watch(trainer) -> list[dict[str, int]]:
    """Of each group of candidates: tokens asked for, tokens that nothing may take, tokens there are, tokens kept."""
    steps = []
    original = trainer.selector.prune_tokens

    def prune_tokens(selection, answers):
        pruned = original(selection, answers)
        ratio = trainer.args.sample_ratio * trainer.args.token_ratio
        for group, given, (_, before), (_, after) in zip(
            selection.groups, answers, selection.by_group(), pruned.by_group(), strict=True
        ):
            there, prunable = sum(answer_lengths(before)), int(given.answer_mask.sum())
            fixed = there - prunable + int((given.protected & given.answer_mask).sum())
            asked = budget_size(ratio, group.answer_tokens)
            steps.append({"asked": asked, "fixed": fixed, "there": there, "kept": sum(answer_lengths(after))})
        return pruned

    trainer.selector.prune_tokens = prune_tokens
    return steps


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_budget_holds_in_tokens(pruned_trainer, name):  # noqa: F811
    options = {"sample_pruner": "q_tuning", "token_pruner": "q_tuning", "token_budget": "pool", **SETTINGS[name]}
    trainer = pruned_trainer(options.pop("sample_pruner"), options.pop("token_pruner"), **options)
    steps = watch(trainer)
    trainer.train()
    assert steps
    assert [step["kept"] for step in steps] == [min(max(step["asked"], step["fixed"]), step["there"]) for step in steps]
    assert any(step["kept"] == step["asked"] < step["there"] for step in steps)
    summary = trainer.summary()
    assert summary["answer_tokens"]["kept"] == sum(step["kept"] for step in steps)
    assert summary["shares"]["answer_tokens"] == {
        "asked": 0.25, "reached": pytest.approx(summary["answer_tokens"]["ratio_reached"])
    }  # fmt: skip


def test_what_stays_whole_is_not_touched_where_it_is_more_than_the_budget(pruned_trainer):  # noqa: F811
    """At 5% of the tokens Q4 alone is more: all that may go goes, and the reached share says so."""
    trainer = pruned_trainer("q_tuning", "q_tuning", budget="50x10", token_budget="pool", max_steps=1)
    steps = watch(trainer)
    trainer.train()
    (step,) = steps
    assert step["kept"] == step["fixed"] > step["asked"]
    shares = trainer.summary()["shares"]["answer_tokens"]
    assert shares["asked"] == pytest.approx(0.05)
    assert shares["asked"] < shares["reached"]


def test_asked_and_reached_stand_side_by_side(pruned_trainer, tmp_path):  # noqa: F811
    trainer = pruned_trainer("q_tuning", "q_tuning", max_steps=1, budget="50x50")
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    summary = trainer.summary()
    assert (entry["qtuning/kept_samples_asked"], entry["qtuning/kept_samples_share"]) == (0.5, 0.5)
    assert entry["qtuning/kept_answer_tokens_asked"] == 0.25
    reached = summary["answer_tokens"]["kept"] / summary["answer_tokens"]["candidates"]
    assert entry["qtuning/kept_answer_tokens_share"] == pytest.approx(reached)
    assert reached > 0.3  # eq. 7 takes its share of Q2's answers alone
    card = model_card_section(summary)
    assert "| Share of the samples, asked / reached | 50.00% / 50.00% |" in card
    assert f"| Share of the answer tokens, asked / reached | 25.00% / {reached:.2%} |" in card
    by_quadrant = summary["filled_by_quadrant"]
    assert sum(by_quadrant.values()) == summary["filled"]
    assert by_quadrant["q2"] == by_quadrant["q4"] == 0
    written = json.loads((tmp_path / "a" / "qtuning_summary.json").read_text())
    assert written["shares"] == summary["shares"]


def test_a_resumed_run_ends_bit_equal(pruned_trainer):  # noqa: F811
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 3, "dropout": 0.1, "token_budget": "pool", "budget": "25x50"}
    whole = pruned_trainer("q_tuning", "q_tuning", "whole", **options)
    whole.train()
    broken = pruned_trainer("q_tuning", "q_tuning", "broken", **options)
    broken.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = pruned_trainer("q_tuning", "q_tuning", "broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)
    assert resumed.summary()["answer_tokens"] == whole.summary()["answer_tokens"]


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(pruned_trainer, tmp_path):  # noqa: F811
    """Its totals lack the counts of the fill by quadrant."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    pruned_trainer("q_tuning", "q_tuning", "old", **options).train()
    path = tmp_path / "old" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    counts = state["stateful_callbacks"]["RunRecord"]["attributes"]["totals"]["counts"]
    for name in [name for name in counts if name.startswith("filled_")]:
        del counts[name]
    path.write_text(json.dumps(state))
    trainer = pruned_trainer("q_tuning", "q_tuning", "old", **{**options, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.summary()["steps"] == 4
