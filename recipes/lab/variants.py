"""
Q-Tuning where the paper leaves gaps, read otherwise: sample pruners of `compare_sums_2_variants.yaml`; random samples
whose budget changes over the run, of `compare_smollm2_epochs_budgets.yaml`; and tokens with tempered weights.

```bash
PYTHONPATH=recipes/lab qtuning compare --config recipes/lab/compare_sums_2_variants.yaml
```
"""

from dataclasses import replace

import torch
from scipy.stats import rankdata

from qtuning_trl.method import SampleSelection, budget_size, descending, select_samples
from qtuning_trl.pruners import register_sample_pruner, register_token_pruner
from qtuning_trl.pruners.samples import Pool, q_tuning, random
from qtuning_trl.pruners.tokens import Answers, importance


@register_sample_pruner("fill_by_rank", needs=["scores"])
def fill_by_rank(pool: Pool) -> SampleSelection:
    """P and E of the supplementary score are ranks instead of min-max normalised."""
    ranks = (torch.from_numpy(rankdata(values)) for values in (pool.perplexity, pool.entropy))
    # The quadrants depend on order alone, so they stay what they were; min-max of ranks are ranks.
    return select_samples(*ranks, pool.sample_ratio, pool.stop_at_budget)


@register_sample_pruner("fill_by_log", needs=["scores"])
def fill_by_log(pool: Pool) -> SampleSelection:
    """P of the supplementary score is the min-max normalised log-perplexity, whose tail is lighter."""
    logarithm = pool.perplexity.log()
    return select_samples(logarithm, pool.entropy, pool.sample_ratio, pool.stop_at_budget)


@register_sample_pruner("fill_without_q1", needs=["scores"])
def fill_without_q1(pool: Pool) -> SampleSelection:
    """Q1 fills up only where nothing else is left."""
    selection = q_tuning(pool)
    corners = (selection.quadrant == 2) | (selection.quadrant == 4)
    error, uncertainty = (
        (axis - axis.min()) / (axis.max() - axis.min()).clamp(min=1e-12) for axis in (pool.perplexity, pool.entropy)
    )
    order = descending(
        corners.double(), (selection.quadrant != 1).double(), (error - uncertainty).abs(), pool.perplexity, pool.entropy
    )
    keep = pool.keep_first(order)
    filled = keep & ~corners
    prune = keep & ((selection.quadrant == 2) | (filled & (error > uncertainty)))
    return replace(selection, keep=keep, filled=filled, trimmed=corners & ~keep, prune_tokens=prune)


@register_sample_pruner("fill_whole", needs=["scores"])
def fill_whole(pool: Pool) -> SampleSelection:
    """Whatever fills up keeps all its tokens, as Q4 does."""
    selection = q_tuning(pool)
    return replace(selection, prune_tokens=selection.prune_tokens & ~selection.filled)


@register_sample_pruner("fill_pruned", needs=["scores"])
def fill_pruned(pool: Pool) -> SampleSelection:
    """Whatever fills up has its tokens pruned, as Q2 has."""
    selection = q_tuning(pool)
    return replace(selection, prune_tokens=selection.prune_tokens | selection.filled)


@register_sample_pruner("tokens_of_all", needs=["scores"])
def tokens_of_all(pool: Pool) -> SampleSelection:
    """Tokens are pruned in Q4 too."""
    selection = q_tuning(pool)
    return replace(selection, prune_tokens=selection.keep)


@register_sample_pruner("fill_at_random", needs=["scores"])
def fill_at_random(pool: Pool) -> SampleSelection:
    """The fill is drawn at random, and kept whole: what Q2 and Q4 alone are worth."""
    selection = q_tuning(pool)
    kept = selection.keep & ~selection.filled
    lots = torch.rand(len(kept), generator=pool.generator)
    keep = torch.zeros_like(kept)
    keep[descending(kept.double(), lots)[: budget_size(pool.sample_ratio, len(kept))]] = True
    return replace(selection, keep=keep, filled=keep & ~kept, prune_tokens=selection.prune_tokens & kept)


@register_sample_pruner("q2_alone", needs=["scores"])
def q2_alone(pool: Pool) -> SampleSelection:
    """Misconceptions alone: the side of the diagonal with the higher error, by the supplementary score; pruned."""
    return _one_side(pool, 1.0)


@register_sample_pruner("q4_alone", needs=["scores"])
def q4_alone(pool: Pool) -> SampleSelection:
    """Calibration data alone: the side of the diagonal with the higher uncertainty; kept whole."""
    return _one_side(pool, -1.0)


def _one_side(pool: Pool, sign: float) -> SampleSelection:
    selection = q_tuning(pool)
    error, uncertainty = (torch.from_numpy(rankdata(values)) for values in (pool.perplexity, pool.entropy))
    keep = pool.keep_highest(sign * (error - uncertainty))
    return replace(selection, keep=keep, filled=keep & (selection.quadrant == 0), prune_tokens=keep & (sign > 0))


@register_sample_pruner("random_growing")
def random_growing(pool: Pool) -> torch.Tensor:
    """Random samples, few at first: from none to twice the budget, which is met over the run."""
    return _random(pool, 2 * pool.progress * pool.sample_ratio)


@register_sample_pruner("random_shrinking")
def random_shrinking(pool: Pool) -> torch.Tensor:
    """Random samples, many at first: from twice the budget to none, which is met over the run."""
    return _random(pool, 2 * (1 - pool.progress) * pool.sample_ratio)


@register_sample_pruner("random_after_warmup")
def random_after_warmup(pool: Pool) -> torch.Tensor:
    """All samples until half of the run's budget is spent, then random ones from the other half."""
    warmup = pool.sample_ratio / 2
    return _random(pool, 1.0 if pool.progress < warmup else warmup / (1 - warmup))


def _random(pool: Pool, ratio: float) -> torch.Tensor:
    return random(replace(pool, sample_ratio=ratio))


@register_token_pruner("importance_tempered", needs=["scores", "weights"])
def importance_tempered(answers: Answers) -> torch.Tensor:
    """Halfway from `importance`, whose weights leave no bias, to `hardest`, which has none: their square roots."""
    weights = importance(answers)
    kept = weights > 0
    return (weights * weights[kept].min()).sqrt() if kept.any() else weights
