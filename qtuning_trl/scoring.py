"""Scoring: one gradient-free forward pass over the pool, for the per-token values the method starts from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .documents import Document


@dataclass(frozen=True)
class TokenValues:
    """
    Per-token values of a pool, aligned to the labels after the causal shift: column j speaks of token j + 1.

    Args:
        nll (`Tensor` of shape `(samples, longest - 1)`, float64): `-log p(token)`, in nats; 0 outside the answer.
        entropy (`Tensor` of shape `(samples, longest - 1)`, float64): Predictive entropy, in nats; 0 outside.
        answer_mask (`Tensor` of shape `(samples, longest - 1)`, bool): The answer tokens T(x).
        sequence_entropy (`Tensor` of shape `(samples,)`, float64, *optional*): Mean predictive entropy of prompt and
            answer, in nats, where prompts were scored too.
    """

    nll: Tensor
    entropy: Tensor
    answer_mask: Tensor
    sequence_entropy: Tensor | None = None

    def rows(self, rows: slice) -> "TokenValues":
        """The values of some of the samples."""
        of_sequences = None if self.sequence_entropy is None else self.sequence_entropy[rows]
        return TokenValues(self.nll[rows], self.entropy[rows], self.answer_mask[rows], of_sequences)

    def answers_alone(self, answer_mask: Tensor) -> "TokenValues":
        """From values of prompts and answers, for which `answer_mask` was all tokens, to those of the answers."""
        nll, entropy = (values.masked_fill(~answer_mask, 0.0) for values in (self.nll, self.entropy))
        return TokenValues(nll, entropy, answer_mask, self.entropy.sum(dim=1) / self.answer_mask.sum(dim=1))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """NLL and entropy of one sample's answer tokens, float32 of shape `(answer tokens,)`."""
        mask = self.answer_mask[index]
        return self.nll[index][mask].float().numpy(), self.entropy[index][mask].float().numpy()

    def set_row(self, index: int, nll: np.ndarray, entropy: np.ndarray) -> None:
        """Put in NLL and entropy of one sample's answer tokens."""
        mask = self.answer_mask[index]
        self.nll[index, mask] = torch.from_numpy(nll).double()
        self.entropy[index, mask] = torch.from_numpy(entropy).double()


def scoring_batches(lengths: list[int], batch_tokens: int, padding_free: bool) -> list[list[int]]:
    """
    Group a pool into batches of at most `batch_tokens` tokens, longest first, so that little is padding.

    Args:
        lengths (`list[int]`): Tokens of each sample.
        batch_tokens (`int`): Tokens a batch may hold, padding included. A longer sample is a batch of its own.
        padding_free (`bool`): Whether a batch is flattened, so that padding costs nothing.

    Returns:
        `list[list[int]]`: Indices into `lengths`; every sample exactly once.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # Longest first: the first sample of a batch sets what each further one costs when it is padded.
        cost = lengths[index] if padding_free or not batches else lengths[batches[-1][0]]
        if not batches or used + cost > batch_tokens:
            batches.append([])
            used, cost = 0, lengths[index]
        batches[-1].append(index)
        used += cost
    return batches


def score_documents(
    documents: list[Document],
    answer_mask: Tensor,
    batches: Iterable[list[int]],
    forward: Callable[[list[Document]], tuple[Tensor, Tensor]],
) -> TokenValues:
    """
    Per-token NLL and entropy of every sample in the pool.

    Args:
        documents (`list[Document]`): The pool.
        answer_mask (`Tensor` of shape `(samples, longest - 1)`, bool): Answer tokens, as of `documents.answer_mask`.
        batches (`Iterable[list[int]]`): Indices of the samples that go through the model together. The values of a
            sample that is in none stay 0.
        forward (`Callable`): Takes documents, returns the log-likelihoods and entropies of their answer tokens, in
            nats, as two vectors in order.

    Returns:
        [`TokenValues`]: On the CPU.
    """
    nll = torch.zeros(answer_mask.shape, dtype=torch.float64)
    entropy = torch.zeros_like(nll)
    for batch in batches:
        log_probs, entropies = forward([documents[index] for index in batch])
        mask = answer_mask[batch]
        for values, filled in ((nll, -log_probs), (entropy, entropies)):
            rows = torch.zeros(mask.shape, dtype=torch.float64)
            rows[mask] = filled.cpu().double()
            values[batch] = rows
    return TokenValues(nll, entropy, answer_mask)
