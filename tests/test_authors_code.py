"""Q-Tuning as its authors coded it: against a literal transcription, by hand, and in the trainer."""

import literal_code
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from test_pruners import pruned_trainer, reference_dir, scored  # noqa: F401 (fixtures)

from qtuning_trl import QTuningSFTConfig, pruners
from qtuning_trl.pruners import Answers, Pool
from qtuning_trl.pruners.authors_code import character_entropy

RATIOS = [0.0625, 0.125, 0.25, 0.3, 0.5, 0.7]


def random_pool(rng: np.random.Generator, size: int, ratio: float, ties: bool) -> Pool:
    both = rng.normal(size=(2, size))
    nll, entropy = both[0], 0.8 * both[0] + 0.6 * both[1] + 3.0
    if ties:
        nll, entropy = nll.round(), entropy.round()
    values = {"perplexity": torch.from_numpy(np.exp(nll)), "sequence_entropy": torch.from_numpy(entropy)}
    return Pool(lengths=torch.ones(size), sample_ratio=ratio, generator=torch.Generator(), **values)


def test_samples_agree_with_the_transcription_on_thousands_of_pools():
    rng = np.random.default_rng(0)
    over = 0
    for number in range(3000):
        pool = random_pool(rng, int(rng.integers(1, 40)), RATIOS[number % len(RATIOS)], ties=number % 3 == 0)
        selection = pruners.sample_pruner("q_tuning_code").prune(pool)
        q2, q4, fill, prune = literal_code.select(
            pool.perplexity.numpy(), pool.sequence_entropy.numpy(), pool.sample_ratio
        )
        for mask, expected in (
            (selection.keep, q2 | q4 | fill), (selection.filled, fill), (selection.prune_tokens, prune),
            (selection.quadrant == 2, q2), (selection.quadrant == 4, q4),
        ):  # fmt: skip
            assert set(mask.nonzero().flatten().tolist()) == expected, number
        over += int(selection.keep.sum()) > max(1, round(len(pool.lengths) * pool.sample_ratio))
    assert over > 100  # above the budget everything in Q2 and Q4 is kept


def test_tokens_agree_with_the_transcription_on_thousands_of_pools():
    rng = np.random.default_rng(1)
    # With a lambda of 0.5 the sums of three tie, and rounding decides.
    emptied = untouched = 0
    for number in range(2000):
        size, width = int(rng.integers(1, 9)), int(rng.integers(2, 12))
        lengths = rng.integers(1, width + 1, size=size)  # predicted tokens, of the whole pool
        kept = sorted(rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False).tolist())
        marked = [i for i in kept if rng.random() < 0.6]
        mask = np.zeros((len(marked), width), dtype=bool)
        for row, i in enumerate(marked):
            start = int(rng.integers(0, lengths[i]))
            mask[row, start : lengths[i] - int(rng.integers(0, 2))] = True  # some end in a token that has no label
        nll = rng.exponential(size=mask.shape) * mask
        ratios = (RATIOS[number % 6], [0.5, 0.7, 0.9][number % 3])
        answers = Answers(
            torch.from_numpy(mask), torch.ones(mask.shape, dtype=torch.bool), ratios[1], torch.Generator(),
            lengths=torch.tensor([int(lengths[i]) + 1 for i in marked], dtype=torch.int64), sample_ratio=ratios[0],
            sequence_tokens=int(lengths.sum()), survivor_tokens=int(lengths[kept].sum()),
            nll=torch.from_numpy(nll), neighbor_weight=0.4,
        )  # fmt: skip
        keep = pruners.token_pruner("q_tuning_code").prune(answers).numpy()
        candidates = {
            row: (nll[row, : lengths[i]].tolist(), mask[row, : lengths[i]].tolist()) for row, i in enumerate(marked)
        }
        expected = literal_code.dropped(lengths.tolist(), set(kept), candidates, ratios, 0.4)
        assert {(int(i), int(j)) for i, j in zip(*np.nonzero(mask & ~keep), strict=True)} == expected, number
        assert not (keep & ~mask).any()
        emptied += bool(mask.any()) and not keep.any()
        untouched += bool(mask.any()) and bool((keep == mask).all())
    assert emptied > 100  # it may leave nothing of Q2
    assert untouched > 10


