"""
`QTuningSFTTrainer`: TRL's `SFTTrainer`, which before each optimizer step scores a pool of candidates and prunes it.

Here are the hooks of the training loop, in the order in which it calls them; what happens between drawing and training
is in `step/`. The training step itself is TRL's own.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from . import checks
from .chat_templates import refuse_lost_parts
from .checked_trainer import CheckedSFTTrainer
from .config import QTuningSFTConfig
from .data_check import (
    DataCheck,
    drop_void_rows,
)
from .host.head import lean_lm_head, weighted_losses
from .host.loading import load_processing_class, load_second_model
from .host.loop import count_items, keep_column, train_loader_of, without_checkpointing
from .host.modes import has_dropout
from .host.recovery import step_or_again
from .records.card import PAPER, add_facts
from .records.run import (
    RunRecord,
    StepCounts,
    asked_shares,
    count_step,
    count_unpruned_step,
    pool_columns,
    run_summary,
    synchronize,
)
from .records.samples import SampleRecorder
from .report.live import PlaneLogger, show_progress
from .step.loss import LossPruner
from .step.memory import MemoryBudget
from .step.micro_batches import Batcher, with_placeholders
from .step.needs import count_needs
from .step.sample import (
    SAMPLE_ID,
    RawBatch,
    Sample,
    answer_lengths,
    loss_weights,
    number_rows,
    split_documents,
    whole_answer_lengths,
)
from .step.score_cache import FILE_NAME as SCORES_NAME
from .step.score_cache import ScoreCache, ScoreKeeper
from .step.scoring import ScoredPool, Scorer, scoring_collator
from .step.selection import Selector, special_token_ids

logger = get_logger(__name__)


class QTuningSFTTrainer(CheckedSFTTrainer):
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
    dataset_name: str | None = None  # for the record; `qtuning sft` knows it

    _tag_names = ["trl", "sft", "qtuning"]  # noqa: RUF012 (a class attribute of the host)
    _name = "Q-Tuning"
    _paper = PAPER

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
        formatted = kwargs.get("formatting_func") is not None
        first = checks.refuse_unusable_dataset(train_dataset, args, formatted)
        if isinstance(train_dataset, Dataset) and not args.keeps_everything:
            train_dataset = number_rows(train_dataset)
        self.data_check, self._whole_rows = DataCheck(), None
        if first is not None and not formatted:
            train_dataset, self.data_check = drop_void_rows(train_dataset, args)
            first = next(iter(train_dataset))
        if checks.needs_chat_template(first, args) or self.data_check.first:
            if processing_class is None:
                processing_class = load_processing_class(model, args)
            if args.chat_template_path is None:
                checks.refuse_missing_chat_template(processing_class)
            refuse_lost_parts(processing_class, args, self.data_check.first)

        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

        self._check_data()
        for column in (SAMPLE_ID, args.group_column, args.score_column):
            if column is not None and not args.keeps_everything:
                keep_column(self, column)
        # Survivors are uneven over micro-batches and processes, so the loss must be divided by the tokens of the step.
        # About 40 multimodal families switch this off, and their survivors would be averaged wrongly.
        self.model_accepts_loss_kwargs = True
        self.last_pool: dict[str, Any] | None = None
        self._num_micro_batches = 0
        self._make_stations()
        self._add_listeners()

    def _make_stations(self) -> None:
        """What a step passes through: scorer, selector and batcher, with the models that they need."""
        args, model, tokenizer = self.args, self.model, self._tokenizer
        proxy = load_second_model("scoring_model", args, model, tokenizer) if args.scoring_model is not None else None
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded:
            checks.refuse_what_shards_cannot(model, args)
        checks.refuse_missing_attention(model, args)
        needs_reference = "reference" in args.token_needs
        reference = load_second_model("reference_model", args, model, tokenizer) if needs_reference else None
        # An adapter can be switched off; a model that is trained whole must be kept as it was.
        whole = "base" in args.token_needs and not isinstance(model, PeftModel)
        base = copy.deepcopy(model).requires_grad_(False) if whole else None
        cache = None
        if args.reuses_scores and "scores" in args.sample_needs and not args.keeps_everything:
            cache = ScoreCache(args.score_reuse_epochs, args.score_reuse_steps)
        # A training forward scores as a scoring forward does, if it is the same model without noise.
        noisy = args.neftune_noise_alpha is not None or has_dropout(model)
        self._renews_scores = cache is not None and proxy is None and not noisy

        # Tokens that are chosen inside the loss are weighted there.
        held = args.sample_needs if args.prunes_in_loss else (*args.sample_needs, *args.token_needs)
        self._weighs_survivors = "weights" in held

        scorers = [scorer for scorer in (model, proxy, reference) if scorer is not None]
        training_collator: Any = self.data_collator  # others are refused
        collator = scoring_collator(training_collator, scorers, args.device)
        protected = special_token_ids(tokenizer, model) if args.protect_special_tokens else set()
        self.memory = MemoryBudget(args, sharded)
        self.scorer = Scorer(args, self.accelerator, collator, sharded, proxy, cache)
        self.selector = Selector(args, self.accelerator, self.scorer, tokenizer, protected, reference, base)
        self.loss_pruner = LossPruner(args, self.accelerator, protected)
        self.batcher = Batcher(args, self.accelerator, training_collator, self.memory)

    def _add_listeners(self) -> None:
        """The callbacks, which are handed what they need: they decide nothing."""
        if self.scorer.cache is not None:
            self.add_callback(ScoreKeeper(self.scorer.cache))
        self.add_callback(RunRecord)
        self._recorder = None
        if self.args.record:
            self._recorder = SampleRecorder(lambda: self.run_record, self._tokenizer, self._data_facts)
            self.add_callback(self._recorder)
        self.add_callback(PlaneLogger(lambda: self.last_pool, self.callback_handler))
        show_progress(self.callback_handler, lambda: self.run_record)

    def _data_facts(self) -> dict[str, Any]:
        data: Any = self.train_dataset
        return {"name": self.dataset_name, "rows": len(data) if hasattr(data, "__len__") else None}

    @property
    def run_record(self) -> RunRecord:
        """Counts and seconds of the run. Looked up, since transformers may rebuild callbacks on resume."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunRecord))

    def _go_on_from(self, checkpoint: str | None) -> None:
        if self.scorer.cache is not None and not self.scorer.cache.resume(checkpoint):
            logger.warning(f"{checkpoint} holds no {SCORES_NAME}: every sample is scored anew.")

    def _save_beside(self, folder: Path) -> None:
        if self.scorer.cache is not None and self.args.should_save:
            self.scorer.cache.save(folder)

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
            `tuple`: As many entries as were asked for, since the loop counts them to find the optimizer step:
            placeholders first, then the micro-batches, so that the last backward pass is a real one; none at the end
            of a stream, which may have been short of some in its last step; and what the loss is divided by, the
            number of trainable tokens among the survivors of all processes; where a token pruner weights them, that
            of all answer tokens of theirs.

        Raises:
            `FloatingPointError`: If a candidate's score is NaN or infinite.
        """
        if self.args.keeps_everything:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches:
                return [], None
            self._num_micro_batches = len(batches)
            self.run_record.begin_training(count_unpruned_step(batches))
            return with_placeholders(batches, num_batches), num_items

        drawn = [batch.examples for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not drawn:
            return [], None
        synchronize()  # so that the previous step's work is not counted as selecting
        score_column = self.args.score_column if "column" in self.selector.sample_pruner.needs else None
        columns = self.args.group_column, score_column
        groups = [[sample for row in rows for sample in split_documents(row, *columns)] for rows in drawn]
        if self.args.selection_scope != "micro_batch":
            groups = [[sample for group in groups for sample in group]]
        row_lengths = [len(row["input_ids"]) for rows in drawn for row in rows]
        full_tokens = self._train_batch_size * max(row_lengths)
        self.memory.begin_step(partial(count_needs, self.model, self.scorer, self.batcher, self.memory.follows_memory))
        batch_tokens = self.scorer.batch_tokens(row_lengths, full_tokens, len(drawn), self.memory.needs)
        survivors, step = self._prune_pool(groups, batch_tokens)
        with self.run_record.phase("collation"):
            micro_batches = self.batcher.collate(survivors, len(drawn), self._train_batch_size)
            tokens = self._budget_losses(micro_batches, step) if self.args.prunes_in_loss else None
            if "weights" in self.args.token_needs:  # each token that stays stands for some of all
                tokens = sum(whole_answer_lengths(survivors))
            num_items = count_items(self, micro_batches, device, tokens)
        self._num_micro_batches = len(micro_batches)
        self.run_record.begin_training(step)
        return with_placeholders(micro_batches, num_batches), num_items

    def _prune_pool(self, groups: list[list[Sample]], batch_tokens: int) -> tuple[list[Sample], StepCounts]:
        """Both stages on each group of candidates: the survivors, and the step's counts on this process."""
        phase = self.run_record.phase
        # A sample without an answer token has no perplexity: it is no candidate, and cannot survive.
        candidates = [[doc for doc, size in zip(g, answer_lengths(g), strict=True) if size > 0] for g in groups]
        pool = ScoredPool(candidates)
        if "scores" in self.selector.sample_pruner.needs:
            with phase("scoring"):
                pool = self.scorer.score(self.model, candidates, batch_tokens, self.state)
        with phase("selection"):
            selection = self.selector.select_samples(candidates, pool, self.state)
        if self.args.token_ratio < 1.0 and not self.args.prunes_in_loss:
            with phase("scoring"):
                answers = self.selector.answers(self.model, selection, batch_tokens, self.state)
            with phase("selection"):
                selection = self.selector.prune_tokens(selection, answers)
        with phase("selection"):
            self.last_pool = pool_columns(selection)
            if self._recorder is not None and "scores" in self.args.sample_needs:
                for group, survivors in selection.by_group():
                    self._recorder.add(self.args, group, survivors)
            return selection.survivors, count_step(self.args, groups, candidates, pool, selection)

    def _budget_losses(self, micro_batches: list[dict[str, Any]], step: StepCounts) -> int:
        """Say to each micro-batch how many tokens its loss is to keep, and to the step how many that is."""
        survivors = [batch["survivors"] for batch in micro_batches]
        budgets = self.loss_pruner.budgets(int(step.counts["pool_answer_tokens"]), survivors)
        for batch, budget in zip(micro_batches, budgets, strict=True):
            batch["loss_budget"] = budget
        tokens = sum(budget.tokens for budget in budgets)
        step.counts["kept_answer_tokens"] = tokens
        return tokens

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """TRL's training step on a micro-batch of survivors; nothing on a placeholder."""
        if inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = self._num_micro_batches
        if self.args.keeps_everything:
            return super().training_step(model, inputs, num_items_in_batch)
        survivors, checkpointing = inputs.pop("survivors"), inputs.pop("checkpointing")
        loss_budget = inputs.pop("loss_budget", None)

        def train(checkpointing: bool) -> Tensor:
            with ExitStack() as stack:
                stack.enter_context(lean_lm_head(self.args.device))
                if not checkpointing:
                    stack.enter_context(without_checkpointing(self.model))
                if self._renews_scores:
                    stack.enter_context(self.scorer.renewed_scores(self.model, survivors, self.state))
                if survivors and loss_budget is not None:  # first: what it sees is not weighted yet
                    choose = partial(self.loss_pruner.weights, survivors, loss_budget, self.state)
                    stack.enter_context(weighted_losses(self.model, choose))
                if survivors and self._weighs_survivors:
                    stack.enter_context(weighted_losses(self.model, loss_weights(survivors)))
                return super(QTuningSFTTrainer, self).training_step(model, dict(inputs), num_items_in_batch)

        if checkpointing or self.accelerator.num_processes > 1:
            return train(checkpointing)
        too_large = partial(self.memory.shrink, inputs["input_ids"].numel())
        return step_or_again(self, partial(train, False), partial(train, True), too_large)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the optimizer steps since the last log, under `qtuning/`."""
        if self.model.training:
            metrics = self.run_record.pop_metrics()
            for what, asked in asked_shares(self.args.sample_ratio, self.args.token_ratio).items():
                if f"qtuning/kept_{what}_share" in metrics:
                    metrics[f"qtuning/kept_{what}_asked"] = asked
            logs.update(metrics)
        super().log(logs, start_time)

    def summary(self) -> dict[str, Any]:
        """The run's totals so far and its configuration: the content of `qtuning_summary.json`."""
        return run_summary(self.run_record, self.args)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, which cites the paper, with the facts of the run's summary."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_facts(Path(str(self.args.output_dir), "README.md"), self.summary())
