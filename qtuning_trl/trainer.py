"""
`QTuningSFTTrainer`: TRL's `SFTTrainer`, which before each optimizer step scores a pool of candidates and prunes it.

The step, in the order of `get_batch_samples`: draw the pool -> one gradient-free scoring forward -> stage 1 prunes
samples -> stage 2 prunes tokens -> the survivors are collated into as few micro-batches as they need. The training step
itself is TRL's own.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from . import checks, pruners
from .config import QTuningSFTConfig
from .documents import (
    KEPT_MASK,
    NOT_FOR_THE_MODEL,
    SAMPLE_ID,
    Document,
    RawBatch,
    answer_lengths,
    answer_mask,
    number_rows,
    pack_rows,
    padded_tokens,
    prompt_of,
    protected_mask,
    prune_document,
    sequence_tokens,
    split_documents,
    split_evenly,
    tokens_without_checkpointing,
)
from .host import (
    attends_only,
    attention_weights,
    can_attend_by_document,
    count_items,
    has_dropout,
    keep_column,
    lean_lm_head,
    lean_scoring,
    load_second_model,
    per_token_values,
    scoring_mode,
    train_loader_of,
    weighted_losses,
    without_checkpointing,
)
from .live import PlaneLogger, show_progress
from .method import SampleSelection, budget_size, sample_statistics
from .pruners import Answers, Pool
from .pruners.authors_code import character_entropy
from .pruners.samples import as_selection
from .record import SUMMARY_NAME, THRESHOLDS, RunRecord, StepCounts, model_card_section, synchronize
from .sample_record import SampleRecorder
from .score_cache import FILE_NAME as SCORES_NAME
from .score_cache import Score, ScoreCache
from .scoring import TokenValues, score_documents, scoring_batches

logger = get_logger(__name__)

# Tokens scored at once, for each that is trained on at once: scoring keeps no activations (docs/benchmarks.md).
SCORING_TO_TRAINING = 3
# More than this many only take a CPU longer: they no longer fit into its caches (docs/experiments.md).
MOST_ON_CPU = 512


class QTuningSFTTrainer(SFTTrainer):
    """
    Trainer for Supervised Fine-Tuning with joint sample and token pruning (Q-Tuning, arXiv 2509.23873).

    It takes the arguments of TRL's [`~trl.SFTTrainer`]. With `sample_ratio=1.0` and `token_ratio=1.0` it gives the very
    run that `SFTTrainer` gives.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train.
        args ([`QTuningSFTConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        data_collator ([`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`], *optional*):
            Collator of the survivors; others are refused, since labels are pruned before they are collated.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The candidates.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name or path.
        **kwargs:
            Further arguments of [`~trl.SFTTrainer`]: `eval_dataset`, `peft_config`, `quantization_config`,
            `callbacks`, `optimizers`, `formatting_func`...

    Raises:
        `ValueError`, `TypeError`: If an option or the dataset cannot be used; before any training, in one sentence.

    Example:
    ```python
    from datasets import load_dataset
    from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer

    trainer = QTuningSFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=QTuningSFTConfig(output_dir="smollm2-qtuning", sample_ratio=0.125, token_ratio=0.5),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    args: QTuningSFTConfig
    model: PreTrainedModel

    _tag_names = ["trl", "sft", "qtuning"]  # noqa: RUF012 (a class attribute of the host)
    _name = "Q-Tuning"
    _paper = {  # noqa: RUF012
        "title": "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for Efficient "
        "Supervised Fine-Tuning",
        "id": "2509.23873",
        "citation": (
            "@article{wang2025qtuning,\n"
            "    title  = {{Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for "
            "Efficient Supervised Fine-Tuning}},\n"
            "    author = {Shaobo Wang and Jiaming Wang and Jiajun Zhang and Cong Wang and Yue Min and Zichen Wen and "
            "Xingzhang Ren and Fei Huang and Huiqiang Jiang and Junyang Lin and Dayiheng Liu and Linfeng Zhang},\n"
            "    year   = 2025,\n"
            "    eprint = {arXiv:2509.23873},\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: Any,
        args: QTuningSFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = QTuningSFTConfig(f"{name.rstrip('/').split('/')[-1]}-QTuning-SFT")
        checks.refuse_unsupported_options(args, data_collator, compute_loss_func, model, kwargs.get("peft_config"))
        first = checks.refuse_unusable_dataset(train_dataset, args)
        if checks.needs_chat_template(first, args):
            if processing_class is None:
                processing_class = self._load_processing_class(model, args)
            checks.refuse_missing_chat_template(processing_class)

        if isinstance(train_dataset, Dataset) and not args.keeps_everything:
            train_dataset = number_rows(train_dataset)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

        rows_before = None if kwargs.get("formatting_func") else _length(train_dataset)
        cut_off = checks.refuse_missing_answers(self.train_dataset, rows_before, args)
        if cut_off:
            logger.warning(
                f"`max_length` is {args.max_length}: it cuts off the whole answer of {cut_off} of {rows_before} rows, "
                "which TRL drops; raise it to train on them."
            )
        for column in (SAMPLE_ID, args.group_column, args.score_column):
            if column is not None and not args.keeps_everything:
                keep_column(self, column)
        # Survivors are uneven over micro-batches and processes, so the loss must be divided by the tokens of the step.
        # About 40 multimodal families switch this off, and their survivors would be averaged wrongly.
        self.model_accepts_loss_kwargs = True
        self._proxy = self._second_model("scoring_model") if args.scoring_model is not None else None
        checks.refuse_missing_attention(self.model, args)
        self._sample_pruner = pruners.sample_pruner(args.sample_pruner)
        self._token_pruner = pruners.token_pruner(args.token_pruner)
        self._reference = self._second_model("reference_model") if "reference" in args.token_needs else None
        # An adapter can be switched off; a model that is trained whole must be kept as it was.
        whole = "base" in args.token_needs and not isinstance(self.model, PeftModel)
        self._base = copy.deepcopy(self.model).requires_grad_(False) if whole else None
        # Flattened batches cost no padding. Flash attention tells their documents apart by itself; on a CPU we do.
        scorers = [model for model in (self.model, self._proxy, self._reference) if model is not None]
        flash = "flash" in str(self.model.config._attn_implementation)
        flatten = (
            self.padding_free
            or (flash and all(map(attends_only, scorers)))
            or all(can_attend_by_document(model, args.device) for model in scorers)
        )
        self._scoring_collator = replace(
            cast(DataCollatorForLanguageModeling, self.data_collator), padding_free=flatten
        )
        self._score_cache: ScoreCache | None = None
        if args.reuses_scores and "scores" in args.sample_needs and not args.keeps_everything:
            self._score_cache = ScoreCache(args.score_reuse_epochs, args.score_reuse_steps)
            self.add_callback(_ScoreKeeper(self._score_cache, self.accelerator.num_processes))
        # A training forward scores as a scoring forward does, if it is the same model without noise.
        noisy = args.neftune_noise_alpha is not None or has_dropout(self.model)
        self._renews_scores = self._score_cache is not None and self._proxy is None and not noisy
        self.add_callback(RunRecord)
        self.add_callback(_SummaryWriter(self))
        self._recorder = SampleRecorder(self) if args.record and "scores" in args.sample_needs else None
        if self._recorder is not None:
            self.add_callback(self._recorder)
        self.add_callback(PlaneLogger(self))
        show_progress(self)
        self.last_pool: dict[str, Any] | None = None
        self._protected_ids = self._special_token_ids() if args.protect_special_tokens else set()
        self._num_micro_batches = 0

    @staticmethod
    def _load_processing_class(model: Any, args: QTuningSFTConfig) -> Any:
        init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        return AutoProcessor.from_pretrained(
            model if isinstance(model, str) else model.config._name_or_path,
            revision=init_kwargs.get("revision") if isinstance(model, str) else None,
            trust_remote_code=args.trust_remote_code,
        )

    def _second_model(self, option: str) -> PreTrainedModel:
        return load_second_model(option, self.args, self.model, self._tokenizer)

    def _special_token_ids(self) -> set[int]:
        """Ids of the tokens that end a sequence or a turn or otherwise carry structure; an unknown word does not."""
        tokenizer = self._tokenizer
        ids = set(tokenizer.all_special_ids)
        ids.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        ids.discard(tokenizer.unk_token_id)
        ids.add(tokenizer.eos_token_id)
        end: Any = self.model.generation_config.eos_token_id
        ids.update([end] if isinstance(end, int) else end or [])
        return ids

    @property
    def _scorer(self) -> PreTrainedModel:
        """The model that scores: the one that is trained, unless `scoring_model` names another."""
        return self.model if self._proxy is None else self._proxy

    @property
    def _selects_together(self) -> bool:
        """Whether the candidates of several processes are compared with each other."""
        return self.args.selection_scope == "all_processes" and self.accelerator.num_processes > 1

    @property
    def run_record(self) -> RunRecord:
        """Counts and seconds of the run. Looked up, since transformers may rebuild callbacks on resume."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunRecord))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """TRL's `train`; with reused scores, a resumed run goes on with those of its checkpoint."""
        if self._score_cache is not None:
            self._score_cache.scores.clear()
            folder = (
                get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
            )
            if folder and not self._score_cache.load(folder):
                logger.warning(f"{folder} holds no {SCORES_NAME}: every sample is scored anew.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # The three hooks of the training loop

    def get_train_dataloader(self) -> DataLoader:
        """The train loader, which yields uncollated examples: candidates are pruned before they are collated."""
        if self.args.keeps_everything:
            return super().get_train_dataloader()
        with train_loader_of(self, RawBatch, self._train_batch_size * self.args.pool_factor):
            return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """
        Draw the pool of one optimizer step, prune it, and collate the survivors.

        Returns:
            `tuple`: As many entries as were drawn, since the loop counts them to find the optimizer step: placeholders
            first, then the micro-batches, so that the last backward pass is a real one; and the number of trainable
            tokens among the survivors of all processes.

        Raises:
            `FloatingPointError`: If a candidate's score is NaN or infinite.
        """
        if self.args.keeps_everything:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._num_micro_batches = len(batches)
            self._record_unpruned_step(batches)
            return batches, num_items

        drawn = [batch.examples for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not drawn:
            return [], None
        synchronize()  # so that the previous step's work is not counted as selecting
        groups = [[doc for row in rows for doc in self._documents_of(row)] for rows in drawn]
        if self.args.selection_scope != "micro_batch":
            groups = [[document for group in groups for document in group]]
        row_lengths = [len(row["input_ids"]) for rows in drawn for row in rows]
        full_tokens = self._train_batch_size * max(row_lengths)
        survivors, step = self._prune_pool(groups, self._scoring_batch_tokens(row_lengths, full_tokens, len(drawn)))
        with self.run_record.phase("collation"):
            micro_batches = self._collate_survivors(survivors, len(drawn), full_tokens)
            num_items = count_items(self, micro_batches, device)
        self._num_micro_batches = len(micro_batches)
        self._record_step(step)
        placeholders = [_placeholder() for _ in range(len(drawn) - len(micro_batches))]
        return placeholders + micro_batches, num_items

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """TRL's training step on a micro-batch of survivors; nothing on a placeholder."""
        if inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = self._num_micro_batches
        if self.args.keeps_everything:
            return super().training_step(model, inputs, num_items_in_batch)
        survivors = inputs.pop("survivors")
        with ExitStack() as stack:
            stack.enter_context(lean_lm_head(self.args.device))
            if not inputs.pop("checkpointing"):
                stack.enter_context(without_checkpointing(self.model))
            if self._renews_scores:
                stack.enter_context(self._renewed_scores(survivors))
            if survivors and "weights" in self._sample_pruner.needs:
                weights = [document["weight"] for document in survivors]
                tokens = torch.tensor(weights).repeat_interleave(torch.tensor(answer_lengths(survivors)))
                stack.enter_context(weighted_losses(self.model, tokens))
            return super().training_step(model, inputs, num_items_in_batch)

    # The parts of a step

    def _documents_of(self, row: dict[str, Any]) -> list[Document]:
        score_column = self.args.score_column if "column" in self._sample_pruner.needs else None
        return split_documents(row, self.args.group_column, score_column)

    def _scoring_batch_tokens(self, row_lengths: list[int], full_tokens: int, slots: int) -> int:
        """Tokens to score at once: as many as stay below the peak memory of the micro-batches that will be trained."""
        if self.args.scoring_batch_tokens is not None:
            return self.args.scoring_batch_tokens
        survivors = self.args.sample_ratio * sum(row_lengths)
        if self.args.micro_batches == "small":
            survivors /= slots
        tokens = int(SCORING_TO_TRAINING * min(full_tokens, survivors))
        if self.args.device.type == "cpu":
            tokens = min(tokens, MOST_ON_CPU)
        return max(tokens, max(row_lengths))

    def _prune_pool(self, groups: list[list[Document]], batch_tokens: int) -> tuple[list[Document], StepCounts]:
        """Both stages on each group of candidates: the survivors, and the step's counts on this process."""
        # A sample without an answer token has no perplexity: it is no candidate, and cannot survive.
        candidates = [[doc for doc, size in zip(g, answer_lengths(g), strict=True) if size > 0] for g in groups]
        step = StepCounts(scored="scores" in self._sample_pruner.needs)
        scored, values = candidates, None
        if step.scored:
            with self.run_record.phase("scoring"):
                scored, stale, values = self._score(candidates, batch_tokens)
            step.nll, step.entropy = float(values.nll.sum()), float(values.entropy.sum())
            step.scored_tokens = int(values.answer_mask.sum())
            step.counts["stale_scores"] = stale
            step.counts["scored_samples"] = sum(map(len, scored)) - stale
        step.counts["unscorable_samples"] = sum(map(len, groups)) - sum(map(len, candidates))
        step.counts["pool_answer_tokens"] = sum(sum(answer_lengths(group)) for group in candidates)

        self.last_pool = None
        chosen: list[_Chosen] = []
        start = 0
        with self.run_record.phase("selection"):
            for number, (drawn, group) in enumerate(zip(candidates, scored, strict=True)):
                part = None if values is None else values.rows(slice(start, start + len(group)))
                start += len(group)
                columns = self._columns(group, part)
                selection = self._select(columns, len(drawn), number)
                step.counts["pool_samples"] += len(drawn)
                tokens = PoolTokens(sum(answer_lengths(drawn)), sequence_tokens(drawn))
                if self.args.group_column is not None:
                    step.add_groups([document["group"] for document in drawn], "candidates")
                if selection is not None:
                    chosen.append(_Chosen(group, columns, None if part is None else part.nll, selection, tokens))
        survivors = self._prune_tokens(chosen, batch_tokens)
        if "scores" in self.args.token_needs and not step.scored:
            step.counts["scored_samples"] = len(survivors)

        start = 0
        with self.run_record.phase("selection"):
            for group, columns, _, selection, _ in chosen:
                kept = survivors[start : start + int(selection.keep.sum())]
                start += len(kept)
                step.add_selection(selection)
                step.counts["kept_answer_tokens"] += sum(answer_lengths(kept))
                if self.args.group_column is not None:
                    step.add_groups([document["group"] for document in kept], "kept")
                if step.scored:
                    entropy = columns.get("sequence_entropy", columns["entropy"])  # whichever makes the plane
                    self._remember_pool(group, columns["perplexity"], entropy, selection)
                    if self._recorder is not None:
                        self._recorder.add(group, columns["perplexity"], entropy, selection, kept)
        return survivors, step

    def _score(self, groups: list[list[Document]], batch_tokens: int) -> tuple[list[list[Document]], int, TokenValues]:
        """
        One gradient-free forward pass over the candidates, those that are to be scored now.

        Returns:
            `tuple`: Of each group, the candidates that have a score (all of them, unless `scored_share` is below 1);
            how many of the scores are of an earlier step; the per-token values of these candidates, group by group.
        """
        scored: list[list[Document]] = []
        now: list[int] = []
        reused: dict[int, Score] = {}
        for number, group in enumerate(groups):
            start = sum(map(len, scored))
            new, old = self._plan_scoring(group, number)
            place = {index: start + place for place, index in enumerate(sorted([*new, *old]))}
            scored.append([group[index] for index in place])
            now += [place[index] for index in new]
            reused |= {place[index]: score for index, score in old.items()}

        pool = [document for group in scored for document in group]
        values = self._forward_all(self._scorer, pool, now, batch_tokens)
        for index, score in reused.items():
            values.set_row(index, score.nll, score.entropy)
        if self._score_cache is not None:
            for index in now:
                self._keep_score(pool[index], *values.row(index))
        return scored, len(reused), values

    def _forward_all(
        self, model: PreTrainedModel, pool: list[Document], now: list[int], batch_tokens: int
    ) -> TokenValues:
        """Per-token values by a gradient-free forward of `model` over those samples of the pool that `now` lists."""
        lengths = [len(pool[index]["input_ids"]) for index in now]
        batches = scoring_batches(lengths, batch_tokens, self._scoring_collator.padding_free)
        idle = 0
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Sharded parameters are gathered by all processes together, so all run as many forwards.
            idle = max(gather_object([len(batches)])) - len(batches)

        forward = partial(self._forward_documents, model=model)
        prompts_too = "sequence_entropy" in self._sample_pruner.needs and model is self._scorer
        scored = [{**document, "labels": document["input_ids"]} for document in pool] if prompts_too else pool
        flat = self._scoring_collator.padding_free
        # Only the model that is trained casts by itself, not one that scores for it.
        with lean_scoring(model, self.args.device, flat), self.accelerator.autocast():
            chosen = [[now[index] for index in batch] for batch in batches]
            values = score_documents(scored, answer_mask(scored), chosen, forward)
            for _ in range(idle):
                forward([self._dummy_row()])
        return values.answers_alone(answer_mask(pool)) if prompts_too else values

    def _forward_documents(
        self, documents: list[Document], model: PreTrainedModel | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = send_to_device(self._scoring_collator(_as_rows(documents, self.args.packing)), self.args.device)
        return per_token_values(model or self._scorer, batch)

    def _plan_scoring(self, group: list[Document], number: int) -> tuple[list[int], dict[int, Score]]:
        """Indices of the candidates to score now, and the earlier scores to use again (see `ScoreCache.plan`)."""
        most = math.ceil(self.args.scored_share * len(group) - 1e-9)
        order = list(range(len(group)))
        if most < len(group):
            # A generator of its own: the global one is restored only after a resumed run has drawn its first pool.
            seed = (self.args.seed, self.state.global_step, self.accelerator.process_index, number)
            order = np.random.default_rng(seed).permutation(len(group)).tolist()
        if self._score_cache is None:
            return order[:most], {}
        samples = [(doc[SAMPLE_ID], size) for doc, size in zip(group, answer_lengths(group), strict=True)]
        return self._score_cache.plan(samples, order, most, self.state.global_step)

    def _keep_score(self, document: Document, nll: np.ndarray, entropy: np.ndarray) -> None:
        assert self._score_cache is not None
        score = Score(nll, entropy, self.state.global_step, self._score_cache.epoch)
        self._score_cache.add(document[SAMPLE_ID], score)

    @contextmanager
    def _renewed_scores(self, survivors: list[Document]) -> Iterator[None]:
        """While it is open, a training forward renews the scores of the samples in it that are whole, for nothing."""

        documents = [document for row in survivors for document in row.get("documents", [row])]

        def renew(_module: Any, _inputs: Any, outputs: Any) -> None:
            ends = np.cumsum(answer_lengths(documents))[:-1]
            nll, entropy = (
                np.split(values[outputs.label_mask].detach().float().cpu().numpy(), ends)
                for values in (-outputs.log_probs, outputs.entropy)
            )
            for index, document in enumerate(documents):
                if not document.get("pruned"):
                    self._keep_score(document, nll[index].copy(), entropy[index].copy())

        handle = self.model.register_forward_hook(renew)
        try:
            yield
        finally:
            handle.remove()

    def _refuse_diverged(self, finite: Tensor) -> None:
        if not bool(finite.all()):
            raise FloatingPointError(
                f"Step {self.state.global_step + 1}: {int((~finite).sum())} of {len(finite)} candidates have a NaN or "
                "infinite score, so the model has diverged; resume from the last checkpoint in "
                f"{self.args.output_dir!r} with a lower `learning_rate` than {self.args.learning_rate:g}."
            )

    def _columns(self, group: list[Document], values: TokenValues | None) -> dict[str, Tensor]:
        """What is known of each sample of a group, as [`pruners.Pool`] takes it."""
        columns = {"lengths": torch.tensor(answer_lengths(group), dtype=torch.int64)}
        if values is not None:
            perplexity, entropy = sample_statistics(values.nll, values.entropy, values.answer_mask)
            self._refuse_diverged(perplexity.isfinite() & entropy.isfinite())
            columns |= {"perplexity": perplexity, "entropy": entropy}
            if values.sequence_entropy is not None:
                columns["sequence_entropy"] = values.sequence_entropy
        if "prompts" in self._sample_pruner.needs:
            prompts = self._tokenizer.batch_decode([prompt_of(document) for document in group])
            columns["prompt_characters"] = torch.tensor([len(text) for text in prompts])
            columns["prompt_character_entropy"] = torch.tensor(
                [character_entropy(text) for text in prompts], dtype=torch.float64
            )
        if "column" in self._sample_pruner.needs:
            scores = [document["column"] for document in group]
            marks = all(isinstance(score, bool) for score in scores)
            columns["column"] = torch.tensor(scores, dtype=torch.bool if marks else torch.float64)
        return columns

    def _select(self, columns: dict[str, Tensor], drawn: int, number: int) -> SampleSelection | None:
        """
        Stage 1 on the scored ones of a group of `drawn` candidates; of all processes' groups, if they are compared.

        As many survive as the budget leaves of all that were drawn.
        """
        if not self._selects_together:
            return self._select_of(columns, drawn, self.accelerator.process_index, number)
        parts = gather_object([(columns, drawn)])
        everyone = {name: torch.cat([part[0][name] for part in parts]) for name in columns}
        selection = self._select_of(everyone, sum(part[1] for part in parts), 0, number)
        if selection is None:
            return None
        start = sum(len(part[0]["lengths"]) for part in parts[: self.accelerator.process_index])
        return selection.rows(slice(start, start + len(columns["lengths"])))

    def _select_of(self, columns: dict[str, Tensor], drawn: int, process: int, number: int) -> SampleSelection | None:
        if drawn == 0:
            return None
        ratio, scored = self.args.sample_ratio, len(columns["lengths"])
        if scored < drawn:
            ratio = budget_size(ratio, drawn) / scored
        pool = Pool(
            **columns,
            sample_ratio=ratio,
            generator=self._generator(process, number),
            progress=self.state.global_step / self.state.max_steps,
            stop_at_budget=self.args.bisection == "budget",
            infobatch_annealing=self.args.infobatch_annealing,
        )
        return as_selection(self._sample_pruner.prune(pool), pool, weighted="weights" in self._sample_pruner.needs)

    def _generator(self, *place: int) -> torch.Generator:
        """A generator of its own: the global one is restored only after a resumed run has drawn its first pool."""
        key = np.random.SeedSequence([self.args.seed, self.state.global_step, *place])
        return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def _prune_tokens(self, chosen: list["_Chosen"], batch_tokens: int) -> list[Document]:
        """The survivors of all groups in order, after stage 2 on those that it prunes; the others stay whole."""
        survivors: list[Document] = []
        pruned: list[list[int]] = []
        nll: list[Tensor] = []
        for group, _, group_nll, selection, _ in chosen:
            prune = selection.prune_tokens if "marked" in self._token_pruner.needs else selection.keep
            pruned.append([])
            for index in selection.keep.nonzero().flatten().tolist():
                if prune[index]:
                    pruned[-1].append(len(survivors))
                    nll += [] if group_nll is None else [group_nll[index]]
                weight = {} if selection.weight is None else {"weight": float(selection.weight[index])}
                survivors.append({**group[index], **weight})
        if self.args.token_ratio == 1.0:
            return survivors
        documents = [survivors[index] for indices in pruned for index in indices]
        with self.run_record.phase("scoring"):
            values = self._token_values(documents, nll, batch_tokens)
        drop = self.args.token_pruning == "drop"
        generator = self._generator(self.accelerator.process_index, 0, 1)
        start = first = 0
        with self.run_record.phase("selection"):
            for (_, _, _, selection, pool_tokens), indices in zip(chosen, pruned, strict=True):
                kept = survivors[first : first + int(selection.keep.sum())]
                first += len(kept)
                rows = slice(start, start + len(indices))
                start += len(indices)
                answers = self._answers(documents[rows], kept, pool_tokens, rows, values, generator)
                if not indices and not self._selects_together:
                    continue
                keep_tokens = self._token_pruner.prune(answers).numpy()
                for index, keep, answer in zip(indices, keep_tokens, answers.answer_mask.numpy(), strict=True):
                    survivors[index] = {**prune_document(survivors[index], keep, drop), KEPT_MASK: keep[answer]}
        return survivors

    def _token_values(self, documents: list[Document], nll: list[Tensor], batch_tokens: int) -> dict[str, Tensor]:
        """Per-token values that the token pruner needs. `nll` is that of the documents, if stage 1 has scored them."""
        needs = self.args.token_needs
        values: dict[str, Tensor] = {}

        def forward(model: PreTrainedModel) -> Tensor:
            nll = self._forward_all(model, documents, list(range(len(documents))), batch_tokens).nll
            self._refuse_diverged(nll.isfinite().all(dim=1))
            return nll

        if "scores" in needs and "scores" not in self._sample_pruner.needs:
            values["nll"] = forward(self._scorer)
        elif "scores" in needs:
            values["nll"] = torch.stack(nll) if nll else torch.zeros((0, 0), dtype=torch.float64)
        if self._reference is not None:
            values["reference_nll"] = forward(self._reference)
        if "base" in needs:
            with nullcontext() if self._base is not None else cast(PeftModel, self.model).disable_adapter():
                values["base_nll"] = forward(self._base or self.model)
        return values

    def _answers(
        self,
        documents: list[Document],
        kept: list[Document],
        pool_tokens: "PoolTokens",
        rows: slice,
        values: dict[str, Tensor],
        generator: torch.Generator,
    ) -> Answers:
        """What the token pruner is given of a group: `documents`, which it prunes, of the survivors `kept`."""
        mask = answer_mask(documents)
        whole = sum(answer_lengths(kept)) - int(mask.sum())
        together = self._selects_together
        tokens = np.array([pool_tokens.answers, whole, pool_tokens.sequences, sequence_tokens(kept)])
        if together:
            tokens = sum(gather_object([tokens]))
        in_pool, whole, of_sequences, of_survivors = tokens.tolist()
        budget = None
        if self.args.token_budget == "pool":
            ratio = self.args.sample_ratio * self.args.token_ratio
            budget = max(0, budget_size(ratio, in_pool) - whole)
        attends = "attention" in self.args.token_needs
        return Answers(
            answer_mask=mask,
            protected=protected_mask(documents, self._protected_ids, mask.shape),
            lengths=torch.tensor([len(document["input_ids"]) for document in documents], dtype=torch.int64),
            sample_ratio=self.args.sample_ratio,
            token_ratio=self.args.token_ratio,
            budget=budget,
            sequence_tokens=of_sequences,
            survivor_tokens=of_survivors,
            gather=(lambda value: gather_object([value])) if together else (lambda value: [value]),
            process=self.accelerator.process_index if together else 0,
            generator=generator,
            neighbor_weight=self.args.neighbor_weight,
            attention=partial(self._attention, documents) if attends else None,
            embeddings=partial(self._embeddings, documents) if attends else None,
            **{name: value[rows, : mask.shape[1]] for name, value in values.items()},
        )

    def _attention(self, documents: list[Document], layer: int) -> list[Tensor]:
        with scoring_mode(self.model), self.accelerator.autocast():
            return [attention_weights(self.model, self._ids(document), layer) for document in documents]

    def _embeddings(self, documents: list[Document]) -> list[Tensor]:
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            return [embed(self._ids(document)).float().cpu() for document in documents]

    def _ids(self, document: Document) -> Tensor:
        return torch.from_numpy(document["input_ids"]).to(self.args.device)

    def _collate_survivors(self, survivors: list[Document], slots: int, full_tokens: int) -> list[dict[str, Any]]:
        """
        The survivors in micro-batches, as few as they need or small ones; every process has as many, some dummies.

        Args:
            survivors (`list[Document]`): Those of this process.
            slots (`int`): Micro-batches that the step has without pruning, the most there can be.
            full_tokens (`int`): Tokens of one of those.
        """
        # Those that lost all their tokens have no gradient to give.
        survivors = [doc for doc, size in zip(survivors, answer_lengths(survivors), strict=True) if size > 0]
        distributed = self.accelerator.num_processes > 1
        shared = distributed and self.args.selection_scope == "all_processes"
        if shared:
            # One process may hold most survivors of the pool: deal them out, so that none waits for another.
            survivors = gather_object(survivors)
        longest_row = self.args.max_length if self.args.packing else None  # TRL packs with a max_length only
        rows = survivors if longest_row is None else pack_rows(survivors, longest_row)
        if shared:
            rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
            rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        count = -(-len(rows) // self._train_batch_size)
        if self.args.micro_batches == "small":
            count = len(rows)
        limit = full_tokens
        keep_activations = self.args.gradient_checkpointing and not self.args.survivor_checkpointing
        if keep_activations:
            limit = self._tokens_without_checkpointing(full_tokens)
            fitting = (
                n for n in range(max(count, 1), slots + 1) if max(map(padded_tokens, split_evenly(rows, n))) <= limit
            )
            count = next(fitting, count)
        if distributed:
            count = max(gather_object([count]))
        count = min(max(count, 1), slots)
        return [
            {
                **self.data_collator(_as_rows(part or [self._dummy_row()], packing=False)),
                "survivors": part,
                "checkpointing": not keep_activations or padded_tokens(part) > limit,
            }
            for part in split_evenly(rows, count)
        ]

    def _tokens_without_checkpointing(self, tokens: int) -> int:
        config = self.model.config.get_text_config()
        # GPT-2, BLOOM and others name no width of their MLP, which is the usual one.
        width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        experts = getattr(config, "num_experts_per_tok", None) or 1
        return tokens_without_checkpointing(tokens, config.hidden_size, width * experts, config.num_hidden_layers)

    def _dummy_row(self) -> Document:
        """A row without labels, which costs little and adds a differentiable zero: for a process with no survivor."""
        row: Document = {"input_ids": [self._tokenizer.pad_token_id] * 2, "labels": [-100, -100]}
        return {**row, "seq_lengths": [2]} if self.args.packing else row

    # Records

    def _remember_pool(
        self, group: list[Document], perplexity: Tensor, entropy: Tensor, selection: SampleSelection
    ) -> None:
        """Append a group of scored candidates to `last_pool`; its thresholds are those of the latest group."""
        columns = {
            "sample_id": [document[SAMPLE_ID] for document in group],
            "perplexity": perplexity.tolist(),
            "entropy": entropy.tolist(),
            "quadrant": selection.quadrant.tolist(),
            "kept": selection.keep.tolist(),
            "filled": selection.filled.tolist(),
            "group": [document.get("group") for document in group],
        }
        before = self.last_pool or {name: [] for name in columns}
        self.last_pool = {name: before[name] + column for name, column in columns.items()}
        self.last_pool["thresholds"] = {name: getattr(selection, name) for name in THRESHOLDS}

    def _record_unpruned_step(self, batches: list[dict[str, Any]]) -> None:
        step = StepCounts(scored=False)
        for batch in batches:
            samples = len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["labels"])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            for name in ("pool", "kept"):
                step.counts[f"{name}_samples"] += samples
                step.counts[f"{name}_answer_tokens"] += tokens
        self._record_step(step)

    def _record_step(self, step: StepCounts) -> None:
        if self.accelerator.num_processes > 1:
            step = sum(gather_object([step]), start=StepCounts(scored=step.scored))
        self.run_record.begin_training(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the optimizer steps since the last log, under `qtuning/`."""
        if self.model.training:
            logs.update(self.run_record.pop_metrics())
        super().log(logs, start_time)

    def summary(self) -> dict[str, Any]:
        """The run's totals so far and its configuration: the content of `qtuning_summary.json`."""
        config = json.loads(json.dumps(self.args.to_dict(), default=str))
        processes = self.accelerator.num_processes
        return {**self.run_record.summary(), "num_processes": processes, "config": config}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, which cites the paper, with the facts of the run's summary."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir), "README.md")
        card = ModelCard.load(path)
        head, separator, tail = card.text.partition("### Framework versions")
        card.text = head + model_card_section(self.summary()).lstrip() + "\n" + separator + tail
        card.save(path)


class PoolTokens(NamedTuple):
    """Answer tokens of all candidates of a group, and the tokens of their sequences that can be predicted."""

    answers: int
    sequences: int


class _Chosen(NamedTuple):
    """
    A group of candidates, what is known of them, their NLL if they were scored, what stage 1 decided, and the tokens of
    all that were drawn.
    """

    group: list[Document]
    columns: dict[str, Tensor]
    nll: Tensor | None
    selection: SampleSelection
    tokens: PoolTokens


class _ScoreKeeper(TrainerCallback):
    """Tells all processes what each has scored, and saves the scores with each checkpoint."""

    def __init__(self, cache: ScoreCache, num_processes: int):
        self.cache = cache
        self.num_processes = num_processes

    def on_train_begin(self, args, state, control, **kwargs):
        self.cache.epoch = math.floor((state.epoch or 0.0) + 1e-9) - 1

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Counted here: of a stream, whose length is unknown, `state.epoch` tells a new epoch after its first step only.
        self.cache.epoch += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.cache.take_in(gather_object([self.cache.news]) if self.num_processes > 1 else [])

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.cache.save(folder)


class _SummaryWriter(TrainerCallback):
    """Writes `qtuning_summary.json` into the output directory when training ends."""

    def __init__(self, trainer: QTuningSFTTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.trainer.summary(), indent=2)
            Path(args.output_dir, SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")


def _placeholder() -> dict[str, Tensor]:
    """An entry for an unused slot of the optimizer step: no tokens, so it counts no FLOPs and no samples."""
    empty = torch.empty((1, 0), dtype=torch.int64)
    return {"input_ids": empty, "labels": empty}


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _as_rows(documents: list[Document], packing: bool) -> list[Document]:
    """Documents as the collator takes them; where rows are packed, each is a row with one document."""
    rows = [{key: value for key, value in doc.items() if key not in NOT_FOR_THE_MODEL} for doc in documents]
    return [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows] if packing else rows
