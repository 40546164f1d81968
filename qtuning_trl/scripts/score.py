"""
Score a data set by a model, without training: its samples on the EU plane, and the data that Q-Tuning would train on.

```bash
qtuning score --model HuggingFaceTB/SmolLM2-135M --dataset data.jsonl --budget 25x50 --output scored.parquet
accelerate launch -m qtuning_trl.scripts.score --config recipes/smollm2-135m-lora.yaml --output scored.parquet
```
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from qtuning_trl.interrupts import end_in_one_line

    end_in_one_line()

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from trl import DatasetMixtureConfig, ModelConfig

from .. import demo
from ..cli import BAD_INPUT, EPILOG, FAILED_RUN, exit_on_error, take_traceback_flag
from ..config import QTuningSFTConfig
from ..data import load_data, mapped, pick_split
from ..early import check_early
from ..recipes import Parsed, RecipeParser
from ..records.run import asked_shares
from ..step.sample import SAMPLE_ID, answer_lengths, number_rows
from ..studies.dataset_scoring import (
    BatchSize,
    Decisions,
    PartialScores,
    TokenPruning,
    fingerprint,
    refuse_foreign_folder,
    scorable_rows,
    score_rows,
    select_rows,
)
from ..studies.scored_data import COLUMNS, FORMATS, finished_rows, is_written, output_features, pruned_rows, write_rows
from .sft import QTuningScriptArguments, find_model, model_init_kwargs, refuse_missing_files, settle_template

if TYPE_CHECKING:
    from ..trainer import QTuningSFTTrainer

MODULE = "qtuning_trl.scripts.score"
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl"}
# Options of a recipe that speak of training and would be in the way of scoring, or change what is scored.
NOT_TRAINING: dict[str, Any] = {
    "packing": False,  # each sample is scored by itself
    "padding_free": False,
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "scored_share": 1.0,
    "score_reuse_epochs": None,
    "score_reuse_steps": None,
    "scoring_model": None,
    "group_column": None,
}


@dataclass
class ScoreArguments(QTuningScriptArguments):
    """Those of `qtuning sft`, and what to score by and where to put the result."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Path or name of the dataset to score.", "aliases": ["--dataset"]},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder or name of a PEFT adapter (LoRA) that the model is scored with."},
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Where the result goes: a file that ends in `.parquet` or `.jsonl`, or a folder for a dataset on "
            "disk. Scores that are done wait in `<output>.partial`, from where a killed run goes on."
        },
    )
    output_format: str | None = field(
        default=None,
        metadata={
            "help": "Format of the result. If `None`, what `output` ends in says it; without an ending it is "
            "`'dataset'`, which `datasets.load_from_disk` reads.",
            "choices": list(FORMATS),
        },
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={"help": "Name on the Hub (`owner/name`) under which the result is pushed, too."},
    )
    columns: str = field(
        default="all",
        metadata={
            "help": "Columns of the result: `'all'`, `'tokens'` (only `input_ids`, `attention_mask` and `labels`, for "
            "trainers that take no others) or `'original'` (only the data set's own, for trainers that take no "
            "tokens).",
            "choices": list(COLUMNS),
        },
    )
    kept_only: bool = field(
        default=False,
        metadata={"help": "Whether to leave out the rows that are not kept."},
    )
    pool: int | None = field(
        default=None,
        metadata={
            "help": "Rows compared with each other, drawn at random by `seed`, e.g. as many as an optimizer step of "
            "training would compare. If `None`, the whole data set."
        },
    )
    rows_per_part: int = field(
        default=1024,
        metadata={
            "help": "Rows scored between two saves, sorted by length among themselves. It is what a killed run loses "
            "at most, on each process."
        },
    )


@dataclass
class ScoredModelConfig(ModelConfig):
    """TRL's [`~trl.ModelConfig`], whose model can be given as `--model` too."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to score by: a name on the Hub or a folder.", "aliases": ["--model"]}
    )


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of the four groups of options; the recipe of a training run works too."""
    types = (ScoreArguments, QTuningSFTConfig, ScoredModelConfig, DatasetMixtureConfig)
    return RecipeParser(types, prog=prog or "qtuning score", description=__doc__.strip().split("\n")[0], epilog=EPILOG)


