"""Sample pruners: each takes a pool of candidates and says which survive, exactly as many as the budget allows."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import SampleSelection, budget_size, descending, select_samples

# InfoBatch's own default, `prune_ratio` in its code: the probability with which a below-mean sample is pruned.
INFOBATCH_PRUNE_PROBABILITY = 0.5


@dataclass(frozen=True)
class Pool:
    """
    Candidates that are compared with each other. What the pruner has not said to need is `None`.

    Args:
        lengths (`Tensor` of shape `(samples,)`, int64): Answer tokens of each sample.
        sample_ratio (`float`): Share of them to keep.
        generator (`torch.Generator`): To draw from, never from the global one: seeded by seed, step and process, so
            that a resumed run draws the same.
        progress (`float`): Share of the run's optimizer steps that are done, from 0 to 1.
        perplexity (`Tensor` of shape `(samples,)`, float64, *optional*): Of each answer (eq. 4).
        entropy (`Tensor` of shape `(samples,)`, float64, *optional*): Mean predictive entropy, in nats (eq. 5).
        sequence_entropy (`Tensor` of shape `(samples,)`, float64, *optional*): Mean predictive entropy of prompt and
            answer, in nats.
        prompt_characters (`Tensor` of shape `(samples,)`, int64, *optional*): Characters of each prompt.
        prompt_character_entropy (`Tensor` of shape `(samples,)`, float64, *optional*): Entropy of the characters of
            each prompt, in nats.
        column (`Tensor` of shape `(samples,)`, float64 or bool, *optional*): Values of `score_column`.
        stop_at_budget (`bool`): Whether `q_tuning`'s bisection stops at the budget; see [`select_samples`].
        infobatch_annealing (`float`): Share of the run, at its end, in which `infobatch` does not prune.
    """

    lengths: Tensor
    sample_ratio: float
    generator: torch.Generator
    progress: float = 0.0
    perplexity: Tensor | None = None
    entropy: Tensor | None = None
    sequence_entropy: Tensor | None = None
    prompt_characters: Tensor | None = None
    prompt_character_entropy: Tensor | None = None
    column: Tensor | None = None
    stop_at_budget: bool = True
    infobatch_annealing: float = 0.0

    @property
    def budget(self) -> int:
        """How many samples are to survive: `max(1, floor(sample_ratio * samples))`."""
        return budget_size(self.sample_ratio, len(self.lengths))

    def keep_highest(self, *keys: Tensor) -> Tensor:
        """The budget's samples with the highest first key, ties by the next; bool of shape `(samples,)`."""
        return self.keep_first(descending(*keys))

    def keep_first(self, order: Tensor) -> Tensor:
        """The budget's first samples in an order of indices; bool of shape `(samples,)`."""
        keep = torch.zeros(len(self.lengths), dtype=torch.bool)
        keep[order[: self.budget]] = True
        return keep


def as_selection(decided: SampleSelection | Tensor, pool: Pool, weighted: bool) -> SampleSelection:
    """
    What a sample pruner decided; where the pool was scored, with the samples' place on the Error-Uncertainty plane.

    Args:
        decided ([`SampleSelection`] or `Tensor` of shape `(samples,)`): Survivors (bool), or weights of their losses.
        pool ([`Pool`]): The candidates.
        weighted (`bool`): Whether it is weights.

    Raises:
        `ValueError`: If it is of another shape.
    """
    if isinstance(decided, SampleSelection):
        return decided
    if decided.shape != pool.lengths.shape:
        raise ValueError(
            f"The sample pruner gave a tensor of shape {tuple(decided.shape)} for {len(pool.lengths)} samples: give "
            "one value a sample."
        )
    keep, nothing = decided != 0, torch.zeros_like(decided, dtype=torch.bool)
    weight = decided.double() if weighted else None
    if pool.perplexity is None or pool.entropy is None:
        between, unknown = nothing.long(), (math.nan,) * 4
        return SampleSelection(keep, between, nothing, nothing, keep, *unknown, weight)
    plane = select_samples(pool.perplexity, pool.entropy, pool.sample_ratio, pool.stop_at_budget)
    return replace(plane, keep=keep, filled=nothing, trimmed=nothing, prune_tokens=keep, weight=weight)


def q_tuning(pool: Pool) -> SampleSelection:
    """Q2 and Q4 of the Error-Uncertainty plane (Q-Tuning, arXiv 2509.23873, Algorithm 1); see `qtuning_trl.method`."""
    assert pool.perplexity is not None
    assert pool.entropy is not None
    return select_samples(pool.perplexity, pool.entropy, pool.sample_ratio, pool.stop_at_budget)


def random(pool: Pool) -> Tensor:
    """Any samples, all with the same probability."""
    return pool.keep_first(torch.randperm(len(pool.lengths), generator=pool.generator))


