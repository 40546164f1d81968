"""
`QTuningSFTTrainer`: TRL's `SFTTrainer`, which before each optimizer step scores a pool of candidates and prunes it.

The step, in the order of `get_batch_samples`: draw the pool -> one gradient-free scoring forward -> stage 1 prunes
samples -> stage 2 prunes tokens -> the survivors are collated into as few micro-batches as they need. The training step
itself is TRL's own.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from . import checks
from .config import QTuningSFTConfig
from .documents import (
    NOT_FOR_THE_MODEL,
    SAMPLE_ID,
    Document,
    RawBatch,
    answer_lengths,
    answer_mask,
    number_rows,
    pack_rows,
    protected_mask,
    prune_document,
    split_documents,
    split_evenly,
)
from .host import count_items, keep_column, per_token_values, scoring_mode, train_loader_of
from .method import SampleSelection, sample_statistics, select_samples, token_keep_mask, token_scores
from .record import SUMMARY_NAME, THRESHOLDS, RunRecord, StepCounts, model_card_section, synchronize
from .scoring import TokenValues, score_documents, scoring_batches

logger = get_logger(__name__)


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
        for column in (SAMPLE_ID, args.group_column):
            if column is not None and not args.keeps_everything:
                keep_column(self, column)
        # Survivors are uneven over micro-batches and processes, so the loss must be divided by the tokens of the step.
        # About 40 multimodal families switch this off, and their survivors would be averaged wrongly.
        self.model_accepts_loss_kwargs = True
        self.add_callback(RunRecord)
        self.add_callback(_SummaryWriter(self))
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
    def run_record(self) -> RunRecord:
        """Counts and seconds of the run. Looked up, since transformers may rebuild callbacks on resume."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunRecord))

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
        groups = [[doc for row in rows for doc in split_documents(row, self.args.group_column)] for rows in drawn]
        if self.args.selection_scope != "micro_batch":
            groups = [[document for group in groups for document in group]]
        longest_row = max(len(row["input_ids"]) for rows in drawn for row in rows)
        batch_tokens = self.args.scoring_batch_tokens or self.args.per_device_train_batch_size * longest_row
        survivors, step = self._prune_pool(groups, batch_tokens)
        with self.run_record.phase("collation"):
            micro_batches = self._collate_survivors(survivors, len(drawn))
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
        return super().training_step(model, inputs, num_items_in_batch)

    # The parts of a step

    def _prune_pool(self, groups: list[list[Document]], batch_tokens: int) -> tuple[list[Document], StepCounts]:
        """Both stages on each group of candidates: the survivors, and the step's counts on this process."""
        # A sample without an answer token has no perplexity: it is no candidate, and cannot survive.
        candidates = [[doc for doc, size in zip(g, answer_lengths(g), strict=True) if size > 0] for g in groups]
        pool = [document for group in candidates for document in group]
        values = self._score(pool, batch_tokens)
        step = StepCounts(nll=float(values.nll.sum()), entropy=float(values.entropy.sum()))
        step.counts["unscorable_samples"] = sum(map(len, groups)) - len(pool)
        step.counts["pool_answer_tokens"] = int(values.answer_mask.sum())

        survivors: list[Document] = []
        self.last_pool = None
        start = 0
        with self.run_record.phase("selection"):
            for group in candidates:
                part = values.rows(slice(start, start + len(group)))
                start += len(group)
                perplexity, entropy = sample_statistics(part.nll, part.entropy, part.answer_mask)
                self._refuse_diverged(perplexity, entropy)
                selection = self._select(perplexity, entropy)
                if selection is None:
                    continue
                kept = self._prune_tokens(group, part, selection)
                survivors += kept
                step.add_selection(selection)
                step.counts["kept_answer_tokens"] += sum(answer_lengths(kept))
                labels = [document.get("group") for document in group]
                if self.args.group_column is not None:
                    step.add_groups(labels, selection.keep)
                self._remember_pool(perplexity, entropy, selection, labels)
        return survivors, step

    def _score(self, pool: list[Document], batch_tokens: int) -> TokenValues:
        """One gradient-free forward pass of the current model over the pool."""
        with self.run_record.phase("scoring"):
            mask = answer_mask(pool)
            lengths = [len(document["input_ids"]) for document in pool]
            batches = scoring_batches(lengths, batch_tokens, self.padding_free)
            idle = 0
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # Sharded parameters are gathered by all processes together, so all run as many forwards.
                idle = max(gather_object([len(batches)])) - len(batches)
            with scoring_mode(self.model), self.compute_loss_context_manager():
                values = score_documents(pool, mask, batches, self._forward_documents)
                for _ in range(idle):
                    self._forward_documents([self._dummy_row()])
        return values

    def _refuse_diverged(self, perplexity: Tensor, entropy: Tensor) -> None:
        broken = ~(perplexity.isfinite() & entropy.isfinite())
        if bool(broken.any()):
            raise FloatingPointError(
                f"Step {self.state.global_step + 1}: {int(broken.sum())} of {len(broken)} candidates have a NaN or "
                "infinite score, so the model has diverged; resume from the last checkpoint in "
                f"{self.args.output_dir!r} with a lower `learning_rate` than {self.args.learning_rate:g}."
            )

    def _forward_documents(self, documents: list[Document]) -> tuple[Tensor, Tensor]:
        batch = send_to_device(self.data_collator(_as_rows(documents, self.args.packing)), self.args.device)
        return per_token_values(self.model, batch)

    def _select(self, perplexity: Tensor, entropy: Tensor) -> SampleSelection | None:
        """Stage 1 on a group of candidates; among those of all processes, if they are compared with each other."""
        if self.args.selection_scope != "all_processes" or self.accelerator.num_processes == 1:
            return select_samples(perplexity, entropy, self.args.sample_ratio) if len(perplexity) else None
        parts = gather_object([(perplexity.tolist(), entropy.tolist())])
        everyone = [torch.tensor([x for part in parts for x in part[axis]], dtype=torch.float64) for axis in (0, 1)]
        if len(everyone[0]) == 0:
            return None
        start = sum(len(part[0]) for part in parts[: self.accelerator.process_index])
        selection = select_samples(everyone[0], everyone[1], self.args.sample_ratio)
        return selection.rows(slice(start, start + len(perplexity)))

    def _prune_tokens(self, group: list[Document], values: TokenValues, selection: SampleSelection) -> list[Document]:
        """The survivors, after stage 2 on those that it prunes; the others stay whole."""
        kept = selection.keep.nonzero().flatten().tolist()
        pruned = selection.prune_tokens.nonzero().flatten().tolist()
        if not pruned or self.args.token_ratio == 1.0:
            return [group[index] for index in kept]
        mask = values.answer_mask[pruned]
        scores = token_scores(values.nll[pruned].exp(), mask, self.args.neighbor_weight)
        protected = protected_mask([group[index] for index in pruned], self._protected_ids, mask.shape)
        keep_tokens = token_keep_mask(scores, mask, self.args.token_ratio, protected).numpy()
        shortened = {
            index: prune_document(group[index], keep, drop=self.args.token_pruning == "drop")
            for index, keep in zip(pruned, keep_tokens, strict=True)
        }
        return [shortened.get(index, group[index]) for index in kept]

    def _collate_survivors(self, survivors: list[Document], slots: int) -> list[dict[str, Any]]:
        """As few micro-batches as the survivors need; every process has as many, some of them dummies."""
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
        count = -(-len(rows) // self.args.per_device_train_batch_size)
        if distributed:
            count = max(gather_object([count]))
        count = min(max(count, 1), slots)
        return [
            self.data_collator(part or [self._dummy_row()])
            for part in split_evenly(_as_rows(rows, packing=False), count)
        ]

    def _dummy_row(self) -> Document:
        """A row without labels, which costs little and adds a differentiable zero: for a process with no survivor."""
        row: Document = {"input_ids": [self._tokenizer.pad_token_id] * 2, "labels": [-100, -100]}
        return {**row, "seq_lengths": [2]} if self.args.packing else row

    # Records

    def _remember_pool(
        self, perplexity: Tensor, entropy: Tensor, selection: SampleSelection, labels: list[Any]
    ) -> None:
        """Append a group of candidates to `last_pool`; its thresholds are those of the latest group."""
        columns = {
            "perplexity": perplexity.tolist(),
            "entropy": entropy.tolist(),
            "quadrant": selection.quadrant.tolist(),
            "kept": selection.keep.tolist(),
            "filled": selection.filled.tolist(),
            "group": labels,
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