def parse(argv: Sequence[str], prog: str | None = None) -> Parsed:
    """
    Parse a command line and check whatever can be checked without loading anything.

    Raises:
        `ValueError`: In one sentence, for the first thing that is wrong.
    """
    parsed = make_parser(prog).parse(argv)
    script_args, training_args, model_args, dataset_args = parsed.dataclasses
    script_args.output = script_args.output and os.path.expanduser(script_args.output)
    for name in ("sample_pruner", "token_pruner"):
        if getattr(training_args, name) != "q_tuning":
            raise ValueError(
                f"`{name}` is {getattr(training_args, name)!r}: leave it out, since `qtuning score` selects as "
                "Q-Tuning does; rivals select while training (`qtuning sft`)."
            )
    if training_args.token_budget != "answer":
        raise ValueError(
            f"`token_budget` is {training_args.token_budget!r}: leave it out, since `qtuning score` prunes row by row, "
            "in memory that does not grow with the data set; `qtuning sft` holds it while training."
        )
    for name, value in NOT_TRAINING.items():
        setattr(training_args, name, value)
    refuse_missing_files(script_args, training_args, model_args, dataset_args)
    refuse_bad_options(script_args, dataset_args)
    # The trainer makes this folder; what it holds besides is in nobody's way.
    training_args.output_dir = str(partial_folder(script_args))
    training_args.report_to = []
    return parsed


