"""
The method: Q-Tuning as pure tensor functions (arXiv 2509.23873).

Read it top to bottom, in the paper's order: statistics of a sample (eqs. 4 and 5), the Error-Uncertainty plane and the
bisection that prunes samples (Algorithm 1), the neighbour-aware score that prunes tokens (eq. 7). There is no model, no
I/O and no random number in here. Where the paper leaves a gap, the docstring says "Gap" and how it is read.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Algorithm 1's K_max; "fewer than 10 are usual". In a pool of 8 the share of samples moves in coarse steps, so there
# the number of bisections decides whether it ends just above a step or just below it (see docs/method.md).
MAX_BISECTION_STEPS = 10
# Where the loop may stop earlier: this near to the budget, in shares of the pool (the authors' code, trainer.py:292).
STOP_WITHIN = 0.01
# Algorithm 1, line 1: the highest quantile level, just short of the median.
MAX_QUANTILE_LEVEL = 0.49


def budget_size(ratio: float, total: int) -> int:
    """
    Number of items that `ratio` of `total` leaves: `floor(ratio * total)` (eq. 1), and at least one.

    Gap: with a batch of 8 and a ratio of 6.25% the paper's floor is 0; one is kept. A decimal ratio means what it says:
    0.7 of 90 is 63, although the nearest float product lies just below it.
    """
    return max(1, math.floor(ratio * total + 1e-9))


def sample_statistics(nll: Tensor, entropy: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Perplexity (error, eq. 4) and mean predictive entropy (uncertainty, eq. 5) of each sample.

    Args:
        nll (`Tensor` of shape `(samples, positions)`): Negative log-likelihood of each token, in nats.
        entropy (`Tensor` of shape `(samples, positions)`): Entropy of the model's prediction of each token, in nats.
        answer_mask (`Tensor` of shape `(samples, positions)`, bool): The answer tokens T(x). At least one a sample.

    Returns:
        `tuple[Tensor, Tensor]`: `PPL = exp(mean_i nll_i)` and `Ent = mean_i H_i`, each of shape `(samples,)`, float64.

    Raises:
        `ValueError`: If a sample has no answer token.
    """
    count = answer_mask.sum(dim=1)
    if bool((count == 0).any()):
        raise ValueError(f"{int((count == 0).sum())} of {len(count)} samples have no answer token to be scored by.")
    mean_nll = nll.double().masked_fill(~answer_mask, 0.0).sum(dim=1) / count
    mean_entropy = entropy.double().masked_fill(~answer_mask, 0.0).sum(dim=1) / count
    return mean_nll.exp(), mean_entropy


