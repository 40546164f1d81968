"""The method against a literal transcription of the paper, against values worked by hand, and its invariants."""

import math
import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtuning_trl.method import (
    SampleSelection,
    budget_size,
    pool_token_keep_mask,
    sample_statistics,
    select_samples,
    token_keep_mask,
    token_scores,
)

RATIOS = [0.0625, 0.1, 0.125, 0.25, 0.29, 0.3, 0.33, 0.5, 0.57, 0.7, 0.9, 0.999, 1.0]
MASKS = ("keep", "quadrant", "filled", "trimmed", "prune_tokens")
THRESHOLDS = ("perplexity_low", "perplexity_high", "entropy_low", "entropy_high")

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def select(perplexity, entropy, ratio: float, stop_at_budget: bool = False) -> SampleSelection:
    return select_samples(
        torch.tensor(perplexity, dtype=torch.float64), torch.tensor(entropy, dtype=torch.float64), ratio, stop_at_budget
    )


def indices(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# Against the literal transcription


def assert_selects_as_written(perplexity, entropy, ratio: float) -> SampleSelection:
    perplexity, entropy = [float(x) for x in perplexity], [float(x) for x in entropy]
    for stop in (True, False):
        ours = select(perplexity, entropy, ratio, stop)
        theirs = literal.select_samples(perplexity, entropy, ratio, stop)
        for name in MASKS:
            assert getattr(ours, name).tolist() == getattr(theirs, name), (name, ratio, perplexity, entropy)
        for name in THRESHOLDS:
            assert getattr(ours, name) == getattr(theirs, name), (name, ratio, perplexity, entropy)
    return ours


def correlated_pool(rng: np.random.Generator, size: int, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal perplexity and an entropy that correlates with its logarithm."""
    first, second = rng.standard_normal((2, size))
    return np.exp(1.0 + 0.6 * first), 1.2 + 0.4 * (rho * first + math.sqrt(1 - rho**2) * second)


def awkward_pools(rng: np.random.Generator, size: int):
    """Ties, constant axes, extreme values and spreads next to nothing."""
    perplexity, entropy = correlated_pool(rng, size, 0.6)
    few = rng.integers(1, 4, (2, size))
    yield few[0], few[1] / 2
    yield few[0], few[0]  # on the diagonal
    yield few[0], -few[0] + 4  # on the other one
    yield np.full(size, 3.0), entropy
    yield perplexity, np.zeros(size)
    yield np.full(size, 1.0), np.zeros(size)
    yield 10.0 ** rng.uniform(0, 300, size), entropy
    yield np.where(rng.random(size) < 0.2, 1e300, perplexity), entropy
    yield 1 + rng.integers(0, 5, size) * np.finfo(float).eps, rng.integers(0, 5, size) * 5e-324
    yield 1e15 + rng.integers(0, 3, size), 1e-12 * rng.random(size)
    yield np.round(perplexity, 1), np.round(entropy, 1)


def test_samples_are_selected_as_the_paper_writes_it():
    rng = np.random.default_rng(0)
    seen = Counter()
    sizes = [*range(1, 65), *rng.integers(1, 65, 2500)]
    for number, size in enumerate(sizes):
        pool = correlated_pool(rng, size, rho=(0.0, 0.3, 0.6, 0.8, 0.9)[number % 5])
        selection = assert_selects_as_written(*pool, RATIOS[number % len(RATIOS)])
        seen.update({"filled": bool(selection.filled.any()), "trimmed": bool(selection.trimmed.any())})
        seen.update(selection.quadrant.tolist())
    # The pools have exercised every branch.
    assert min(seen[name] for name in ("filled", "trimmed", 0, 1, 2, 3, 4)) > 20


def test_awkward_pools_are_selected_as_the_paper_writes_it():
    rng = np.random.default_rng(1)
    in_two_corners = 0
    for number in range(100):
        size = number % 64 + 1
        for kind, (perplexity, entropy) in enumerate(awkward_pools(rng, size)):
            selection = assert_selects_as_written(perplexity, entropy, RATIOS[(number + kind) % len(RATIOS)])
            in_two_corners += (
                selection.perplexity_low == selection.perplexity_high
                and selection.entropy_low == selection.entropy_high
            )
    assert in_two_corners > 100


@pytest.mark.parametrize(("size", "pools"), [(512, 10), (10_000, 1)])
def test_large_pools_are_selected_as_the_paper_writes_it(size, pools):
    rng = np.random.default_rng(2)
    for number in range(pools):
        ratio = (0.0625, 0.125, 0.25, 0.5, 0.7)[(number + 2) % 5]
        assert_selects_as_written(*correlated_pool(rng, size, 0.8), ratio)
    if size == 512:
        for perplexity, entropy in awkward_pools(rng, size):
            assert_selects_as_written(perplexity, entropy, 0.25)


def test_the_transcribed_quantile_is_the_smallest_value_that_covers_the_fraction():
    """NumPy's `inverted_cdf` is the paper's definition."""
    rng = np.random.default_rng(3)
    for size in range(1, 40):
        values = rng.integers(0, 10, size).astype(float)
        for level in rng.random(5):
            covering = [v for v in values if Fraction(int((values <= v).sum()), size) >= Fraction(float(level))]
            assert np.quantile(values, level, method="inverted_cdf") == min(covering)


def random_answers(rng: np.random.Generator, samples: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Perplexities, and answers that start anywhere, in one span or many; some are empty."""
    perplexity = np.exp(rng.gamma(1.0, 1.0, (samples, positions)))
    if rng.random() < 0.5:
        perplexity = np.ceil(perplexity)  # ties
    mask = rng.random((samples, positions)) < rng.random((samples, 1))
    start = rng.integers(0, positions, samples)
    one_span = np.arange(positions) >= start[:, None]
    return perplexity, np.where(rng.random((samples, 1)) < 0.5, one_span, mask)


def test_tokens_are_scored_and_kept_as_the_paper_writes_it():
    rng = np.random.default_rng(4)
    for number in range(250):
        perplexity, mask = random_answers(rng, 4, int(rng.integers(1, 24)))
        protected = rng.random(mask.shape) < rng.choice([0.0, 0.1, 0.8])  # also outside the answer
        weight, ratio = (0.0, 0.25, 0.5, 0.9, 1.0)[number % 5], RATIOS[number % len(RATIOS)]
        scores = token_scores(torch.from_numpy(perplexity), torch.from_numpy(mask), weight)
        keep = token_keep_mask(scores, torch.from_numpy(mask), ratio, torch.from_numpy(protected))
        for row in range(len(mask)):
            expected = literal.token_scores(perplexity[row].tolist(), mask[row].tolist(), weight)
            assert scores[row].tolist() == expected
            kept = literal.token_keep_mask(expected, mask[row].tolist(), ratio, protected[row].tolist())
            assert keep[row].tolist() == kept


def test_one_token_budget_for_a_pool_is_ranked_together():
    rng = np.random.default_rng(6)
    for number in range(250):
        perplexity, mask = random_answers(rng, int(rng.integers(1, 6)), int(rng.integers(1, 20)))
        protected = rng.random(mask.shape) < rng.choice([0.0, 0.1, 0.8])
        scores = token_scores(torch.from_numpy(perplexity), torch.from_numpy(mask), 0.5)
        budget = int(rng.integers(0, mask.sum() + 3))
        keep = pool_token_keep_mask(scores, torch.from_numpy(mask), budget, torch.from_numpy(protected))
        expected = literal.pool_token_keep_mask(scores.tolist(), mask.tolist(), budget, protected.tolist())
        assert keep.tolist() == expected, number
        assert int(keep.sum()) == min(int(mask.sum()), max(budget, int((mask & protected).sum())))


@quick
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.sampled_from([0.125, 0.25, 0.5]), st.integers(0, 99))
def test_the_budget_of_a_pool_holds_in_tokens(lengths, ratio, seed):
    """Stage 1 and stage 2 together: `floor(r_sample r_token tokens)` wherever Q2's side has the tokens to give."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(np.arange(12) < np.array(lengths)[:, None])
    nll, entropy = (torch.from_numpy(rng.gamma(1.0, 1.0, mask.shape)) for _ in range(2))
    protected = mask & (torch.arange(12) == torch.tensor(lengths)[:, None] - 1)  # the last token of each answer
    selection = select_samples(*sample_statistics(nll, entropy, mask), ratio)
    side, whole = selection.prune_tokens, selection.keep & ~selection.prune_tokens
    asked = budget_size(ratio * 0.5, int(mask.sum()))
    untouched = int(mask[whole].sum())
    scores = token_scores(nll.exp(), mask, 0.5)
    keep = pool_token_keep_mask(scores[side], mask[side], max(0, asked - untouched), protected[side])
    reached = untouched + int(keep.sum())
    fixed = untouched + int(side.sum())  # a protected token an answer
    available = untouched + int(mask[side].sum())
    assert reached == min(max(asked, fixed), available)


def test_a_bisection_that_stops_at_the_budget_fills_less():
    """By the share of survivors that fill up, over simulated pools (docs/method.md)."""
    rng = np.random.default_rng(7)
    for size, ratio in ((8, 0.25), (16, 0.125), (32, 0.25)):
        filled = [0, 0]
        for _ in range(200):
            pool = correlated_pool(rng, size, 0.8)
            for stop in (False, True):
                filled[stop] += int(select(*pool, ratio, stop).filled.sum())
        assert filled[True] < 0.8 * filled[False], (size, ratio, filled)


def test_samples_are_scored_as_the_paper_writes_it():
    rng = np.random.default_rng(5)
    for _ in range(50):
        nll, entropy = rng.gamma(1.0, 1.0, (2, 3, 12))
        mask = rng.random((3, 12)) < 0.5
        mask[:, rng.integers(0, 12)] = True
        perplexities, entropies = sample_statistics(*map(torch.from_numpy, (nll, entropy, mask)))
        for row in range(3):
            expected = literal.statistics(nll[row][mask[row]], entropy[row][mask[row]])
            assert (float(perplexities[row]), float(entropies[row])) == pytest.approx(expected, rel=1e-13)


# Worked by hand


def test_by_hand_statistics_of_a_sample():
    # PPL = exp(mean nll): (ln 2 + ln 8) / 2 = 2 ln 2, so 4 (the mean of the tokens' perplexities would be 5). The
    # second sample has one token, with ln 3, so 3. Ent = mean H: (0.2 + 1.0) / 2 = 0.6, and 0.4.
    # Outside the answer there may be anything.
    ln2, ln3, ln8, nan, inf = math.log(2), math.log(3), math.log(8), math.nan, math.inf
    nll = torch.tensor([[9.0, ln2, ln8], [ln3, inf, nan]], dtype=torch.float64)
    entropy = torch.tensor([[nan, 0.2, 1.0], [0.4, 7.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    perplexity, mean_entropy = sample_statistics(nll, entropy, mask)
    assert perplexity.tolist() == pytest.approx([4.0, 3.0], rel=1e-15)
    assert mean_entropy.tolist() == pytest.approx([0.6, 0.4], rel=1e-15)
    assert perplexity.dtype == mean_entropy.dtype == torch.float64


def test_by_hand_the_corners_meet_the_budget():
    # Eight samples, budget floor(0.25 * 8) = 2. The quantiles at a are the ceil(8a)-th and the ceil(8(1-a))-th value.
    # a = 0.245: ranks ceil(1.96) = 2 and ceil(6.04) = 7. Q2 (PPL >= 7, Ent <= 2): (8, 1).
    # Q4 (PPL <= 2, Ent >= 7): (1, 8).
    # r = 2/8 is not below 0.25: tighten. From a = 0.1225 on: ranks ceil(0.98) = 1 and ceil(7.02) = 8, the same two, and
    # the thresholds 1 and 8. No third sample lies in a corner.
    selection = select([8, 1, 2, 3, 4, 5, 6, 7], [1, 8, 2, 3, 4, 5, 7, 6], 0.25)
    assert indices(selection.keep) == [0, 1]
    assert selection.quadrant.tolist() == [2, 4, 0, 0, 0, 0, 0, 0]
    assert indices(selection.prune_tokens) == [0]
    assert not selection.filled.any()
    assert not selection.trimmed.any()
    assert [getattr(selection, name) for name in THRESHOLDS] == [1, 8, 1, 8]


@pytest.mark.parametrize(("ratio", "filled"), [(0.5, [6, 7]), (0.375, [7])])
def test_by_hand_the_fill(ratio, filled):
    # The same pool, with budgets of 4 and 3. At every level up to 0.49 only (8, 1) and (1, 8) lie in Q2 and Q4:
    # r = 0.25 is below the ratio, so each step relaxes: a = 0.49 (1 - 2^-10) = 0.4895, ranks ceil(3.916) = 4 and
    # ceil(4.084) = 5, thresholds 4 and 5. Q1 (both >= 5): (5, 5), (6, 7), (7, 6). Q3 (both <= 4): (2, 2) to (4, 4).
    # Fill: |P - E| is 1/7 for (6, 7) and (7, 6), 0 on the diagonal. A tie goes to the higher PPL, (7, 6). It has P > E
    # and is pruned as Q2; (6, 7) is kept whole.
    selection = select([8, 1, 2, 3, 4, 5, 6, 7], [1, 8, 2, 3, 4, 5, 7, 6], ratio)
    assert [getattr(selection, name) for name in THRESHOLDS] == [4, 5, 4, 5]
    assert selection.quadrant.tolist() == [2, 4, 3, 3, 3, 1, 1, 1]
    assert indices(selection.filled) == filled
    assert indices(selection.keep) == [0, 1, *filled]
    assert indices(selection.prune_tokens) == [0, 7]
    assert not selection.trimmed.any()


@pytest.mark.parametrize(("second", "trimmed"), [(8.8, 1), (9.0, 2)])
def test_by_hand_the_trim(second, trimmed):
    # Ten samples, budget floor(0.25 * 10) = 2. In Q2 or Q4 lie (10, 1) at rank 1, (second, 2) and (2, 9) at rank 2:
    # r is 0.1 up to a = 0.1 and 0.3 above. The levels: 0.245 (0.3, tighten), 0.1225 (tighten), 0.06125 (0.1, relax),
    # 0.091875 (relax), 0.1071875 (tighten), 0.09953125 (relax), 0.103359375 (tighten), 0.1014453125 (tighten),
    # 0.10048828125 (tighten), 0.100009765625: ranks ceil(1.0001) = 2 and ceil(8.9999) = 9. It ends one over.
    # |P - E|: (10, 1) has 1; (2, 9) has |1/9 - 8/9| = 7/9 = 0.778. (8.8, 2) has 7.8/9 - 1/9 = 0.756: it goes.
    # (9, 2) has 8/9 - 1/9, a tie: the higher PPL stays, and (2, 9) goes.
    perplexity = [10, second, 2, 1, 3, 4, 5, 6, 7, 8]
    entropy = [1, 2, 9, 3, 4, 5, 6, 7, 8, 10]
    selection = select(perplexity, entropy, 0.25)
    assert [getattr(selection, name) for name in THRESHOLDS] == [2, second, 2, 9]
    assert selection.quadrant.tolist() == [2, 2, 4, 0, 0, 0, 0, 0, 0, 0]
    assert indices(selection.trimmed) == [trimmed]
    assert indices(selection.keep) == [i for i in (0, 1, 2) if i != trimmed]
    assert indices(selection.prune_tokens) == [i for i in (0, 1) if i != trimmed]
    assert not selection.filled.any()


def test_by_hand_a_constant_axis():
    # Every entropy is 0.5, so every sample is at once low and high: Q2 is PPL >= ppl_hi, Q4 is PPL <= ppl_lo. Four
    # samples, budget 2. a = 0.245: ranks ceil(0.98) = 1 and ceil(3.02) = 4: 5 in Q2 and 1 in Q4, r = 0.5, tighten.
    # Lower levels give the same.
    selection = select([2, 5, 1, 3], [0.5] * 4, 0.5)
    assert selection.quadrant.tolist() == [0, 2, 4, 0]
    assert indices(selection.keep) == [1, 2]
    assert indices(selection.prune_tokens) == [1]


def test_by_hand_a_sample_in_all_corners():
    # One sample is low and high on both axes. P = E = 0 is not above the diagonal: Q4, kept whole.
    one = select([7.0], [1.0], 0.0625)
    assert (one.keep.tolist(), one.quadrant.tolist(), one.prune_tokens.tolist()) == ([True], [4], [False])
    assert [getattr(one, name) for name in THRESHOLDS] == [7, 7, 1, 1]
    # Three samples, all to be kept. No level reaches r = 1, so a = 0.4895: ranks ceil(1.47) = 2 and ceil(1.53) = 2. The
    # median (3, 2) of both axes lies in all corners. P = 2/3 > E = 1/2: Q2. (1, 1) is in Q3, (4, 3) in Q1.
    # Both fill up; P - E is 0 on both, so neither has its tokens pruned.
    three = select([1, 3, 4], [1, 2, 3], 1.0)
    assert three.quadrant.tolist() == [3, 2, 1]
    assert three.filled.tolist() == [True, False, True]
    assert three.prune_tokens.tolist() == [False, True, False]


def test_by_hand_a_heavy_tail_leaves_the_fill_to_entropy():
    # PPL 1 to 4 and 1000: P is 0 but for the outlier, so |P - E| of the rest is E, and the fill goes by entropy alone.
    # Entropies rise with PPL: Q2 and Q4 hold but the median, (3, 3), of which P = 2/999 < E = 1/2: Q4.
    # E = 0, 1/4, 1/2, 3/4, 1: (4, 4) has 3/4 - 3/999, (2, 2) has 1/4 - 1/999, (1000, 5) has |1 - 1| = 0. Budget 3.
    selection = select([1, 2, 3, 4, 1000], [1, 2, 3, 4, 5], 0.6)
    assert selection.quadrant[2] == 4
    assert indices(selection.filled) == [1, 3]
    assert indices(selection.keep) == [1, 2, 3]
    assert not selection.prune_tokens.any()


@pytest.mark.parametrize(
    ("weight", "scores", "kept"),
    [
        # PPL 2, 5, 1, 4; the missing neighbours are 2 and 4. Kept: floor(0.5 * 4) = 2.
        (0.0, [2, 5, 1, 4], [0, 2]),  # own values: the lowest are 1 and 2
        # 0.5*2 + 0.5*(2+5) = 4.5; 0.5*5 + 0.5*(2+1) = 4; 0.5*1 + 0.5*(5+4) = 5; 0.5*4 + 0.5*(1+4) = 4.5.
        # 4 is the lowest, and of the two 4.5 the earlier. (With the neighbours' average it would be tokens 0 and 2.)
        (0.5, [4.5, 4, 5, 4.5], [0, 1]),
        (1.0, [7, 3, 9, 5], [1, 3]),  # 2+5, 2+1, 5+4, 1+4
    ],
)
def test_by_hand_token_scores(weight, scores, kept):
    # A prompt position on the left and padding on the right.
    perplexity = torch.tensor([[100.0, 2, 5, 1, 4, 100]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True, False]])
    result = token_scores(perplexity, mask, weight)
    assert result.tolist() == [[0, *scores, 0]]
    assert indices(token_keep_mask(result, mask, 0.5)[0]) == [i + 1 for i in kept]


def test_by_hand_two_spans():
    # Two turns, PPL 3 1 | 4 2, lambda 0.5: 1.5 + 0.5*(3+1) = 3.5; 0.5 + 0.5*(3+1) = 2.5; 2 + 0.5*(4+2) = 5;
    # 1 + 0.5*(4+2) = 4. What is between the turns does not count.
    perplexity = torch.tensor([[3.0, 1, 50, 4, 2]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True]])
    assert token_scores(perplexity, mask, 0.5).tolist() == [[3.5, 2.5, 0, 5, 4]]


def test_by_hand_protected_tokens():
    scores = torch.tensor([[0.0, 5, 1, 2, 9]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True]])
    last = torch.tensor([[True, False, False, False, True]])  # the position in the prompt is no answer token
    # Two of four: the protected one, though it has the highest score, and the lowest other.
    assert token_keep_mask(scores, mask, 0.5, last).tolist() == [[False, False, True, False, True]]
    # floor(0.29 * 4) = 1 is the protected one; with three protected the budget yields.
    assert indices(token_keep_mask(scores, mask, 0.29, last)[0]) == [4]
    three = torch.tensor([[True, True, False, True, True]])
    assert indices(token_keep_mask(scores, mask, 0.29, three)[0]) == [1, 3, 4]


# Exact budgets


def test_a_budget_is_the_floor_of_the_decimal():
    for ratio in RATIOS + [round(0.01 * i, 2) for i in range(1, 101)]:
        for total in [*range(1, 400), 512, 1000, 4096, 10_000, 123_457, 1_000_000]:
            exact = math.floor(Fraction(str(ratio)) * total)
            assert budget_size(ratio, total) == max(1, exact), (ratio, total)
    assert budget_size(0.7, 90) == 63
    assert budget_size(0.29, 100) == 29
    assert budget_size(0.57, 100) == 57
    assert budget_size(0.0625, 8) == 1


def test_samples_meet_the_budget_exactly():
    rng = np.random.default_rng(6)
    for number in range(300):
        size = int(rng.integers(1, 130))
        ratio = float(Decimal(int(rng.integers(1, 1001))) / 1000)
        pool = correlated_pool(rng, size, 0.8) if number % 2 else tuple(rng.integers(1, 4, (2, size)))
        selection = select(*pool, ratio)
        assert int(selection.keep.sum()) == max(1, math.floor(Decimal(str(ratio)) * size))


def test_tokens_meet_the_budget_exactly():
    rng = np.random.default_rng(7)
    for _ in range(200):
        ratio = float(Decimal(int(rng.integers(1, 1001))) / 1000)
        perplexity, mask = map(torch.from_numpy, random_answers(rng, 5, int(rng.integers(1, 130))))
        protected = torch.from_numpy(rng.random(mask.shape) < 0.05)
        scores = token_scores(perplexity, mask, 0.5)
        plain = token_keep_mask(scores, mask, ratio)
        shielded = token_keep_mask(scores, mask, ratio, protected)
        for row in range(5):
            answer, guarded = int(mask[row].sum()), int((mask & protected)[row].sum())
            budget = min(answer, max(1, math.floor(Decimal(str(ratio)) * answer)))
            assert int(plain[row].sum()) == budget
            assert int(shielded[row].sum()) == max(budget, guarded)
        assert not (plain & ~mask).any()  # a prompt position is never in the mask
        assert not (shielded & ~mask).any()
        assert not (mask & protected & ~shielded).any()


def test_a_token_ratio_means_its_decimal():
    for ratio, answer, kept in [(0.7, 90, 63), (0.29, 100, 29), (0.57, 100, 57), (0.25, 3, 1), (1.0, 7, 7)]:
        mask = torch.ones(1, answer, dtype=torch.bool)
        assert int(token_keep_mask(torch.rand(1, answer), mask, ratio).sum()) == kept


# Invariants

samples = st.tuples(
    st.one_of(st.integers(1, 4).map(float), st.floats(1, 1e6)),
    st.one_of(st.integers(0, 3).map(float), st.floats(0, 12)),
)
pools = st.lists(samples, min_size=1, max_size=40)
ratios = st.sampled_from(RATIOS)


@quick
@given(pools, ratios, st.randoms(use_true_random=False))
def test_the_order_of_the_pool_does_not_matter(pool, ratio, shuffler):
    shuffled = list(pool)
    shuffler.shuffle(shuffled)

    def outcome(samples):
        selection = select(*zip(*samples, strict=True), ratio)
        columns = [getattr(selection, name).tolist() for name in MASKS]
        thresholds = [getattr(selection, name) for name in THRESHOLDS]
        return thresholds, Counter(zip(samples, *columns, strict=True))

    # Identical samples can trade places; so each sample's fate is compared as a multiset.
    assert outcome(pool) == outcome(shuffled)


def test_a_permuted_pool_of_distinct_samples_permutes_the_selection():
    rng = np.random.default_rng(8)
    for number in range(50):
        size = int(rng.integers(2, 65))
        perplexity, entropy = map(torch.from_numpy, correlated_pool(rng, size, 0.7))
        order = torch.from_numpy(rng.permutation(size))
        before = select_samples(perplexity, entropy, RATIOS[number % len(RATIOS)])
        after = select_samples(perplexity[order], entropy[order], RATIOS[number % len(RATIOS)])
        for name in MASKS:
            assert torch.equal(getattr(before, name)[order], getattr(after, name))


@quick
@given(pools, ratios)
def test_the_parts_of_a_selection_fit_together(pool, ratio):
    perplexity, entropy = (torch.tensor(axis, dtype=torch.float64) for axis in zip(*pool, strict=True))
    s = select_samples(perplexity, entropy, ratio)
    corner = (s.quadrant == 2) | (s.quadrant == 4)
    # Corners come before the fill, and are dropped only without one.
    assert not (s.filled.any() and s.trimmed.any())
    assert not (s.filled.any() and (corner & ~s.keep).any())
    assert torch.equal(s.filled, s.keep & ~corner)
    assert torch.equal(s.trimmed, corner & ~s.keep)
    # Each sample has one corner, and it lies there; outside of the corners is what lies in none.
    high_ppl, low_ppl = perplexity >= s.perplexity_high, perplexity <= s.perplexity_low
    high_ent, low_ent = entropy >= s.entropy_high, entropy <= s.entropy_low
    places = {1: high_ppl & high_ent, 2: high_ppl & low_ent, 3: low_ppl & low_ent, 4: low_ppl & high_ent}
    for name, place in places.items():
        assert not ((s.quadrant == name) & ~place).any()
    assert torch.equal(s.quadrant == 0, ~torch.stack(list(places.values())).any(dim=0))
    # Q2 loses tokens, Q4 does not, and nobody who is gone has tokens to lose.
    assert not (s.prune_tokens & ~s.keep).any()
    assert not (s.prune_tokens & (s.quadrant == 4)).any()
    assert not (s.keep & (s.quadrant == 2) & ~s.prune_tokens).any()
    assert s.perplexity_low <= s.perplexity_high
    assert s.entropy_low <= s.entropy_high


grid_pools = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40)
steps = st.lists(st.floats(0.01, 100), min_size=31, max_size=31)


@quick
@given(grid_pools, ratios, steps, steps)
def test_quadrants_do_not_change_under_increasing_transforms(pool, ratio, ppl_steps, ent_steps):
    """Quantiles only know the order. What the side of the diagonal decides is not meant to be invariant."""
    perplexity, entropy = (np.array(axis) for axis in zip(*pool, strict=True))
    stretched_ppl, stretched_ent = np.cumsum(ppl_steps), np.cumsum(ent_steps)
    before = select(1 + perplexity, entropy, ratio)
    after = select(stretched_ppl[perplexity], stretched_ent[entropy], ratio)

    assert after.perplexity_low == stretched_ppl[int(before.perplexity_low) - 1]
    assert after.perplexity_high == stretched_ppl[int(before.perplexity_high) - 1]
    assert after.entropy_low == stretched_ent[int(before.entropy_low)]
    assert after.entropy_high == stretched_ent[int(before.entropy_high)]
    in_q2 = (1 + perplexity >= before.perplexity_high) & (entropy <= before.entropy_low)
    in_q4 = (1 + perplexity <= before.perplexity_low) & (entropy >= before.entropy_high)
    same = torch.from_numpy(~(in_q2 & in_q4))
    assert torch.equal(before.quadrant[same], after.quadrant[same])
    assert bool(torch.isin(after.quadrant[~same], torch.tensor([2, 4])).all())


def test_padding_does_not_change_the_tokens_kept():
    rng = np.random.default_rng(9)
    for number in range(100):
        perplexity, mask = map(torch.from_numpy, random_answers(rng, 4, int(rng.integers(1, 24))))
        protected = torch.from_numpy(rng.random(mask.shape) < 0.1)
        ratio, width = RATIOS[number % len(RATIOS)], int(rng.integers(1, 9))

        def keep(extra, perplexity=perplexity, mask=mask, protected=protected, ratio=ratio):
            padding = torch.full((4, extra), 1e-3, dtype=torch.float64)  # lower than any score
            nothing = torch.zeros(4, extra, dtype=torch.bool)
            wide_mask = torch.cat([mask, nothing], dim=1)
            scores = token_scores(torch.cat([perplexity, padding], dim=1), wide_mask, 0.5)
            return token_keep_mask(scores, wide_mask, ratio, torch.cat([protected, ~nothing], dim=1))

        assert torch.equal(keep(0), keep(width)[:, : mask.shape[1]])
        assert not keep(width)[:, mask.shape[1] :].any()


def test_a_sample_does_not_depend_on_its_neighbours_in_the_pool():
    rng = np.random.default_rng(10)
    perplexity, mask = map(torch.from_numpy, random_answers(rng, 16, 20))
    scores = token_scores(perplexity, mask, 0.5)
    keep = token_keep_mask(scores, mask, 0.7)
    for row in range(16):
        alone = token_scores(perplexity[row : row + 1], mask[row : row + 1], 0.5)
        assert torch.equal(alone[0], scores[row])
        assert torch.equal(token_keep_mask(alone, mask[row : row + 1], 0.7)[0], keep[row])


def test_spans_do_not_leak_into_each_other():
    """Whatever stands in the first turn, the second turn's scores are the same."""
    mask = torch.tensor([[False, True, True, False, True, True, True]])
    rng = np.random.default_rng(11)
    perplexity = torch.from_numpy(np.exp(rng.random((1, 7))))
    before = token_scores(perplexity, mask, 0.5)
    changed = perplexity.clone()
    changed[:, :4] = torch.tensor([1e6, 1e3, 1e4, 1e9])
    after = token_scores(changed, mask, 0.5)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before[:, 1:3], after[:, 1:3])


