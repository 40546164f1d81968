"""Selection: both stages of the method over the groups of a pool, by the pruners that the run names."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from .. import pruners
from ..config import QTuningSFTConfig
from ..host.attention import attention_weights
from ..host.modes import scoring_mode
from ..method import SampleSelection, budget_size, sample_statistics
from ..pruners import Answers, Pool
from ..pruners.authors_code import character_entropy
from ..pruners.samples import as_selection
from .sample import (
    Sample,
    answer_lengths,
    answer_mask,
    prompt_of,
    protected_mask,
    prune_document,
    sequence_tokens,
)
from .scoring import ScoredPool, Scorer, TokenValues, refuse_diverged


@dataclass(frozen=True)
class Group:
    """
    Candidates that were compared with each other, and what stage 1 decided about them.

    Args:
        samples (`list[Sample]`): The candidates.
        decided ([`SampleSelection`]): About each.
        answer_tokens, sequence_tokens (`int`): Of all that were drawn, those without a score too: tokens of their
            answers, and of prompts and answers all that can be predicted.
        perplexity, entropy (`Tensor` of shape `(samples,)`, float64, *optional*): Their place on the EU plane (entropy
            in nats), if they were scored.
    """

    samples: list[Sample]
    decided: SampleSelection
    answer_tokens: int
    sequence_tokens: int
    perplexity: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """
    What a step selected on this process.

    Args:
        groups (`list[Group]`): The candidates.
        survivors (`list[Sample]`): Those kept, group by group; whole after stage 1.
        to_prune (`list[int]`): Indices of the survivors whose answer tokens stage 2 prunes.
        token_values (`dict`): `nll` and `entropy` of their answer tokens, `Tensor` of shape `(len(to_prune),
            positions)`, float64, in nats; empty if stage 1 has not scored them.
    """

    groups: list[Group]
    survivors: list[Sample]
    to_prune: list[int]
    token_values: dict[str, Tensor] = field(default_factory=dict)

    def by_group(self) -> Iterator[tuple[Group, list[Sample]]]:
        """Each group with its survivors."""
        start = 0
        for group in self.groups:
            end = start + int(group.decided.keep.sum())
            yield group, self.survivors[start:end]
            start = end


@dataclass(eq=False)
class Selector:
    """Runs both stages: hands the pruners what they need of the run, and takes out what they prune."""

    args: QTuningSFTConfig
    accelerator: Accelerator
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    protected_ids: set[int]  # tokens that are never pruned
    reference: PreTrainedModel | None = None  # `reference_model`
    base: PreTrainedModel | None = None  # the model as it was, if it is trained whole; an adapter can be switched off

    def __post_init__(self) -> None:
        self.sample_pruner = pruners.sample_pruner(self.args.sample_pruner)
        self.token_pruner = pruners.token_pruner(self.args.token_pruner)

    # Stage 1

    def select_samples(self, drawn: list[list[Sample]], pool: ScoredPool, state: TrainerState) -> Selection:
        """
        Stage 1 on each group of candidates.

        Args:
            drawn (`list[list[Sample]]`): The candidates of each group, those without a score too.
            pool ([`ScoredPool`]): Those that can be selected.
            state (`TrainerState`): Of the run.
        """
        selection = Selection([], [], [])
        scored: dict[str, list[Tensor]] = {"nll": [], "entropy": []}
        for number, (candidates, (samples, values)) in enumerate(zip(drawn, pool.parts(), strict=True)):
            columns = self._columns(samples, values, state)
            decided = self._select(columns, len(candidates), number, state)
            if decided is None:
                continue
            tokens = sum(answer_lengths(candidates)), sequence_tokens(candidates)
            entropy = columns.get("sequence_entropy", columns.get("entropy"))  # whichever makes the plane
            selection.groups.append(Group(samples, decided, *tokens, columns.get("perplexity"), entropy))
            prune = decided.prune_tokens if "marked" in self.token_pruner.needs else decided.keep
            for index in decided.keep.nonzero().flatten().tolist():
                if prune[index]:
                    selection.to_prune.append(len(selection.survivors))
                    for name, rows in scored.items():
                        rows += [] if values is None else [getattr(values, name)[index]]
                weight = 1.0 if decided.weight is None else float(decided.weight[index])
                selection.survivors.append(replace(samples[index], weight=weight))
        return replace(selection, token_values={name: torch.stack(rows) for name, rows in scored.items() if rows})

    def _columns(self, samples: list[Sample], values: TokenValues | None, state: TrainerState) -> dict[str, Tensor]:
        """What is known of each sample of a group, as [`pruners.Pool`] takes it."""
        columns = {"lengths": torch.tensor(answer_lengths(samples), dtype=torch.int64)}
        if values is not None:
            perplexity, entropy = sample_statistics(values.nll, values.entropy, values.answer_mask)
            refuse_diverged(perplexity.isfinite() & entropy.isfinite(), self.args, state)
            columns |= {"perplexity": perplexity, "entropy": entropy}
            if values.sequence_entropy is not None:
                columns["sequence_entropy"] = values.sequence_entropy
        if "prompts" in self.sample_pruner.needs:
            prompts = self.tokenizer.batch_decode([prompt_of(sample).tolist() for sample in samples])
            columns["prompt_characters"] = torch.tensor([len(text) for text in prompts])
            entropies = [character_entropy(text) for text in prompts]
            columns["prompt_character_entropy"] = torch.tensor(entropies, dtype=torch.float64)
        if "column" in self.sample_pruner.needs:
            scores = [sample.column for sample in samples]
            marks = all(isinstance(score, bool) for score in scores)
            columns["column"] = torch.tensor(scores, dtype=torch.bool if marks else torch.float64)
        return columns

    def _select(
        self, columns: dict[str, Tensor], drawn: int, number: int, state: TrainerState
    ) -> SampleSelection | None:
        """
        Stage 1 on the scored ones of a group of `drawn` candidates; of all processes' groups, if they are compared.

        As many survive as the budget leaves of all that were drawn.
        """
        if not self.args.compares_processes:
            return self._select_of(columns, drawn, self.accelerator.process_index, number, state)
        parts = gather_object([(columns, drawn)])
        everyone = {name: torch.cat([part[0][name] for part in parts]) for name in columns}
        selection = self._select_of(everyone, sum(part[1] for part in parts), 0, number, state)
        if selection is None:
            return None
        start = sum(len(part[0]["lengths"]) for part in parts[: self.accelerator.process_index])
        return selection.rows(slice(start, start + len(columns["lengths"])))

    def _select_of(
        self, columns: dict[str, Tensor], drawn: int, process: int, number: int, state: TrainerState
    ) -> SampleSelection | None:
        if drawn == 0:
            return None
        ratio, scored = self.args.sample_ratio, len(columns["lengths"])
        if scored < drawn:
            ratio = budget_size(ratio, drawn) / scored
        pool = Pool(
            **columns,
            sample_ratio=ratio,
            generator=step_generator(self.args, state, process, number),
            progress=state.global_step / state.max_steps,
            stop_at_budget=self.args.bisection == "budget",
            infobatch_annealing=self.args.infobatch_annealing,
        )
        return as_selection(self.sample_pruner.prune(pool), pool, weighted="weights" in self.sample_pruner.needs)

    # Stage 2

    def answers(
        self, model: PreTrainedModel, selection: Selection, batch_tokens: int, state: TrainerState
    ) -> list[Answers]:
        """
        What the token pruner is given of each group, with the forwards that it takes.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model that is trained.
            selection ([`Selection`]): What stage 1 left.
            batch_tokens (`int`): Tokens to score at once, padding included.
            state (`TrainerState`): Of the run.
        """
        samples = [selection.survivors[index] for index in selection.to_prune]
        values = self._values(model, samples, selection.token_values, batch_tokens, state)
        generator = step_generator(self.args, state, self.accelerator.process_index, 0, 1)
        answers: list[Answers] = []
        first = start = 0
        for group, kept in selection.by_group():
            end = start + sum(first <= index < first + len(kept) for index in selection.to_prune)
            rows = slice(start, end)
            answers.append(self._answers_of(model, group, kept, samples[rows], rows, values, generator))
            first, start = first + len(kept), end
        return answers

    def _values(
        self,
        model: PreTrainedModel,
        samples: list[Sample],
        scored: dict[str, Tensor],
        batch_tokens: int,
        state: TrainerState,
    ) -> dict[str, Tensor]:
        """Per-token values of the samples that the token pruner needs; `scored`, what stage 1 knows of them."""
        needs = self.args.token_needs
        values: dict[str, Tensor] = {}

        def forward(scoring_model: PreTrainedModel) -> TokenValues:
            values = self.scorer.forward_all(scoring_model, samples, list(range(len(samples))), batch_tokens)
            refuse_diverged(values.nll.isfinite().all(dim=1), self.args, state)
            return values

        if "scores" in needs and "scores" not in self.sample_pruner.needs:
            of_model = forward(self.scorer.scoring_model(model))
            values |= {"nll": of_model.nll, "entropy": of_model.entropy}
        elif "scores" in needs:
            nothing = torch.zeros((0, 0), dtype=torch.float64)
            values |= scored or {"nll": nothing, "entropy": nothing}
        if self.reference is not None:
            values["reference_nll"] = forward(self.reference).nll
        if "base" in needs:
            with nullcontext() if self.base is not None else cast(PeftModel, model).disable_adapter():
                values["base_nll"] = forward(self.base or model).nll
        return values

    def _answers_of(
        self,
        model: PreTrainedModel,
        group: Group,
        kept: list[Sample],
        samples: list[Sample],
        rows: slice,
        values: dict[str, Tensor],
        generator: torch.Generator,
    ) -> Answers:
        """What the token pruner is given of a group: of its survivors `kept`, the `samples` that it prunes."""
        mask = answer_mask(samples)
        whole = sum(answer_lengths(kept)) - int(mask.sum())
        tokens = np.array([group.answer_tokens, whole, group.sequence_tokens, sequence_tokens(kept)])
        in_pool, whole, of_sequences, of_survivors = sum(gather_compared(self.args, tokens)).tolist()
        budget = None
        if self.args.token_budget == "pool":
            asked = budget_size(self.args.sample_ratio * self.args.token_ratio, in_pool)
            budget = max(0, asked - whole)
        attends = "attention" in self.args.token_needs
        of_tokens: dict[str, Any] = {name: value[rows, : mask.shape[1]] for name, value in values.items()}
        return replace(
            bare_answers(self.args, samples, self.protected_ids, generator, budget),
            sequence_tokens=of_sequences,
            survivor_tokens=of_survivors,
            gather=partial(gather_compared, self.args),
            process=self.accelerator.process_index if self.args.compares_processes else 0,
            attention=partial(self._attention, model, samples) if attends else None,
            embeddings=partial(self._embeddings, model, samples) if attends else None,
            **of_tokens,
        )

    def _attention(self, model: PreTrainedModel, samples: list[Sample], layer: int) -> list[Tensor]:
        with scoring_mode(model), self.accelerator.autocast():
            return [attention_weights(model, self._ids(sample), layer) for sample in samples]

    def _embeddings(self, model: PreTrainedModel, samples: list[Sample]) -> list[Tensor]:
        embed = model.get_input_embeddings()
        with torch.no_grad():
            return [embed(self._ids(sample)).float().cpu() for sample in samples]

    def _ids(self, sample: Sample) -> Tensor:
        return torch.from_numpy(sample.input_ids).to(self.args.device)

    def prune_tokens(self, selection: Selection, answers: list[Answers]) -> Selection:
        """Stage 2: the survivors that are to be pruned lose tokens of their answers; the others stay whole."""
        survivors = list(selection.survivors)
        indices = iter(selection.to_prune)
        for of_group in answers:
            # Processes that are compared with each other prune together, also those that have nothing to prune.
            if len(of_group.answer_mask) or self.args.compares_processes:
                for keep, index in zip(self.token_pruner.prune(of_group).numpy(), indices, strict=False):
                    survivors[index] = prune_document(survivors[index], keep, self.args.token_pruning == "drop")
        return replace(selection, survivors=survivors)


def gather_compared(args: QTuningSFTConfig, value: Any) -> list[Any]:
    """The values of all processes whose candidates are compared with each other, or this process's own alone."""
    return gather_object([value]) if args.compares_processes else [value]


def bare_answers(
    args: QTuningSFTConfig,
    samples: list[Sample],
    protected_ids: set[int],
    generator: torch.Generator,
    budget: int | None,
) -> Answers:
    """Answers of some samples as a token pruner takes them, without any values of their tokens."""
    mask = answer_mask(samples)
    return Answers(
        answer_mask=mask,
        protected=protected_mask(samples, protected_ids, mask.shape),
        token_ratio=args.token_ratio,
        generator=generator,
        lengths=torch.tensor([len(sample) for sample in samples], dtype=torch.int64),
        sample_ratio=args.sample_ratio,
        budget=budget,
        neighbor_weight=args.neighbor_weight,
    )


def step_generator(args: QTuningSFTConfig, state: TrainerState, *place: int) -> torch.Generator:
    """A generator of the step's own: the global one is restored only after a resumed run has drawn its first pool."""
    key = np.random.SeedSequence([args.seed, state.global_step, *place])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))


def special_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """Ids of the tokens that end a sequence or a turn or otherwise carry structure; an unknown word does not."""
    ids = set(tokenizer.all_special_ids)
    ids.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    end: Any = getattr(model.generation_config, "eos_token_id", None)
    ids.update([tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])])
    return ids - {tokenizer.unk_token_id, None}
