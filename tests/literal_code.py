"""
Q-Tuning as its authors coded it, in plain NumPy and loops, from the rules in `qtuning_trl/pruners/authors_code.py`.

Written in our own words from what the lines named there do (github.com/Q-tuning/Q-tuning at dd6eba5), one sample
and one token at a time; it is what the fast one is held against.
"""

import numpy as np

TOLERANCE, STEPS = 0.01, 10


def select(perplexity: np.ndarray, entropy: np.ndarray, ratio: float) -> tuple[set[int], set[int], set[int], set[int]]:
    """Q2, Q4, what fills up, and those whose tokens may be pruned; all as sets of indices."""
    size = len(perplexity)
    alpha = [0.0, 0.49]
    beta = [0.0, 0.49]
    for _ in range(STEPS):
        a, b = sum(alpha) / 2, sum(beta) / 2
        error_above, error_below = np.quantile(perplexity, 1 - a), np.quantile(perplexity, a)
        doubt_above, doubt_below = np.quantile(entropy, 1 - b), np.quantile(entropy, b)
        q2 = {i for i in range(size) if perplexity[i] > error_above and entropy[i] <= doubt_below}
        q4 = {i for i in range(size) if perplexity[i] <= error_below and entropy[i] > doubt_above}
        share = (len(q2) + len(q4)) / size
        if abs(share - ratio) < TOLERANCE:
            break
        if share < ratio:
            alpha[0], beta[0] = a, b
        else:
            alpha[1], beta[1] = a, b

    def scaled(values: np.ndarray) -> np.ndarray:
        spread = values.max() - values.min()
        return np.zeros_like(values) if spread < 1e-12 else (values - values.min()) / spread

    p, e = scaled(perplexity), scaled(entropy)
    wanted = min(max(1, round(size * ratio)), size)
    rest = sorted(set(range(size)) - q2 - q4, key=lambda i: (-max(p[i] - e[i], e[i] - p[i]), i))
    fill = set(rest[: max(0, wanted - len(q2) - len(q4))])
    return q2, q4, fill, q2 | {i for i in fill if p[i] - e[i] >= e[i] - p[i]}


def scores(nll: list[float], is_answer: list[bool], weight: float) -> list[float]:
    """Of one sample's predicted tokens, prompts included: what is no answer token has a loss of 0."""
    values = [np.exp(loss) if answer else 1.0 for loss, answer in zip(nll, is_answer, strict=True)]
    around = [0.0, *values, 0.0]
    return [(1 - weight) * around[i] + weight * (around[i - 1] + around[i + 1]) for i in range(1, len(values) + 1)]


def dropped(
    lengths: list[int], kept: set[int], candidates: dict[int, tuple[list[float], list[bool]]],
    ratios: tuple[float, float], weight: float,
) -> set[tuple[int, int]]:  # fmt: skip
    """
    Tokens that lose their label: (sample, position).

    `lengths` are the predicted tokens of every sample of the pool; `candidates` the losses and the answer tokens of
    those on Q2's side.
    """
    whole = sum(lengths)
    to_drop = whole - round(whole * ratios[0] * ratios[1])
    to_drop -= whole - sum(lengths[i] for i in kept)
    ranked = [
        (score, i, j)
        for i, (nll, is_answer) in candidates.items()
        for j, score in enumerate(scores(nll, is_answer, weight))
        if is_answer[j]
    ]
    ranked.sort(key=lambda entry: -entry[0])
    return {(i, j) for _, i, j in ranked[: max(0, to_drop)]}