@dataclass(frozen=True)
class SampleSelection:
    """
    What stage 1 (Algorithm 1) decided about a pool of samples.

    Args:
        keep (`Tensor` of shape `(samples,)`, bool): The survivors.
        quadrant (`Tensor` of shape `(samples,)`, int64): 1 to 4 for the corners Q1 to Q4 of the EU plane, 0 for a
            sample between the thresholds.
        filled (`Tensor` of shape `(samples,)`, bool): Survivors from outside Q2 and Q4, kept to reach the budget.
        trimmed (`Tensor` of shape `(samples,)`, bool): Samples of Q2 and Q4 dropped to meet the budget.
        prune_tokens (`Tensor` of shape `(samples,)`, bool): Survivors whose answer tokens stage 2 prunes.
        perplexity_low, perplexity_high, entropy_low, entropy_high (`float`): The final thresholds.
        weight (`Tensor` of shape `(samples,)`, float64, *optional*): Weights of the survivors' losses; 1 without it.
    """

    keep: Tensor
    quadrant: Tensor
    filled: Tensor
    trimmed: Tensor
    prune_tokens: Tensor
    perplexity_low: float
    perplexity_high: float
    entropy_low: float
    entropy_high: float
    weight: Tensor | None = None

    def rows(self, rows: slice) -> "SampleSelection":
        """What was decided about some of the samples; the thresholds stay those of the pool."""
        parts: dict[str, Any] = {
            name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return SampleSelection(**parts)


def select_samples(
    perplexity: Tensor, entropy: Tensor, sample_ratio: float, stop_at_budget: bool = True
) -> SampleSelection:
    """
    Stage 1, sample pruning (Algorithm 1): bisect the quantiles of both axes until Q2 and Q4 hold the budget.

    - Gap: the bisection can end above or below the budget. The budget is met exactly: above it, the samples of Q2 and
      Q4 with the lowest supplementary score `|P - E|` are dropped; below it, the rest fills up with the highest.
    - Gap: a sample can lie in two corners at once (ties, a constant axis, the median of a small odd pool). It counts
      once: Q2 and Q4 win over Q1 and Q3, and between Q2 and Q4 the side of the diagonal decides.
    - Gap: which stage-2 policy a filled-in sample gets. The side of the diagonal decides: `P > E` as in Q2 (its tokens
      are pruned), otherwise as in Q4 (kept whole).
    - Ties in `|P - E|` go to the higher perplexity, then the higher entropy, then the earlier sample, so that the
      survivors do not depend on the order of the pool.

    Args:
        perplexity (`Tensor` of shape `(samples,)`): Error of each sample (eq. 4).
        entropy (`Tensor` of shape `(samples,)`): Mean predictive entropy of each sample, in nats (eq. 5).
        sample_ratio (`float`): r_sample, the share of samples to keep, in (0, 1].
        stop_at_budget (`bool`): Whether the bisection stops as soon as Q2 and Q4 hold the budget to within 0.01 of the
            pool, as in the authors' code. Otherwise it takes all ten steps, and may leave the budget behind again.

    Returns:
        [`SampleSelection`]: Its `keep` holds exactly `max(1, floor(sample_ratio * samples))` samples.

    Raises:
        `ValueError`: If the pool is empty, or a perplexity or entropy is NaN or infinite.
    """
    perplexity, entropy = perplexity.double(), entropy.double()
    size = len(perplexity)
    if size == 0:
        raise ValueError("The pool is empty: there is no sample to select from.")
    if not bool((perplexity.isfinite() & entropy.isfinite()).all()):
        raise ValueError("A perplexity or entropy in the pool is NaN or infinite: it has no place on the EU plane.")

    error, uncertainty = _min_max(perplexity), _min_max(entropy)
    above_diagonal = error > uncertainty
    sorted_perplexity, sorted_entropy = perplexity.sort().values, entropy.sort().values

    low, high = 0.0, MAX_QUANTILE_LEVEL
    for _ in range(MAX_BISECTION_STEPS):
        # Algorithm 1 moves alpha (perplexity) and beta (entropy) in step, so one level stands for both.
        level = (low + high) / 2
        ppl_low, ppl_high = _quantile(sorted_perplexity, level), _quantile(sorted_perplexity, 1 - level)
        ent_low, ent_high = _quantile(sorted_entropy, level), _quantile(sorted_entropy, 1 - level)
        q2 = (perplexity >= ppl_high) & (entropy <= ent_low)
        q4 = (perplexity <= ppl_low) & (entropy >= ent_high)
        both = q2 & q4
        q2, q4 = q2 & ~(both & ~above_diagonal), q4 & ~(both & above_diagonal)
        share = int((q2 | q4).sum()) / size
        if stop_at_budget and abs(share - sample_ratio) < STOP_WITHIN:
            break
        if share < sample_ratio:
            low = level
        else:
            high = level

    quadrant = torch.zeros(size, dtype=torch.int64, device=perplexity.device)
    quadrant[(perplexity <= ppl_low) & (entropy <= ent_low)] = 3
    quadrant[(perplexity >= ppl_high) & (entropy >= ent_high)] = 1
    quadrant[q4] = 4
    quadrant[q2] = 2

    # Q2 and Q4 first, then the rest; within each, by the supplementary score max(P - E, E - P).
    chosen = q2 | q4
    order = descending(chosen.double(), (error - uncertainty).abs(), perplexity, entropy)
    keep = torch.zeros(size, dtype=torch.bool, device=perplexity.device)
    keep[order[: budget_size(sample_ratio, size)]] = True
    filled = keep & ~chosen
    return SampleSelection(
        keep=keep,
        quadrant=quadrant,
        filled=filled,
        trimmed=chosen & ~keep,
        prune_tokens=keep & (q2 | (filled & above_diagonal)),
        perplexity_low=float(ppl_low),
        perplexity_high=float(ppl_high),
        entropy_low=float(ent_low),
        entropy_high=float(ent_high),
    )


def _quantile(sorted_values: Tensor, fraction: float) -> Tensor:
    """Smallest value with at least `fraction` of the values <= it: NumPy's `inverted_cdf`."""
    return sorted_values[max(0, math.ceil(len(sorted_values) * fraction - 1))]


def _min_max(values: Tensor) -> Tensor:
    """Values of shape `(samples,)` scaled to [0, 1]; a constant axis becomes 0, not NaN."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


def descending(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key from high to low, then by the next; what is left stays in order."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.argsort(key[order], descending=True, stable=True)]
    return order


def token_scores(perplexity: Tensor, answer_mask: Tensor, neighbor_weight: float) -> Tensor:
    """
    Stage 2, the neighbour-aware token score (eq. 7): `s_i = (1 - lambda) PPL_i + lambda (PPL_{i-1} + PPL_{i+1})`.

    The two neighbours are summed, as in the formula. Gap: the first and the last token of an answer lack a neighbour;
    their own value stands in for it. An answer of several turns is several such spans.

    Args:
        perplexity (`Tensor` of shape `(samples, positions)`): `PPL_i = exp(nll_i)` of each token.
        answer_mask (`Tensor` of shape `(samples, positions)`, bool): The answer tokens T(x).
        neighbor_weight (`float`): lambda, in [0, 1].

    Returns:
        `Tensor` of shape `(samples, positions)`, float64: The scores; 0 outside the answer.
    """
    # Far below the largest float, so that an overflowing perplexity still gives scores that can be ranked.
    own = perplexity.double().clamp(max=1e300)
    left, right = own.clone(), own.clone()
    left[:, 1:] = torch.where(answer_mask[:, :-1], own[:, :-1], own[:, 1:])
    right[:, :-1] = torch.where(answer_mask[:, 1:], own[:, 1:], own[:, :-1])
    scores = (1 - neighbor_weight) * own + neighbor_weight * (left + right)
    return scores.masked_fill(~answer_mask, 0.0)


def token_keep_mask(scores: Tensor, answer_mask: Tensor, token_ratio: float, protected: Tensor | None = None) -> Tensor:
    """
    Stage 2, token pruning: keep the `token_ratio` of each answer with the lowest scores.

    Gap: the text speaks of the top fraction ranked by s, while Figure 2, Table 5 and the baselines remove the tokens
    with a high score; the latter is built. Ties go to the earlier token.

    Args:
        scores (`Tensor` of shape `(samples, positions)`): Scores of eq. 7.
        answer_mask (`Tensor` of shape `(samples, positions)`, bool): The answer tokens T(x).
        token_ratio (`float`): r_token, the share of answer tokens to keep, in (0, 1].
        protected (`Tensor` of shape `(samples, positions)`, bool, *optional*): Answer tokens that are never pruned.

    Returns:
        `Tensor` of shape `(samples, positions)`, bool: The mask m, with `floor(token_ratio * |T(x)|)` tokens a sample.
        Gap: at least one, and at least the protected ones. A sample without answer tokens keeps none.
    """
    count = answer_mask.sum(dim=1)
    budget = torch.floor(token_ratio * count.double() + 1e-9).clamp(min=1).to(count.dtype)
    return _lowest(scores, answer_mask, budget, protected)


def pool_token_keep_mask(scores: Tensor, answer_mask: Tensor, budget: int, protected: Tensor | None = None) -> Tensor:
    """
    Stage 2 with one token budget for all answers of a pool: keep the tokens with the lowest scores of all.

    Eq. 7 ranks within a sample. The authors' code ranks all of Q2 together (trainer.py:784), and so does this; ties go
    to the earlier sample, then the earlier token.

    Args:
        scores (`Tensor` of shape `(samples, positions)`): Scores of eq. 7.
        answer_mask (`Tensor` of shape `(samples, positions)`, bool): The answer tokens T(x).
        budget (`int`): Answer tokens to keep of all samples together.
        protected (`Tensor` of shape `(samples, positions)`, bool, *optional*): Answer tokens that are never pruned.

    Returns:
        `Tensor` of shape `(samples, positions)`, bool: `budget` tokens, at least the protected ones, and at most all. A
        sample may lose every token.
    """
    flat = None if protected is None else protected.reshape(1, -1)
    of_all = torch.tensor([budget], device=scores.device)
    keep = _lowest(scores.reshape(1, -1), answer_mask.reshape(1, -1), of_all, flat)
    return keep.reshape(answer_mask.shape)


def _lowest(scores: Tensor, answer_mask: Tensor, budget: Tensor, protected: Tensor | None) -> Tensor:
    """In each row the protected answer tokens and then those with the lowest scores, `budget` of shape `(samples,)`."""
    if protected is not None:
        budget = torch.maximum(budget, (protected & answer_mask).sum(dim=1))
        scores = scores.masked_fill(protected, -math.inf)
    # Even an infinite score ranks before the positions outside the answer.
    scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(~answer_mask, math.inf)
    order = scores.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)  # the inverse permutation
    return (rank < budget[:, None]) & answer_mask