def test_float32_decides_as_float64():
    rng = np.random.default_rng(12)
    for number in range(60):
        perplexity, entropy = (torch.from_numpy(axis).float() for axis in correlated_pool(rng, 33, 0.8))
        ratio = RATIOS[number % len(RATIOS)]
        single, double = (
            select_samples(perplexity, entropy, ratio),
            select_samples(perplexity.double(), entropy.double(), ratio),
        )
        for name in MASKS:
            assert torch.equal(getattr(single, name), getattr(double, name))
        for name in THRESHOLDS:
            assert getattr(single, name) == getattr(double, name)
    nll, entropy, scores = torch.from_numpy(rng.gamma(1.0, 1.0, (3, 4, 40))).float()
    mask = torch.from_numpy(rng.random((4, 40)) < 0.5)
    single, double = sample_statistics(nll, entropy, mask), sample_statistics(nll.double(), entropy.double(), mask)
    for one, other in zip(single, double, strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)
    assert torch.equal(token_keep_mask(scores, mask, 0.5), token_keep_mask(scores.double(), mask, 0.5))


# Bad input


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_budget_holds_although_a_perplexity_overflows(weight):
    """exp(710) is infinite in float64, though an NLL of 710 nats is not."""
    nll = torch.tensor([[0.0, 0.0, 0.0, 720.0, 710.0, 1.0, 730.0]], dtype=torch.float64)
    mask = nll > 0
    scores = token_scores(nll.exp(), mask, weight)
    assert not scores.isnan().any()
    assert int(token_keep_mask(scores, mask, 0.75).sum()) == 3


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_pool_with_a_value_that_is_no_number_is_refused(axis, value):
    pool = [[3.0, 2.0, 1.0], [0.1, 0.2, 0.3]]
    select(*pool, 0.5)
    pool[axis][1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        select(*pool, 0.5)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="empty"):
        select([], [], 0.5)


