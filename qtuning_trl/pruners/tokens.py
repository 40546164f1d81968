"""Token pruners: each takes the survivors' answers and says which of their tokens stay, exactly to the budget."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import token_keep_mask, token_scores

# FastV looks at the second layer (its K = 2), SparseVLM first at the third (`pruning_loc` in its code).
FASTV_LAYER = 1
SPARSEVLM_LAYER = 2


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
        neighbor_weight (`float`): lambda of eq. 7.
        nll (`Tensor` of shape `(samples, positions)`, float64, *optional*): Of the model that is trained, in nats.
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
    neighbor_weight: float = 0.5
    nll: Tensor | None = None
    reference_nll: Tensor | None = None
    base_nll: Tensor | None = None
    attention: Callable[[int], list[Tensor]] | None = None
    embeddings: Callable[[], list[Tensor]] | None = None

    def keep_lowest(self, scores: Tensor) -> Tensor:
        """The `token_ratio` of each answer with the lowest scores: `floor(token_ratio * |T(x)|)`, at least one."""
        return token_keep_mask(scores, self.answer_mask, self.token_ratio, self.protected)

    def keep_lowest_of_all(self, scores: Tensor) -> Tensor:
        """The `token_ratio` of all answers together with the lowest scores; an answer may lose all its tokens."""
        scores, mask, protected = (part.reshape(1, -1) for part in (scores, self.answer_mask, self.protected))
        return token_keep_mask(scores, mask, self.token_ratio, protected).reshape(self.answer_mask.shape)


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


def perplexity(answers: Answers) -> Tensor:
    """The lowest perplexity of each answer's tokens: high ones are dropped (Q-Tuning's baseline "PPL")."""
    assert answers.nll is not None
    return answers.keep_lowest(answers.nll)


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

    Attention is causal, so earlier tokens receive it from more tokens; nobody looks at the last one.
    """
    assert answers.attention is not None
    received = [weights.sum(dim=0) - weights.diagonal() for weights in answers.attention(FASTV_LAYER)]
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
