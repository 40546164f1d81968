"""Token pruning inside the loss: the training forward itself says which answer tokens it is trained on."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from ..config import QTuningSFTConfig
from ..method import budget_size
from ..pruners import Answers, token_pruner
from .sample import Sample, answer_lengths
from .scoring import refuse_diverged
from .selection import bare_answers, gather_compared, step_generator


@dataclass(frozen=True)
class LossBudget:
    """
    What a micro-batch of survivors is trained on.

    Args:
        place (`int`): Of the micro-batch in the step.
        answers ([`Answers`]): Its answers, without values of their tokens; with `token_budget` 'pool', `budget` is its
            part of the pool's tokens.
        tokens (`int`): Answer tokens that stay, protected ones included.
    """

    place: int
    answers: Answers
    tokens: int


@dataclass(eq=False)
class LossPruner:
    """
    Stage 2 with `token_pruning` 'loss', as Rho-1 (arXiv 2404.07965) and the authors of Q-Tuning have it: no forward of
    its own, since the scores are those of the forward that is trained on.

    The answers of a micro-batch are ranked together where `token_budget` is 'pool', those of the whole step with
    'mask'; each micro-batch gets its share of the tokens. With 'answer' both choose the same.
    """

    args: QTuningSFTConfig
    accelerator: Accelerator
    protected_ids: set[int]  # tokens that are never pruned

    def __post_init__(self) -> None:
        self.token_pruner = token_pruner(self.args.token_pruner)

    def budgets(self, pool_tokens: int, micro_batches: list[list[Sample]]) -> list[LossBudget]:
        """
        How many tokens stay in each micro-batch, known before any forward: the loss is divided by their sum.

        Args:
            pool_tokens (`int`): Answer tokens of all candidates of this process.
            micro_batches (`list[list[Sample]]`): The survivors.
        """
        pooled: list[int | None] = [None] * len(micro_batches)
        if self.args.token_budget == "pool":
            sizes = [sum(answer_lengths(samples)) for samples in micro_batches]
            parts = gather_compared(self.args, (pool_tokens, sizes))
            asked = budget_size(self.args.sample_ratio * self.args.token_ratio, sum(part[0] for part in parts))
            shares = split_budget(asked, [size for part in parts for size in part[1]])
            own = self.accelerator.process_index if self.args.compares_processes else 0
            first = sum(len(part[1]) for part in parts[:own])
            pooled = list(shares[first : first + len(sizes)])
        budgets = []
        for place, (samples, share) in enumerate(zip(micro_batches, pooled, strict=True)):
            answers = bare_answers(self.args, samples, self.protected_ids, torch.Generator(), share)
            # How many stay depends on the budget alone, not on the scores.
            tokens = int(answers.keep_lowest(torch.zeros(answers.answer_mask.shape, dtype=torch.float64)).sum())
            budgets.append(LossBudget(place, answers, tokens))
        return budgets

    def weights(
        self, samples: list[Sample], budget: LossBudget, state: TrainerState, log_probs: Tensor, entropy: Tensor
    ) -> Tensor:
        """
        Weights of the losses of a micro-batch's answer tokens: what the token pruner returns, 0 for what it prunes.

        Args:
            samples (`list[Sample]`): The survivors in it.
            budget ([`LossBudget`]): Of the micro-batch.
            state (`TrainerState`): Of the run.
            log_probs, entropy (`Tensor` of shape `(answer tokens,)`): Of the training forward, in nats, in the order
                of the samples.

        Raises:
            `ValueError`: If the token pruner keeps more or fewer tokens than the budget.
            `FloatingPointError`: If a sample has a log-likelihood that is NaN or infinite.
        """
        ends = list(accumulate(answer_lengths(samples)))
        of_samples = log_probs.isfinite().tensor_split(ends[:-1])
        refuse_diverged(torch.stack([finite.all() for finite in of_samples]), self.args, state)
        mask = budget.answers.answer_mask

        def by_column(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values.double().cpu())

        generator = step_generator(self.args, state, self.accelerator.process_index, budget.place, 2)
        answers = replace(budget.answers, generator=generator, nll=by_column(-log_probs), entropy=by_column(entropy))
        keep: Tensor = self.token_pruner.prune(answers)[mask]
        kept = int(keep.count_nonzero())
        if kept != budget.tokens:
            raise ValueError(
                f"`token_pruner` is {self.args.token_pruner!r}, which kept {kept} tokens of a micro-batch where "
                f"`token_pruning` 'loss' allows {budget.tokens}: set `token_pruning` to 'mask', or let the pruner "
                "return what `answers.keep_lowest` does."
            )
        return keep


def split_budget(budget: int, sizes: list[int]) -> list[int]:
    """
    A budget in parts, in proportion to `sizes`: whole numbers that add up to it, no part more than its size.

    A budget above the sum of the sizes gives the sizes.
    """
    total = sum(sizes)
    if total == 0:
        return [0] * len(sizes)
    budget = min(budget, total)
    ends = [budget * end // total for end in accumulate(sizes)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