def test_a_sample_without_an_answer_token_is_refused():
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match=r"2 of 3 samples have no answer token"):
        sample_statistics(torch.ones(3, 2), torch.ones(3, 2), mask)


def test_a_sample_without_an_answer_token_keeps_none():
    mask = torch.tensor([[False, False, False], [True, True, True]])
    scores = token_scores(torch.ones(2, 3, dtype=torch.float64), mask, 0.5)
    assert token_keep_mask(scores, mask, 1.0).tolist() == [[False] * 3, [True] * 3]


# Purity


def test_nothing_is_drawn_and_no_input_is_changed():
    generator = torch.Generator().manual_seed(0)
    nll, entropy = torch.rand(2, 6, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[:, 0] = True
    inputs = [nll, entropy, mask]
    copies = [tensor.clone() for tensor in inputs]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    perplexity, mean_entropy = sample_statistics(nll, entropy, mask)
    first = select_samples(perplexity, mean_entropy, 0.5)
    scores = token_scores(nll, mask, 0.5)
    keep = token_keep_mask(scores, mask, 0.5, ~mask | (nll > 0.9))
    again = select_samples(perplexity, mean_entropy, 0.5)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in MASKS)
    assert torch.equal(keep, token_keep_mask(scores, mask, 0.5, ~mask | (nll > 0.9)))


def test_rows_of_a_selection():
    whole = select([8, 1, 2, 3, 4, 5, 6, 7], [1, 8, 2, 3, 4, 5, 7, 6], 0.5)
    part = whole.rows(slice(5, 8))
    assert part.quadrant.tolist() == [1, 1, 1]
    assert part.filled.tolist() == [False, True, True]
    assert part.keep.tolist() == [False, True, True]
    assert part.prune_tokens.tolist() == [False, False, True]
    assert part.trimmed.tolist() == [False, False, False]
    assert [getattr(part, name) for name in THRESHOLDS] == [getattr(whole, name) for name in THRESHOLDS]
