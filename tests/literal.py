"""
Q-Tuning word for word: Algorithm 1 and eqs. 4, 5 and 7 in plain Python, one sample and one token at a time.

Slow on purpose, and written from the paper, not from `qtuning_trl.method`: it is what the fast one is held against.
Only the quantile is NumPy's. The paper's gaps are read as `qtuning_trl.method` says.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

K_MAX = 10


def budget(ratio: float, total: int) -> int:
    """eq. 1: floor(r |B|), where r is the decimal that was written down; at least one."""
    return max(1, math.floor(Decimal(repr(ratio)) * total))


def statistics(nll: Sequence[float], entropy: Sequence[float]) -> tuple[float, float]:
    """eqs. 4 and 5, of the answer tokens of one sample."""
    return math.exp(math.fsum(nll) / len(nll)), math.fsum(entropy) / len(entropy)


@dataclass
class Selection:
    keep: list[bool]
    quadrant: list[int]
    filled: list[bool]
    trimmed: list[bool]
    prune_tokens: list[bool]
    perplexity_low: float
    perplexity_high: float
    entropy_low: float
    entropy_high: float


def min_max(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if low == high:
        return [0.0 for _ in values]
    return [(value - low) / (high - low) for value in values]


def select_samples(
    perplexity: list[float], entropy: list[float], sample_ratio: float, stop_at_budget: bool = False
) -> Selection:
    """Algorithm 1; the loop may stop where the corners hold the budget to within 0.01 of the batch."""
    size = len(perplexity)
    batch = range(size)
    p, e = min_max(perplexity), min_max(entropy)
    supplementary = [max(p[i] - e[i], e[i] - p[i]) for i in batch]
    ppl_array, ent_array = np.array(perplexity, dtype=np.float64), np.array(entropy, dtype=np.float64)

    # Line 1
    alpha_low, alpha_high = 0.0, 0.49
    beta_low, beta_high = 0.0, 0.49
    # Lines 2 to 7
    for _ in range(K_MAX):
        alpha = (alpha_low + alpha_high) / 2
        beta = (beta_low + beta_high) / 2
        ppl_low, ppl_high = map(float, np.quantile(ppl_array, [alpha, 1 - alpha], method="inverted_cdf"))
        ent_low, ent_high = map(float, np.quantile(ent_array, [beta, 1 - beta], method="inverted_cdf"))
        q2, q4 = set(), set()
        for i in batch:
            in_q2 = perplexity[i] >= ppl_high and entropy[i] <= ent_low
            in_q4 = perplexity[i] <= ppl_low and entropy[i] >= ent_high
            if in_q2 and in_q4:  # gap: it counts once, on its side of the diagonal
                in_q2, in_q4 = p[i] > e[i], not p[i] > e[i]
            if in_q2:
                q2.add(i)
            if in_q4:
                q4.add(i)
        r = (len(q2) + len(q4)) / size
        if stop_at_budget and abs(r - sample_ratio) < 0.01:
            break
        if r < sample_ratio:
            alpha_low, beta_low = alpha, beta  # relax
        else:
            alpha_high, beta_high = alpha, beta  # tighten

    q1 = {i for i in batch if perplexity[i] >= ppl_high and entropy[i] >= ent_high} - q2 - q4
    q3 = {i for i in batch if perplexity[i] <= ppl_low and entropy[i] <= ent_low} - q2 - q4
    assert not q1 & q3  # whatever is in both lies in Q2 and Q4, too

    # Line 8 and the gaps: the budget is met exactly, by the supplementary score; ties go to the higher perplexity, the
    # higher entropy, the earlier sample.
    def best_first(samples: set[int]) -> list[int]:
        return sorted(samples, key=lambda i: (-supplementary[i], -perplexity[i], -entropy[i], i))

    target = budget(sample_ratio, size)
    survivors = set(best_first(q2 | q4)[:target])
    trimmed = (q2 | q4) - survivors
    filled = set(best_first(set(batch) - q2 - q4)[: target - len(survivors)])
    survivors |= filled
    prune_tokens = {i for i in survivors if i in q2 or (i in filled and p[i] > e[i])}

    quadrant = [0] * size
    for name, members in ((1, q1), (2, q2), (3, q3), (4, q4)):
        for i in members:
            quadrant[i] = name

    def flags(members: set[int]) -> list[bool]:
        return [i in members for i in batch]

    return Selection(
        flags(survivors),
        quadrant,
        flags(filled),
        flags(trimmed),
        flags(prune_tokens),
        ppl_low,
        ppl_high,
        ent_low,
        ent_high,
    )


def token_scores(perplexity: list[float], is_answer: list[bool], neighbor_weight: float) -> list[float]:
    """eq. 7, of one sample; a neighbour outside the span of answer tokens is the token itself (gap)."""
    scores = [0.0] * len(perplexity)
    for i in range(len(perplexity)):
        if not is_answer[i]:
            continue
        before = perplexity[i - 1] if i > 0 and is_answer[i - 1] else perplexity[i]
        after = perplexity[i + 1] if i + 1 < len(perplexity) and is_answer[i + 1] else perplexity[i]
        scores[i] = (1 - neighbor_weight) * perplexity[i] + neighbor_weight * (before + after)
    return scores


def token_keep_mask(
    scores: list[float], is_answer: list[bool], token_ratio: float, is_protected: list[bool]
) -> list[bool]:
    """The r_token fraction with the lowest scores, of one sample: first the protected tokens, then the lowest."""
    answer = [i for i in range(len(scores)) if is_answer[i]]
    if not answer:
        return [False] * len(scores)
    keep = {i for i in answer if is_protected[i]}
    others = sorted((i for i in answer if i not in keep), key=lambda i: (scores[i], i))
    for i in others:
        if len(keep) < budget(token_ratio, len(answer)):
            keep.add(i)
    return [i in keep for i in range(len(scores))]


def pool_token_keep_mask(
    scores: list[list[float]], is_answer: list[list[bool]], token_budget: int, is_protected: list[list[bool]]
) -> list[list[bool]]:
    """One budget for all samples: first the protected tokens, then the lowest scores, wherever they are."""
    answer = [(i, j) for i in range(len(scores)) for j in range(len(scores[i])) if is_answer[i][j]]
    keep = {(i, j) for i, j in answer if is_protected[i][j]}
    for i, j in sorted(set(answer) - keep, key=lambda token: (scores[token[0]][token[1]], token)):
        if len(keep) < token_budget:
            keep.add((i, j))
    return [[(i, j) in keep for j in range(len(scores[i]))] for i in range(len(scores))]


def infobatch(losses: list[float], sample_budget: int, first: list[int], second: list[int]) -> list[float]:
    """
    InfoBatch's `prune`, for one pool, and then our gap: a budget. Weights of the losses, 0 for the pruned.

    `first` and `second` are two shuffles of the samples. A random choice of k among some is the first k of them there.
    """
    keep_ratio = 1.0 - 0.5
    mean = sum(losses) / len(losses)
    well_learned = [i for i in range(len(losses)) if losses[i] < mean]
    remained = [i for i in range(len(losses)) if not losses[i] < mean]
    selected = [i for i in first if i in well_learned][: int(keep_ratio * len(well_learned))]
    weight_of_selected = 1 / keep_ratio
    if len(remained) + len(selected) < sample_budget:  # gap: prune fewer
        kept = sample_budget - len(remained)
        keep_ratio = kept / len(well_learned)
        selected = [i for i in first if i in well_learned][:kept]
        weight_of_selected = 1 / keep_ratio
    weights = [0.0] * len(losses)
    for i in selected:
        weights[i] = weight_of_selected
    for i in remained:
        weights[i] = 1.0
    survivors = [i for i in second if weights[i] > 0][:sample_budget]  # gap: any of those that are left
    return [weights[i] if i in survivors else 0.0 for i in range(len(losses))]


def top_excess_loss(
    loss: list[list[float]], reference: list[list[float]], is_answer: list[list[bool]], token_ratio: float
) -> list[list[bool]]:
    """
    Rho-1, section 2.2: rank the tokens of the batch by L_theta - L_ref, the highest first, keep the top k%.

    Token Cleaning's `get_global_top_k_indices` is the same with the base model's loss. Ties go to the earlier token.
    """
    tokens = [(i, j) for i in range(len(loss)) for j in range(len(loss[i])) if is_answer[i][j]]
    ranked = sorted(tokens, key=lambda token: -(loss[token[0]][token[1]] - reference[token[0]][token[1]]))
    chosen = set(ranked[: budget(token_ratio, len(tokens))])
    return [[(i, j) in chosen for j in range(len(loss[i]))] for i in range(len(loss))]
