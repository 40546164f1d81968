"""Relative time of an optimizer step: its floating-point operations, on pools of rows as long as the data's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..host.ledger import HEAD
from ..method import budget_size
from ..step.micro_batches import Part, split_survivors
from ..step.scoring import scoring_batches
from .counting import Batch, Counted
from .lengths import Lengths

# Pools that are drawn to average over.
POOLS = 32
# Causal attention needs half of the products that its operator is counted with.
CAUSAL = 0.5
# Share of the survivors that lie in Q2, whose tokens are pruned.
TOKEN_PRUNED = 0.5


@dataclass(frozen=True)
class Cost:
    """Operations of a piece of work: by token, by pair of tokens in a row, and by labelled token."""

    layers: float
    attention: float
    head: float

    @classmethod
    def of(cls, counted: Counted, batch: Batch) -> "Cost":
        """What `counted`, which went over `batch`, says."""
        tokens = batch.rows * batch.length
        labelled = int(batch.rows * (batch.length - 1) * batch.labelled)
        return cls(
            counted.flops["layers"] / tokens,
            CAUSAL * counted.flops["attention"] / (tokens * batch.length),
            counted.flops[HEAD] / max(labelled, 1),
        )

    def rows(self, rows: int, length: int, labelled: float) -> float:
        """Operations of a batch of rows of one (padded) length with `labelled` labelled tokens together."""
        return rows * length * (self.layers + self.attention * length) + labelled * self.head


@dataclass(frozen=True)
class Costs:
    """The three kinds of work of a step."""

    scoring: Cost
    checkpointed: Cost
    free: Cost


@dataclass(frozen=True)
class StepShape:
    """
    How a step goes about its candidates.

    Args:
        rows (`int`): Of a micro-batch.
        slots (`int`): Micro-batches, the pool factor included.
        checkpointing (`bool`): `gradient_checkpointing` of the run.
        plain_rows, plain_checkpointing: The same of the plain run that it is compared with.
        free_tokens (`int`, *optional*): Tokens at a time of survivors without checkpointing; `None` for all of them.
        scoring_tokens (`int`): Tokens scored at once.
        flattened (`bool`): Whether batches go without padding.
        scored_flattened (`bool`): Whether those of scoring do.
        sorted_rows (`bool`): Whether the run it is compared with sorts its rows by length (TRL's does not).
    """

    rows: int
    slots: int
    checkpointing: bool
    plain_rows: int
    plain_checkpointing: bool
    free_tokens: int | None
    scoring_tokens: int
    flattened: bool = False
    scored_flattened: bool = False
    sorted_rows: bool = False


@dataclass(frozen=True)
class Budget:
    """
    What is kept and what is scored for it.

    Args:
        sample_ratio, token_ratio (`float`): Share of samples, and of tokens of the samples in Q2.
        drop (`bool`): Whether pruned tokens leave the sequence.
        scored_share (`float`): Share of the pool that is scored; 0 where the sample pruner needs no scores.
        survivors_scored (`bool`): Whether the survivors are scored for their tokens alone.
    """

    sample_ratio: float
    token_ratio: float
    drop: bool
    scored_share: float = 1.0
    survivors_scored: bool = False


def step_time(lengths: Lengths, shape: StepShape, budget: Budget, costs: Costs) -> dict[str, float]:
    """
    Operations of a step, as shares of those of plain SFT on the same candidates.

    Returns:
        `dict`: `scoring`, `training` and their sum `step`.
    """
    generator = np.random.default_rng(0)
    plain = scoring = training = 0.0
    size = shape.rows * shape.slots
    for _ in range(POOLS):
        drawn = generator.integers(0, len(lengths.tokens), size)
        tokens, labelled = lengths.tokens[drawn], lengths.labelled[drawn]
        plain += _whole(tokens, labelled, shape.plain_rows, shape.plain_checkpointing, shape, costs)
        if budget.sample_ratio == budget.token_ratio == 1.0:
            training += _whole(tokens, labelled, shape.rows, shape.checkpointing, shape, costs)
            continue
        kept = generator.permutation(size)[: budget_size(budget.sample_ratio, size)]
        share = generator.permutation(size)[: math.ceil(budget.scored_share * size - 1e-9)]
        scored = kept if budget.survivors_scored else share
        flat = shape.flattened or shape.scored_flattened
        batches = scoring_batches(tokens[scored].tolist(), shape.scoring_tokens, flat)
        parts = [Part(scored[batch].tolist(), False) for batch in batches]
        scoring += _work(tokens, labelled, parts, costs.scoring, costs.scoring, flat)
        training += _survivors(tokens[kept], labelled[kept], shape, budget, costs)
    return {"scoring": scoring / plain, "training": training / plain, "step": (scoring + training) / plain}


def _whole(
    tokens: np.ndarray, labelled: np.ndarray, rows: int, checkpointing: bool, shape: StepShape, costs: Costs
) -> float:
    order = np.argsort(-tokens, kind="stable") if shape.sorted_rows else np.arange(len(tokens))
    parts = [Part(order[start : start + rows].tolist(), checkpointing) for start in range(0, len(order), rows)]
    return _work(tokens, labelled, parts, costs.checkpointed, costs.free, shape.flattened)


def _survivors(tokens: np.ndarray, labelled: np.ndarray, shape: StepShape, budget: Budget, costs: Costs) -> float:
    pruned = np.arange(len(tokens)) % round(1 / TOKEN_PRUNED) == 0
    gone = np.where(pruned, np.round(labelled * (1 - budget.token_ratio)), 0).astype(int)
    tokens, labelled = (tokens - gone if budget.drop else tokens), labelled - gone
    free = shape.free_tokens
    if free is None or not shape.checkpointing:
        free = len(tokens) * int(tokens.max())
    parts = split_survivors(tokens.tolist(), shape.rows, shape.slots, free)
    return _work(tokens, labelled, parts, costs.checkpointed, costs.free, shape.flattened)


def _work(
    tokens: np.ndarray, labelled: np.ndarray, parts: Sequence[Part], checkpointed: Cost, free: Cost, flattened: bool
) -> float:
    total = 0.0
    for places, checkpointing in parts:
        cost, lengths = checkpointed if checkpointing else free, tokens[places]
        padded = lengths if flattened else np.full(len(lengths), lengths.max())
        total += sum(cost.rows(1, int(length), 0) for length in padded) + cost.head * labelled[places].sum()
    return total
