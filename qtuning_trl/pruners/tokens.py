"""Token pruners: each takes the survivors' answers and says which of their tokens stay, exactly to the budget."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..method import budget_size, pool_token_keep_mask, token_keep_mask, token_scores

# FastV looks at the second layer (its K = 2), SparseVLM first at the third (`pruning_loc` in its code).
FASTV_LAYER = 1
SPARSEVLM_LAYER = 2
LEAST_SIZE = 0.02  # of a gradient in `importance`: no token stands for many


@dataclass(frozen=True)
class Answers:
    """
    Answers to be pruned, a row each; column j speaks of token j + 1. What the pruner has not said to need is `None`.

    Args:
        answer_mask (`Tensor` of shape `(samples, positions)`, bool): The answer tokens T(x).
        protected (`Tensor` of shape `(samples, positions)`, bool): Tokens that are never pruned.
        token_ratio (`float`): Share of the answer tokens to keep.
        generator (`torch.Generator`): To draw from, never from the global one: seeded by seed, step and process, so
            that a resumed run draws the same.
        lengths (`Tensor` of shape `(samples,)`, int64, *optional*): Tokens of each sample, prompt and answer.
        sample_ratio (`float`): Share of the samples that the sample pruner was to keep.
        budget (`int`, *optional*): With `token_budget` 'pool', how many tokens to keep of all answers together, those
            of other processes that are compared with them included.
        sequence_tokens (`int`): Tokens that can be predicted, of prompts and answers, of all candidates of the pool.
        survivor_tokens (`int`): Those of the survivors.
        gather (`Callable`): Takes a value, and returns those of all processes whose candidates are compared.
        process (`int`): Place of this process among them.
        neighbor_weight (`float`): lambda of eq. 7.
        nll, entropy (`Tensor` of shape `(samples, positions)`, float64, *optional*): Of the model that is trained:
            `-log p(token)`, and the entropy of the distribution that the token was predicted from, in nats.
        reference_nll, base_nll (`Tensor` of shape `(samples, positions)`, float64, *optional*): Of `reference_model`,
            and of the model before fine-tuning, in nats.
        attention (`Callable`, *optional*): Takes the number of a layer, from 0; returns, for each sample, its attention
            weights, averaged over heads, float32 of shape `(tokens, tokens)`, queries by keys. A layer beyond the last
            is the last.
        embeddings (`Callable`, *optional*): Returns, for each sample, its input embeddings, float32 of shape `(tokens,
            hidden size)`.
    """

    answer_mask: Tensor
    protected: Tensor
    token_ratio: float
    generator: torch.Generator
    lengths: Tensor | None = None
    sample_ratio: float = 1.0
    budget: int | None = None
    sequence_tokens: int = 0
    survivor_tokens: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    process: int = 0
    neighbor_weight: float = 0.5
    nll: Tensor | None = None
    entropy: Tensor | None = None
    reference_nll: Tensor | None = None
    base_nll: Tensor | None = None
    attention: Callable[[int], list[Tensor]] | None = None
    embeddings: Callable[[], list[Tensor]] | None = None

    def keep_lowest(self, scores: Tensor) -> Tensor:
        """
        The tokens with the lowest scores: of each answer, `floor(token_ratio * |T(x)|)` and at least one; of all
        answers together, `budget`, if there is one.
        """
        if self.budget is not None:
            return self.keep_lowest_together(scores, self.budget)
        return token_keep_mask(scores, self.answer_mask, self.token_ratio, self.protected)

    def keep_lowest_of_all(self, scores: Tensor) -> Tensor:
        """The `token_ratio` of all answers together with the lowest scores; an answer may lose all its tokens."""
        if self.budget is not None:
            return self.keep_lowest_together(scores, self.budget)
        return pool_token_keep_mask(
            scores, self.answer_mask, budget_size(self.token_ratio, int(self.answer_mask.sum())), self.protected
        )

    def keep_lowest_together(self, scores: Tensor, tokens: int, protect: bool = True) -> Tensor:
        """So many tokens with the lowest scores, of all answers, those of other processes included."""
        mask = self.answer_mask
        parts = self.gather((scores[mask], self.protected[mask] & protect))
        everyone, protected = (torch.cat(part)[None] for part in zip(*parts, strict=True))
        keep = pool_token_keep_mask(everyone, torch.ones_like(protected), tokens, protected)[0]
        start = sum(len(part[0]) for part in parts[: self.process])
        return mask.masked_scatter(mask, keep[start : start + int(mask.sum())])


def q_tuning(answers: Answers) -> Tensor:
    """
    The lowest neighbour-aware scores (Q-Tuning, arXiv 2509.23873, eq. 7); see `qtuning_trl.method`.

    After the sample pruner `q_tuning` it prunes quadrant Q2 alone, as in the paper; after another one, all survivors.
    """
    assert answers.nll is not None
    return answers.keep_lowest(token_scores(answers.nll.exp(), answers.answer_mask, answers.neighbor_weight))


def random(answers: Answers) -> Tensor:
    """Any tokens of each answer, all with the same probability."""
    return answers.keep_lowest(torch.rand(answers.answer_mask.shape, generator=answers.generator, dtype=torch.float64))


def easiest(answers: Answers) -> Tensor:
    """The lowest perplexity: high ones are dropped (Q-Tuning's baseline "PPL", as the paper words it)."""
    assert answers.nll is not None
    return answers.keep_lowest(answers.nll)


def hardest(answers: Answers) -> Tensor:
    """The highest perplexity (Q-Tuning's baseline "PPL", as the authors' code has it: trainer.py:1065-1077)."""
    assert answers.nll is not None
    return answers.keep_lowest(-answers.nll)


def uncertain(answers: Answers) -> Tensor:
    """
    The highest predictive entropy: where the model does not know what comes next (as for the 20% of tokens that
    reinforcement learning is restricted to by Wang et al., 2025, arXiv 2506.01939).

    The label has no say: a wrong one is not chosen for being wrong, nor a right one left out for being expected.
    """
    assert answers.entropy is not None
    return answers.keep_lowest(-answers.entropy)


def importance(answers: Answers) -> Tensor:
    """
    Tokens drawn by the size of their gradient, and weighted so that the expected gradient is that of all tokens.

    The size is 1 - p(token), the gradient at the logits to within a factor of sqrt(2) (Katharopoulos and Fleuret, ICML
    2018, arXiv 1803.00942, have it for samples). They are drawn by priority sampling (Duffield, Lund and Thorup, J. ACM
    2007): those with the highest `size / u` stay, u uniform in (0, 1); with t the highest of those that go, one that
    stays stands for `max(1, t / size)`. The tokens of each answer are drawn by themselves, those of all answers
    together where they share a budget. Protected tokens stay and stand for themselves.

    Returns:
        `Tensor` of shape `(samples, positions)`, float64: Weights of the losses, 0 for tokens that go; for how many
        tokens, of all, each of the others stands.
    """
    assert answers.nll is not None
    size = (1 - (-answers.nll).exp()).clamp(min=LEAST_SIZE)
    lots = torch.rand(size.shape, generator=answers.generator, dtype=torch.float64)
    priority = size / lots.clamp(min=1e-12)
    keep = answers.keep_lowest(-priority)
    going = priority.masked_fill(~answers.answer_mask | keep, 0.0)
    if answers.budget is None:
        threshold = going.amax(dim=1, keepdim=True) if going.numel() else going
    else:
        threshold = torch.tensor(max(answers.gather(float(going.max()) if going.numel() else 0.0)))
    stands_for = (threshold / size).clamp(min=1.0).masked_fill(answers.protected, 1.0)
    return keep * stands_for


def rho1(answers: Answers) -> Tensor:
    """
    The highest excess loss over a reference model (Rho-1, Lin et al., NeurIPS 2024, arXiv 2404.07965, section 2.2).

    As published, the tokens of the whole batch (the step's survivors on this process) are ranked together.
    """
    assert answers.nll is not None
    assert answers.reference_nll is not None
    return answers.keep_lowest_of_all(answers.reference_nll - answers.nll)


def token_cleaning(answers: Answers) -> Tensor:
    """
    The highest loss of the base model over a reference model (Token Cleaning, Pang et al., ICML 2025, arXiv
    2502.01968).

    The fixed-model variant: neither model changes while training, so a token's score is static. Published, it ranks
    the tokens of the whole dataset; here those of the step's survivors on this process, so that each step meets the
    budget.
    """
    assert answers.base_nll is not None
    assert answers.reference_nll is not None
    return answers.keep_lowest_of_all(answers.reference_nll - answers.base_nll)


def fastv(answers: Answers) -> Tensor:
    """
    The most attention received from the sample's other tokens, in the second layer (FastV, Chen et al., ECCV 2024,
    arXiv 2403.06764, made for image tokens).

    Attention is causal, so earlier tokens are seen by more tokens: what they receive is divided by how many those are.
    Nobody looks at the last one, which gets nothing.
    """
    assert answers.attention is not None
    received = []
    for weights in answers.attention(FASTV_LAYER):
        viewers = torch.arange(len(weights) - 1, -1, -1).clamp(min=1)
        received.append((weights.sum(dim=0) - weights.diagonal()) / viewers)
    return answers.keep_lowest(-_by_column(received, answers.answer_mask))


def sparsevlm(answers: Answers) -> Tensor:
    """
    The most attention between a token and the prompt tokens that concern the answer (SparseVLM, Zhang et al., ICML
    2025, arXiv 2410.04417, made for image tokens).

    As published, prompt tokens rate if the similarity of their embedding to those of the tokens to be pruned (softmax
    over the prompt, mean over the tokens) is above the mean, and a token's score is its mean attention with the raters,
    in the third layer. There the prompt follows the image and looks back at it; here the answer follows, so it is the
    answer's look at the raters that counts. Neither its adaptive ratios nor its token recycling is taken over: the
    budget is given, and a label cannot be merged.
    """
    assert answers.attention is not None
    assert answers.embeddings is not None
    scores = []
    samples = zip(answers.attention(SPARSEVLM_LAYER), answers.embeddings(), answers.answer_mask, strict=True)
    for weights, embeddings, mask in samples:
        is_answer = torch.zeros(len(weights), dtype=torch.bool)
        is_answer[1:] = mask[: len(weights) - 1]  # so the first token always is one of the prompt
        similarity = (embeddings[is_answer] @ embeddings[~is_answer].T).softmax(dim=1).mean(dim=0)
        raters = (~is_answer).nonzero().flatten()[similarity >= similarity.mean()]
        scores.append(weights[:, raters].mean(dim=1))
    return answers.keep_lowest(-_by_column(scores, answers.answer_mask))


def none(answers: Answers) -> Tensor:
    """Every token."""
    return answers.answer_mask


def _by_column(values: list[Tensor], answer_mask: Tensor) -> Tensor:
    """Values of each token of each sample, as a float64 `Tensor` of the shape of `answer_mask`."""
    columns = torch.zeros(answer_mask.shape, dtype=torch.float64)
    for row, of_tokens in zip(columns, values, strict=True):
        row[: len(of_tokens) - 1] = of_tokens[1:].double()
    return columns
