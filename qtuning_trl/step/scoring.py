"""Scoring: one gradient-free forward pass over the pool, for the per-token values the method starts from."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import PreTrainedModel, TrainerState
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import QTuningSFTConfig
from ..host.attention import attends_only, can_attend_by_document
from ..host.head import per_token_values
from ..host.modes import lean_scoring
from .memory import Needs
from .micro_batches import Row, dummy_sample
from .sample import Sample, answer_lengths, answer_mask
from .score_cache import Score, ScoreCache

# On a CPU, tokens scored at once for each that is trained on at once (docs/benchmarks.md), and the most of them: more
# only take longer, since they no longer fit into its caches (docs/experiments.md).
ON_CPU = 3
MOST_ON_CPU = 512


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


@dataclass(frozen=True)
class ScoredPool:
    """
    The candidates of a step that have a score, in groups that are compared with each other.

    Args:
        groups (`list[list[Sample]]`): Of each group those that have one; all of them, if nothing is scored.
        values ([`TokenValues`], *optional*): Theirs, group by group, unless nothing is scored.
        stale (`int`): How many of the scores are of an earlier step.
    """

    groups: list[list[Sample]]
    values: TokenValues | None = None
    stale: int = 0

    def parts(self) -> Iterator[tuple[list[Sample], TokenValues | None]]:
        """Each group with its values."""
        start = 0
        for group in self.groups:
            yield group, None if self.values is None else self.values.rows(slice(start, start + len(group)))
            start += len(group)


@dataclass(eq=False)
class Scorer:
    """Scores the pool of a step: which of its samples, in which batches, by which model, and which scores to reuse."""

    args: QTuningSFTConfig
    accelerator: Accelerator
    collator: DataCollatorForLanguageModeling  # for scoring, see `scoring_collator`
    sharded: bool  # whether parameters are gathered by all processes together (FSDP, DeepSpeed)
    proxy: PreTrainedModel | None = None  # `scoring_model`, which scores for the trained one
    cache: ScoreCache | None = None  # scores to use again

    def batch_tokens(self, row_lengths: list[int], full_tokens: int, slots: int, needs: Needs | None = None) -> int:
        """
        Tokens to score at once: as many as stay below the peak memory of the micro-batches that will be trained.

        Args:
            row_lengths (`list[int]`): Tokens of each row of the pool.
            full_tokens (`int`): Tokens of a full micro-batch, padding included.
            slots (`int`): Micro-batches that the step has without pruning.
            needs ([`Needs`], *optional*): What batches need. It is not counted where memory is no bound, on a CPU.
        """
        if self.args.scoring_batch_tokens is not None:
            return self.args.scoring_batch_tokens
        survivors = self.args.sample_ratio * sum(row_lengths)
        if self.args.micro_batches == "small":
            survivors /= slots
        trained = min(full_tokens, survivors)
        if self.args.device.type == "cpu":
            tokens = min(int(ON_CPU * trained), MOST_ON_CPU)
        else:
            tokens = int(trained) if needs is None else needs.scoring_tokens(trained)
        return max(tokens, max(row_lengths))

    def score(
        self, model: PreTrainedModel, groups: list[list[Sample]], batch_tokens: int, state: TrainerState
    ) -> ScoredPool:
        """
        One gradient-free forward pass over the candidates, those that are to be scored now.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model that is trained.
            groups (`list[list[Sample]]`): The candidates, each with an answer token.
            batch_tokens (`int`): Tokens to score at once, padding included.
            state (`TrainerState`): Of the run; tells how old a score is.
        """
        scored: list[list[Sample]] = []
        now: list[int] = []
        reused: dict[int, Score] = {}
        for number, group in enumerate(groups):
            start = sum(map(len, scored))
            new, old = self._plan(group, number, state.global_step)
            place = {index: start + place for place, index in enumerate(sorted([*new, *old]))}
            scored.append([group[index] for index in place])
            now += [place[index] for index in new]
            reused |= {place[index]: score for index, score in old.items()}

        pool = [sample for group in scored for sample in group]
        prompts_too = "sequence_entropy" in self.args.sample_needs
        whole = [replace(sample, labels=sample.input_ids) for sample in pool] if prompts_too else pool
        values = self.forward_all(self.scoring_model(model), whole, now, batch_tokens)
        if prompts_too:
            values = values.answers_alone(answer_mask(pool))
        for index, score in reused.items():
            values.set_row(index, score.nll, score.entropy)
        if self.cache is not None:
            for index in now:
                self._keep_score(pool[index], *values.row(index), state.global_step)
        return ScoredPool(scored, values, len(reused))

    def scoring_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model that scores: the one that is trained, unless `scoring_model` names another."""
        return model if self.proxy is None else self.proxy

    def forward_all(self, model: PreTrainedModel, pool: list[Sample], now: list[int], batch_tokens: int) -> TokenValues:
        """Per-token values by a gradient-free forward of `model` over those samples of the pool that `now` lists."""
        flat = self.collator.padding_free
        batches = scoring_batches([len(pool[index]) for index in now], batch_tokens, flat)
        idle = 0
        if self.sharded:
            # Sharded parameters are gathered by all processes together, so all run as many forwards.
            idle = max(gather_object([len(batches)])) - len(batches)

        forward = partial(self.forward, model)
        # Only the model that is trained casts by itself, not one that scores for it.
        with lean_scoring(model, self.args.device, flat), self.accelerator.autocast():
            chosen = [[now[index] for index in batch] for batch in batches]
            try:
                values = score_documents(pool, answer_mask(pool), chosen, forward)
            except RuntimeError as error:
                # Where the host looks for a batch size that fits, it must see the error itself.
                if self.args.auto_find_batch_size or not is_out_of_memory(error):
                    raise
                raise MemoryError(
                    f"Out of memory while scoring {batch_tokens} tokens at once: set `scoring_batch_tokens` to less, "
                    f"such as {max(batch_tokens // 2, 1)}, or lower `max_length`, if a single sample does not fit."
                ) from error
            for _ in range(idle):
                forward([dummy_sample(self.collator.pad_token_id)])
        return values

    def forward(self, model: PreTrainedModel, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and entropies of the answer tokens of some samples, in nats, as two vectors in order."""
        examples = [Row([sample], packed=self.args.packing).as_example() for sample in samples]
        return per_token_values(model, send_to_device(self.collator(examples), self.args.device))

    def _plan(self, group: list[Sample], number: int, step: int) -> tuple[list[int], dict[int, Score]]:
        """Indices of the candidates to score now, and the earlier scores to use again (see `ScoreCache.plan`)."""
        most = math.ceil(self.args.scored_share * len(group) - 1e-9)
        order = list(range(len(group)))
        if most < len(group):
            # A generator of its own: the global one is restored only after a resumed run has drawn its first pool.
            seed = (self.args.seed, step, self.accelerator.process_index, number)
            order = np.random.default_rng(seed).permutation(len(group)).tolist()
        if self.cache is None:
            return order[:most], {}
        samples = [(sample.sample_id, size) for sample, size in zip(group, answer_lengths(group), strict=True)]
        return self.cache.plan(samples, order, most, step)

    def _keep_score(self, sample: Sample, nll: np.ndarray, entropy: np.ndarray, step: int) -> None:
        assert self.cache is not None
        self.cache.add(sample.sample_id, Score(nll, entropy, step, self.cache.epoch))

    @contextmanager
    def renewed_scores(self, model: PreTrainedModel, survivors: list[Sample], state: TrainerState) -> Iterator[None]:
        """While it is open, a training forward renews the scores of the samples in it that are whole, for nothing."""

        def renew(_module: Any, _inputs: Any, outputs: Any) -> None:
            ends = np.cumsum(answer_lengths(survivors))[:-1]
            nll, entropy = (
                np.split(values[outputs.label_mask].detach().float().cpu().numpy(), ends)
                for values in (-outputs.log_probs, outputs.entropy)
            )
            for index, sample in enumerate(survivors):
                if not sample.pruned:
                    self._keep_score(sample, nll[index].copy(), entropy[index].copy(), state.global_step)

        handle = model.register_forward_hook(renew)
        try:
            yield
        finally:
            handle.remove()


def scoring_collator(
    collator: DataCollatorForLanguageModeling, models: list[PreTrainedModel], device: torch.device
) -> DataCollatorForLanguageModeling:
    """The collator of training, for scoring by these models: it flattens batches, where they can tell samples apart."""
    # Flattened batches cost no padding. Flash attention tells their documents apart by itself; on a CPU we do.
    flash = "flash" in str(models[0].config._attn_implementation)
    flatten = (
        collator.padding_free
        or (flash and all(map(attends_only, models)))
        or all(can_attend_by_document(model, device) for model in models)
    )
    return replace(collator, padding_free=flatten)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is used up: a GPU's, or a CPU's ("can't allocate memory")."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def refuse_diverged(finite: Tensor, args: QTuningSFTConfig, state: TrainerState) -> None:
    """Raise a `FloatingPointError` if the score of a candidate is not finite."""
    if not bool(finite.all()):
        raise FloatingPointError(
            f"Step {state.global_step + 1}: {int((~finite).sum())} of {len(finite)} candidates have a NaN or "
            "infinite score, so the model has diverged; resume from the last checkpoint in "
            f"{args.output_dir!r} with a lower `learning_rate` than {args.learning_rate:g}."
        )


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
    documents: list[Sample],
    answer_mask: Tensor,
    batches: Iterable[list[int]],
    forward: Callable[[list[Sample]], tuple[Tensor, Tensor]],
) -> TokenValues:
    """
    Per-token NLL and entropy of every sample in the pool.

    Args:
        documents (`list[Sample]`): The pool.
        answer_mask (`Tensor` of shape `(samples, longest - 1)`, bool): Answer tokens, as of `sample.answer_mask`.
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