def longest(pool: Pool) -> Tensor:
    """The longest answers, in tokens (Zhao et al., "Long Is More for Alignment", arXiv 2402.04833)."""
    return pool.keep_highest(pool.lengths)


def entropy_high(pool: Pool) -> Tensor:
    """The highest mean predictive entropy, uncertainty sampling; ties by perplexity, length."""
    assert pool.perplexity is not None
    assert pool.entropy is not None
    return pool.keep_highest(pool.entropy, pool.perplexity, pool.lengths)


def entropy_middle(pool: Pool) -> Tensor:
    """The mean predictive entropy nearest to the pool's median."""
    assert pool.entropy is not None
    return pool.keep_highest(-_from_median(pool.entropy))


def entropy_low(pool: Pool) -> Tensor:
    """The lowest mean predictive entropy; ties by perplexity, length."""
    assert pool.perplexity is not None
    assert pool.entropy is not None
    return pool.keep_highest(-pool.entropy, -pool.perplexity, -pool.lengths)


def perplexity_high(pool: Pool) -> Tensor:
    """The highest perplexity, which is the highest mean loss; ties by entropy, length."""
    assert pool.perplexity is not None
    assert pool.entropy is not None
    return pool.keep_highest(pool.perplexity, pool.entropy, pool.lengths)


def perplexity_middle(pool: Pool) -> Tensor:
    """The mean loss nearest to the pool's median: neither what is known nor what is wrong or noise."""
    assert pool.perplexity is not None
    return pool.keep_highest(-_from_median(pool.perplexity.log()))


def perplexity_low(pool: Pool) -> Tensor:
    """The lowest perplexity; ties by entropy, length."""
    assert pool.perplexity is not None
    assert pool.entropy is not None
    return pool.keep_highest(-pool.perplexity, -pool.entropy, -pool.lengths)


def _from_median(values: Tensor) -> Tensor:
    return (values - values.quantile(0.5)).abs()


def excess(pool: Pool) -> Tensor:
    """
    Both ends of mean loss minus mean entropy: half of the budget from either, the odd one from the upper end.

    A calibrated model's loss is its entropy in the mean, so this axis is zero for it. Misconceptions (Q2) lie above and
    calibration data (Q4) below, whatever the scale of the two.
    """
    assert pool.perplexity is not None
    assert pool.entropy is not None
    order = descending(pool.perplexity.log() - pool.entropy)
    above = pool.budget - pool.budget // 2
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[:above]] = True
    keep[order[len(order) - pool.budget // 2 :]] = True
    return keep


def infobatch(pool: Pool) -> Tensor:
    """
    InfoBatch (Qin et al., ICLR 2024, arXiv 2303.04947): prune easy samples at random, rescale those that stay.

    As published: samples with a loss below the mean are pruned with probability p = 0.5, and those of them that stay
    weigh 1 / (1 - p), so that the gradient's expectation is that of all; with `infobatch_annealing`, the end of the run
    keeps everything. Its rule fixes no budget, so:

    - Where it would leave more samples than the budget, the budget's are drawn from those it leaves, all with the same
      probability. That multiplies the expected gradient by a constant and does not turn it.
    - Where it would leave fewer, p is lowered to what meets the budget.

    Its scores are the losses of the current model and not, as published, those of the sample's latest visit.

    Returns:
        `Tensor` of shape `(samples,)`, float64: The weight of each sample's loss; 0 for the pruned.
    """
    assert pool.perplexity is not None
    loss = pool.perplexity.log()
    if pool.progress >= 1.0 - pool.infobatch_annealing:
        return torch.ones_like(loss)
    easy = loss < loss.mean()
    kept_easy = int((1.0 - INFOBATCH_PRUNE_PROBABILITY) * int(easy.sum()))
    weight_of_easy = 1.0 / (1.0 - INFOBATCH_PRUNE_PROBABILITY)
    missing = pool.budget - int((~easy).sum())
    if missing > kept_easy:
        kept_easy, weight_of_easy = missing, int(easy.sum()) / missing

    weight = (~easy).to(loss)
    shuffled = torch.randperm(len(loss), generator=pool.generator)
    weight[shuffled[easy[shuffled]][:kept_easy]] = weight_of_easy
    # Another shuffle, since the easy ones that stay are the first of this one.
    shuffled = torch.randperm(len(loss), generator=pool.generator)
    return weight * pool.keep_first(shuffled[weight[shuffled] > 0])


def column(pool: Pool) -> Tensor:
    """
    A selection made elsewhere, as a column of the dataset: Alpagasus, Deita, DS2, LESS or your own.

    Scores: the highest of each pool, to the budget. Booleans: exactly those marked, whatever the budget says; a step
    whose pool has none trains on nothing.
    """
    assert pool.column is not None
    return pool.column if pool.column.dtype == torch.bool else pool.keep_highest(pool.column)


def none(pool: Pool) -> Tensor:
    """Every sample."""
    return torch.ones(len(pool.lengths), dtype=torch.bool)