def refuse_bad_options(script_args: ScoreArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Raise a `ValueError` for an option that scoring cannot take."""
    if script_args.output is None:
        raise ValueError(
            "`output` is not given: name a file that ends in .parquet or .jsonl, or a folder, such as scored.parquet."
        )
    output, form = Path(script_args.output), script_args.output_format
    expected = SUFFIXES.get(output.suffix)
    if form is not None and expected is not None and form != expected:
        raise ValueError(
            f"`output` is {script_args.output!r} and `output_format` is {form!r}: they disagree, so give only one of "
            "the two."
        )
    if output.exists() and not is_written(output, partial_folder(script_args)):
        raise ValueError(f"`output` is {script_args.output!r}, which exists: remove it, or give another name.")
    refuse_foreign_folder(partial_folder(script_args))
    if script_args.columns != "all" and not script_args.kept_only:
        raise ValueError(
            f"`columns` is {script_args.columns!r} and `kept_only` is false: add `--kept_only`, since without the "
            "column `keep` the result would not say which rows are kept."
        )
    if script_args.pool is not None and script_args.pool < 2:
        raise ValueError(
            f"`pool` is {script_args.pool}: give at least 2 rows to compare, or leave it out to compare all of them."
        )
    if script_args.rows_per_part < 1:
        raise ValueError(f"`rows_per_part` is {script_args.rows_per_part}: give a number of rows, such as 1024.")
    if dataset_args.streaming if dataset_args.datasets else script_args.dataset_streaming:
        option = "streaming" if dataset_args.datasets else "dataset_streaming"
        raise ValueError(
            f"`{option}` is true: set it to false, since scoring goes over the rows twice; the data set is mapped from "
            "disk and takes no memory."
        )


def partial_folder(script_args: ScoreArguments) -> Path:
    """Where a run keeps what is done until it is finished."""
    return Path(f"{str(script_args.output).rstrip('/')}.partial")


def output_format(script_args: ScoreArguments) -> str:
    return script_args.output_format or SUFFIXES.get(Path(str(script_args.output)).suffix, "dataset")


class DatasetScorer:
    """
    A run of `qtuning score`: the trainer whose data preparation and forward pass it borrows, and its parts.

    Args:
        script_args ([`ScoreArguments`]), training_args ([`QTuningSFTConfig`]), model_args (`ModelConfig`), dataset_args
            (`DatasetMixtureConfig`): What [`parse`] returns.

    Raises:
        `ValueError`: If something that is named cannot be used, or the partial folder is that of another run.
    """

    def __init__(
        self,
        script_args: ScoreArguments,
        training_args: QTuningSFTConfig,
        model_args: ModelConfig,
        dataset_args: DatasetMixtureConfig,
    ):
        self.script_args, self.args, self.model_name = script_args, training_args, model_args.model_name_or_path
        self.init_kwargs = str(training_args.model_init_kwargs or {})  # the trainer takes them
        self.answer_tokens = self.kept_tokens = 0  # counted while the result is written
        with training_args.main_process_first(desc="data set mapping"):
            splits = load_data(script_args, dataset_args)
            self.original: Dataset = pick_split(splits, script_args.dataset_train_split, "dataset_train_split")
            rows = mapped(self.original, script_args, training_args)
        # The rows' own ids would stand in the way of their numbers, by which the result finds the original columns.
        own_ids = [SAMPLE_ID] if SAMPLE_ID in rows.column_names else []
        self.trainer = build_trainer(number_rows(rows.remove_columns(own_ids)), script_args, training_args, model_args)
        prepared: Any = self.trainer.train_dataset
        self.prepared: Dataset = prepared.select_columns(["input_ids", "labels", SAMPLE_ID])
        self.parts = -(-len(self.prepared) // script_args.rows_per_part)
        self.partial = PartialScores(partial_folder(script_args), self._settings(model_args))
        with training_args.main_process_first(desc="opening the partial scores"):
            self.partial.open()

    def _settings(self, model_args: ModelConfig) -> dict[str, Any]:
        """What the scores depend on."""
        names = ["model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit"]
        names += ["bnb_4bit_quant_type", "use_bnb_nested_quant"]
        return {
            **{name: getattr(model_args, name) for name in names},
            "model_init_kwargs": self.init_kwargs,
            "adapter": self.script_args.adapter,
            **{name: getattr(self.args, name) for name in ("bf16", "fp16")},
            "rows_per_part": self.script_args.rows_per_part,
            "rows of the data set": len(self.prepared),
            "tokens of the data set": fingerprint(self.prepared),
        }

    def _rows(self, part: int) -> slice:
        size = self.script_args.rows_per_part
        return slice(part * size, min((part + 1) * size, len(self.prepared)))

    def score(self) -> None:
        """
        Score the parts that are missing, this process its share of them.

        Raises:
            `FloatingPointError`: If a score is NaN or infinite.
        """
        from ..host.modes import lean_scoring

        trainer, accelerator = self.trainer, self.trainer.accelerator
        size = BatchSize(self.args.scoring_batch_tokens, self.args.device)
        flat = trainer.scorer.collator.padding_free
        forward = partial(trainer.scorer.forward, trainer.model)
        missing = self.partial.missing(self.parts)
        accelerator.wait_for_everyone()  # nobody writes before all have looked, or a part would be nobody's
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        rows = sum(self._rows(part).stop - self._rows(part).start for part in mine)
        with (
            self._progress("Scoring", rows, done=len(self.prepared) // accelerator.num_processes - rows) as advance,
            lean_scoring(trainer.model, self.args.device, flat),
            trainer.compute_loss_context_manager(),
        ):
            for part in mine:
                documents = scorable_rows(self.prepared, self._rows(part))
                self.partial.write(part, score_rows(documents, forward, size, flat, advance))
        accelerator.wait_for_everyone()

    @contextmanager
    def _progress(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
        """A progress bar with the time left, on the main process; yields a function that takes the rows just done."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        quiet = bool(self.args.disable_tqdm) or not self.trainer.is_world_process_zero()
        done = max(done, 0)
        with Progress(*columns, disable=quiet, speed_estimate_period=600) as progress:
            task = progress.add_task(title, total=done + total, completed=done)
            yield lambda rows: progress.advance(task, rows)

    def select(self) -> Decisions:
        """Stage 1 over all rows."""
        perplexity, entropy = self.partial.statistics(self.parts)
        stop = self.args.bisection == "budget"
        return select_rows(perplexity, entropy, self.args.sample_ratio, self.script_args.pool, self.args.seed, stop)

    def _finished(self, decisions: Decisions, advance: Any) -> Iterator[pa.Table]:
        pruning = TokenPruning(
            self.args.token_ratio,
            self.args.neighbor_weight,
            drop=self.args.token_pruning == "drop",
            protected_ids=self.trainer.selector.protected_ids,
        )
        start = 0
        for part in range(self.parts):
            whole = scorable_rows(self.prepared, self._rows(part))
            chosen = decisions.rows(slice(start, start + len(whole)))
            start += len(whole)
            scores = self.partial.read(part)
            self.answer_tokens += sum(answer_lengths(whole))
            documents = pruned_rows(whole, scores, chosen, pruning)
            self.kept_tokens += int(np.array(answer_lengths(documents), dtype=np.int64)[chosen.keep].sum())
            columns, kept_only = self.script_args.columns, self.script_args.kept_only
            yield finished_rows(whole, documents, scores, chosen, self.original, columns, kept_only)
            advance(len(documents))

    def finish(self) -> None:
        """Select, prune, write the result, push it if it is to be pushed, and remove the partial folder."""
        decisions = self.select()
        output = Path(str(self.script_args.output))
        features = output_features(self.original.features, self.script_args.columns)
        with self._progress("Writing", len(decisions.keep)) as advance:
            tables = self._finished(decisions, advance)
            result = write_rows(tables, features, output, output_format(self.script_args), self.partial.folder)
        print(self._summary(decisions))
        try:
            self._push(result)
        finally:
            del result
            self.partial.remove()

    def _summary(self, decisions: Decisions) -> str:
        rows, kept = len(decisions.keep), int(decisions.keep.sum())
        corners = ", ".join(f"Q{number} {int((decisions.quadrant == number).sum()):,}" for number in (1, 2, 3, 4))
        left_out = len(self.original) - rows
        note = f"; {left_out:,} rows without an answer token are left out" if left_out else ""
        asked, tokens = asked_shares(self.args.sample_ratio, self.args.token_ratio), self.kept_tokens
        tokenizer = demo.base_model_path() if self.model_name == demo.BASE_MODEL else str(self.model_name)
        report = f"\nNext:\n  qtuning report {quote(str(self.script_args.output))} --tokenizer {quote(tokenizer)}"
        return (
            f"{rows:,} rows scored ({corners}), {kept:,} kept, {int(decisions.prune_tokens.sum()):,} of them without "
            f"their worst answer tokens{note}. Samples: {kept / max(rows, 1):.2%} (asked: {asked['samples']:.2%}); "
            f"answer tokens: {tokens / max(self.answer_tokens, 1):.2%} (asked: {asked['answer_tokens']:.2%}). "
            f"Written to {self.script_args.output}{report if self.script_args.columns == 'all' else ''}"
        )

    def _push(self, result: Dataset) -> None:
        name = self.script_args.hub_dataset_id
        if name is None:
            return
        try:
            result.push_to_hub(name, private=self.args.hub_private_repo, token=self.args.hub_token)
        except Exception as error:  # whatever the Hub's client raises
            cause = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"`hub_dataset_id` is {name!r}, to which nothing could be pushed ({cause}): the result is in "
                f"{self.script_args.output}; push it from there by `Dataset.push_to_hub`."
            ) from error
        print(f"Pushed to https://huggingface.co/datasets/{name}")


