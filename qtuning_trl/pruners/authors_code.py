"""
Q-Tuning as its authors coded it, where that differs from the paper: `q_tuning_code`, and two of their baselines.

Read from github.com/Q-tuning/Q-tuning at dd6eba5, none of whose code is used here. T is its
`LLaMA-Factory/src/llamafactory/train/sft/trainer.py`, I its `LLaMA-Factory/src/llamafactory/data/infobatch.py`; numbers
are lines. The pool there is one per-device micro-batch of 8: `selection_scope: micro_batch`.
"""

import math
from collections import Counter

import torch
from torch import Tensor

from ..method import MAX_BISECTION_STEPS, MAX_QUANTILE_LEVEL, STOP_WITHIN, SampleSelection, descending
from .samples import Pool
from .tokens import Answers


def q_tuning_code(pool: Pool) -> SampleSelection:
    """
    Stage 1 by the authors' code. The number of survivors is `max(1, round(sample_ratio * samples))` or more.

    - Entropy is the mean over all positions, the prompt's too (T:225-227).
    - Quantiles are interpolated (T:306); the corners are open on the high side (T:321-322).
    - The bisection ends within 0.01 of the ratio, and after ten steps (T:292, 326).
    - Everything in Q2 and Q4 survives, also above the budget; below it, the rest, Q1 and Q3 included, fills up by
      `max(P - E, E - P)`, min-max normalised (T:599-626); `P >= E` counts as Q2 (T:702).
    """
    assert pool.perplexity is not None
    assert pool.sequence_entropy is not None
    perplexity, entropy = pool.perplexity.double(), pool.sequence_entropy.double()
    size = len(perplexity)
    low, high = 0.0, MAX_QUANTILE_LEVEL
    for _ in range(MAX_BISECTION_STEPS):
        level = (low + high) / 2
        ppl_low, ppl_high = perplexity.quantile(level), perplexity.quantile(1.0 - level)
        ent_low, ent_high = entropy.quantile(level), entropy.quantile(1.0 - level)
        q2 = (perplexity > ppl_high) & (entropy <= ent_low)
        q4 = (perplexity <= ppl_low) & (entropy > ent_high)
        share = (int(q2.sum()) + int(q4.sum())) / size
        if abs(share - pool.sample_ratio) < STOP_WITHIN:
            break
        if share < pool.sample_ratio:
            low = level
        else:
            high = level

    error, uncertainty = _min_max(perplexity), _min_max(entropy)
    corners = q2 | q4
    target = min(max(1, round(size * pool.sample_ratio)), size)
    order = descending(corners.double(), (error - uncertainty).abs())
    keep = corners.clone()
    keep[order[:target]] = True
    filled = keep & ~corners

    quadrant = torch.zeros(size, dtype=torch.int64)
    quadrant[(perplexity > ppl_high) & (entropy > ent_high)] = 1
    quadrant[(perplexity <= ppl_low) & (entropy <= ent_low)] = 3
    quadrant[q4] = 4
    quadrant[q2] = 2
    return SampleSelection(
        keep=keep,
        quadrant=quadrant,
        filled=filled,
        trimmed=torch.zeros_like(keep),
        prune_tokens=q2 | (filled & (error >= uncertainty)),
        perplexity_low=float(ppl_low),
        perplexity_high=float(ppl_high),
        entropy_low=float(ent_low),
        entropy_high=float(ent_high),
    )


def _min_max(values: Tensor) -> Tensor:
    """Scaled to [0, 1]; an axis with a spread below 1e-12 becomes 0 (T:604-612)."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread >= 1e-12 else torch.zeros_like(values)


def q_tuning_code_tokens(answers: Answers) -> Tensor:
    """
    Stage 2 by the authors' code: one token budget for the pool, prompts included, all of it from Q2's side.

    - `round(tokens * sample_ratio * token_ratio)` tokens of the pool are to stay, prompts counted; what dropping
      samples has not reached is taken from the answers of Q2, the highest scores of all of them first (T:659-669,
      784-792). It may take every token of Q2, and where Q2 has too few, Q4 is not touched.
    - The score is eq. 7's (T:742). A missing neighbour within the sample is a prompt position, whose loss of 0 makes it
      `exp(0) = 1`; one beyond the sample is 0 (T:735-739).
    - No token is protected. Pruned tokens are masked (T:794-796): `token_pruning: mask`.
    """
    assert answers.nll is not None
    assert answers.lengths is not None
    mask = answers.answer_mask
    inside = torch.arange(mask.shape[1]) < answers.lengths[:, None] - 1
    perplexity = torch.where(mask, answers.nll.double(), 0.0).exp() * inside
    left, right = torch.zeros_like(perplexity), torch.zeros_like(perplexity)
    left[:, 1:], right[:, :-1] = perplexity[:, :-1], perplexity[:, 1:]
    weight = answers.neighbor_weight
    scores = (1 - weight) * perplexity + weight * (left + right)

    target = round(answers.sequence_tokens * answers.sample_ratio * answers.token_ratio)
    drop = max(0, answers.survivor_tokens - target)
    candidates = sum(answers.gather(int(mask.sum())))
    return answers.keep_lowest_together(scores, max(0, candidates - drop), protect=False)


def longest_code(pool: Pool) -> Tensor:
    """
    The baseline "longest" by the authors' code: the SHORTEST instructions, in characters (I:128-163).

    There the data set is cut once, before training; here each pool is, by the same score, which no model changes.
    """
    assert pool.prompt_characters is not None
    return pool.keep_highest(-pool.prompt_characters)


def entropy_code(pool: Pool) -> Tensor:
    """
    The baseline "entropy" by the authors' code: the lowest entropy of the instruction's characters (I:164-207).

    There the data set is cut once, before training; here each pool is, by the same score, which no model changes.
    """
    assert pool.prompt_character_entropy is not None
    return pool.keep_highest(-pool.prompt_character_entropy)


def character_entropy(text: str) -> float:
    """Entropy of the distribution of a text's characters, in nats; 0 for an empty one (I:175-182)."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log(share) for share in shares)