def test_by_hand_neighbours():
    """A prompt of two, an answer of three: the prompt's neighbour counts 1, what lies beyond the sample 0."""
    mask = torch.tensor([[False, True, True, True]])
    nll = torch.tensor([[0.0, 2.0, 3.0, 5.0]]).log() * mask
    answers = Answers(
        mask, torch.zeros_like(mask), 0.5, torch.Generator(), lengths=torch.tensor([5]), sample_ratio=1.0,
        sequence_tokens=4, survivor_tokens=4, nll=nll.nan_to_num(neginf=0.0),
    )  # fmt: skip
    # Scores (2 + 1 + 3) / 2 = 3, (3 + 2 + 5) / 2 = 5, (5 + 3 + 0) / 2 = 4; round(4 x 0.5) = 2 tokens stay, so 2 go.
    assert pruners.token_pruner("q_tuning_code").prune(answers).tolist() == [[False, True, False, False]]


def test_prompts_as_text():
    assert character_entropy("") == 0.0
    assert character_entropy("aaaa") == 0.0
    assert character_entropy("abab") == pytest.approx(np.log(2))
    pool = Pool(
        lengths=torch.ones(3), sample_ratio=0.34, generator=torch.Generator(),
        prompt_characters=torch.tensor([9, 4, 6]),
        prompt_character_entropy=torch.tensor([0.1, 2.0, 1.0], dtype=torch.float64),
    )  # fmt: skip
    assert pruners.sample_pruner("longest_code").prune(pool).tolist() == [False, True, False]  # the shortest
    assert pruners.sample_pruner("entropy_code").prune(pool).tolist() == [True, False, False]  # the lowest


# In the trainer


def test_the_forward_gives_the_entropy_of_prompts_too(pruned_trainer):  # noqa: F811
    """Against naive logits; and the answers' own values are what they are without it."""
    trainer = pruned_trainer("q_tuning_code", "none", max_steps=1, learning_rate=0.0)
    seen = []
    original = trainer.scorer.score
    trainer.scorer.score = lambda *args: (seen.append(original(*args)), seen[-1])[1]
    trainer.train()
    (documents,), values = seen[0].groups, seen[0].values
    model = tiny_llama()
    for index, document in enumerate(documents):
        with torch.no_grad():
            logits = model(torch.from_numpy(document.input_ids)[None]).logits[0, :-1].double()
        log_probs = logits.log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        answer = torch.from_numpy(document.labels[1:] != -100)
        nll = -log_probs.gather(1, torch.from_numpy(document.input_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(values.sequence_entropy[index], entropy.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            values.entropy[index][values.answer_mask[index]], entropy[answer], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(values.nll[index][values.answer_mask[index]], nll[answer], rtol=1e-5, atol=1e-5)
        assert not values.nll[index][~values.answer_mask[index]].any()


def test_the_plane_is_that_of_the_authors_entropy(pruned_trainer):  # noqa: F811
    trainer = pruned_trainer("q_tuning_code", "q_tuning_code", max_steps=1)
    trainer.train()
    pool = trainer.last_pool
    expected = literal_code.select(np.array(pool["perplexity"]), np.array(pool["entropy"]), 0.5)
    assert {i for i, kept in enumerate(pool["kept"]) if kept} == expected[0] | expected[1] | expected[2]


def test_the_authors_baselines_see_the_prompt(pruned_trainer, tokenizer, scored):  # noqa: F811
    trainer = pruned_trainer("longest_code", "none", max_steps=1)
    drawn = []
    original = trainer.selector._select_of
    trainer.selector._select_of = lambda columns, *rest: (drawn.append(columns), original(columns, *rest))[1]
    trainer.train()
    (columns,) = drawn
    lengths = columns["prompt_characters"].tolist()
    prompts = {len(tokenizer.decode(tokenizer(row["prompt"])["input_ids"])) for row in Dataset.to_list(scored)}
    assert set(lengths) <= prompts
    assert len(set(lengths)) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_factor": 2}, "`sample_pruner` is 'q_tuning_code' and `pool_factor` is 2: set `pool_factor` to 1"),
        ({"score_reuse_steps": 5}, "`sample_pruner` is 'q_tuning_code' and scores are reused: leave out"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        QTuningSFTConfig(str(tmp_path), use_cpu=True, bf16=False, sample_pruner="q_tuning_code", **options)