def build_trainer(
    train_dataset: Dataset, script_args: ScoreArguments, training_args: QTuningSFTConfig, model_args: ModelConfig
) -> "QTuningSFTTrainer":
    """
    The trainer that would train on the data set, which prepares it (tokens, chat template, labels) and scores it.

    Raises:
        `ValueError`: If the model or the data set cannot be used.
    """
    from transformers import set_seed
    from trl import get_quantization_config

    from ..host.loading import load_processing_class, load_scored_model
    from ..trainer import QTuningSFTTrainer

    set_seed(training_args.seed)
    name = find_model(model_args, training_args)
    settle_template(train_dataset, name, script_args, training_args)
    init_kwargs = model_init_kwargs(model_args, training_args)
    training_args.model_init_kwargs = init_kwargs
    processing_class = load_processing_class(name, training_args)
    training_args.model_init_kwargs = None  # the model is loaded here
    quantization = get_quantization_config(model_args)
    trainer = QTuningSFTTrainer(
        model=load_scored_model(name, script_args.adapter, quantization, init_kwargs, training_args),
        args=training_args,
        train_dataset=train_dataset,
        processing_class=processing_class,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "`accelerate launch` shards the model (FSDP or DeepSpeed): launch without, since each process scores its "
            "own share of the rows by a whole model; `load_in_4bit` makes it smaller."
        )
    return trainer


def run(argv: Sequence[str]) -> None:
    """What each launched process does; ends it with one line if something goes wrong."""
    with exit_on_error(BAD_INPUT):
        check_early(argv := take_traceback_flag(argv), "score")
        parsed = parse(argv)
        if parsed.typed_launch_args:
            raise ValueError(
                f"`{parsed.typed_launch_args[0]}` is an option of `accelerate launch`: give it before `-m {MODULE}`, "
                "or use `qtuning score`, which takes both."
            )
        scorer = DatasetScorer(*parsed.dataclasses)
    with exit_on_error(FAILED_RUN):
        scorer.score()
        if scorer.trainer.is_world_process_zero():
            scorer.finish()


if __name__ == "__main__":
    run(sys.argv[1:])
