"""Refusals: what Q-Tuning cannot work with, each in one sentence with the option, the value and the remedy."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.data_utils import is_conversational_from_value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .config import QTuningSFTConfig
from .data_check import CUT_WHOLE, DataCheck
from .host.modes import is_partitioned
from .shapes import refuse_preferences, refuse_unknown_columns
from .step.sample import SAMPLE_ID


def refuse_unsupported_options(
    args: QTuningSFTConfig, data_collator: Any, compute_loss_func: Callable | None, model: Any, peft_config: Any
) -> None:
    """Raise a `ValueError` or `TypeError` for options that would silently change what is trained on."""
    if not isinstance(args, QTuningSFTConfig):
        raise TypeError(
            f"`args` is a {type(args).__name__}: give a QTuningSFTConfig, which takes the same options and those of "
            "Q-Tuning."
        )
    if data_collator is not None and not isinstance(data_collator, DataCollatorForLanguageModeling):
        raise ValueError(
            f"`data_collator` is a {type(data_collator).__name__}: leave it out and put the labels into the dataset, "
            "since Q-Tuning prunes labels before it collates."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` is set: leave it out, or override `compute_loss` in a subclass of QTuningSFTTrainer, "
            "since it needs the full logits that scoring avoids."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}: set it to 0, since it needs the full logits "
            "that scoring avoids (TRL 2.0 removes it)."
        )
    if args.packing and args.packing_strategy == "wrapped":
        raise ValueError(
            "`packing_strategy` is 'wrapped': choose 'bfd' or 'bfd_split', since 'wrapped' cuts samples in pieces that "
            "cannot be told apart."
        )
    if args.packing and args.pool_factor > 1:
        raise ValueError(
            f"`pool_factor` is {args.pool_factor} and `packing` is on: set `pool_factor` to 1 or `packing` to false, "
            "since the survivors of several packed rows may not fit into one."
        )
    if args.packing and args.group_column is not None:
        raise ValueError(
            f"`group_column` is {args.group_column!r} and `packing` is on: leave one of them out, since TRL's packing "
            "removes every other column."
        )
    _refuse_distributed_options(args)
    adapters = [peft_config, *getattr(model, "peft_config", {}).values()]
    for adapter in adapters:
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"`peft_config` is a {type(adapter).__name__}: use LoRA or another adapter of the weights, since the "
                "virtual tokens of prompt learning shift the scored positions."
            )


def _refuse_distributed_options(args: QTuningSFTConfig) -> None:
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"`accelerator_config.{name}` is true: set it to false, since each process draws its own candidates."
            )
    sizes = args.parallelism_config
    for name, meaning in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        if getattr(sizes, name, 1) > 1:
            raise ValueError(
                f"`parallelism_config.{name}` is {getattr(sizes, name)}: set it to 1, since {meaning} parallelism "
                "splits the samples that are scored; DDP and FSDP work."
            )


def refuse_unusable_dataset(dataset: Any, args: QTuningSFTConfig, formatted: bool = False) -> dict[str, Any] | None:
    """
    Raise a `ValueError` for a training set that cannot be trained on.

    Args:
        dataset (`Dataset` or `IterableDataset`): As it was given.
        args ([`QTuningSFTConfig`]): The configuration.
        formatted (`bool`): Whether a `formatting_func` makes texts of its rows.

    Returns:
        `dict` or `None`: Its first example; `None` if it is no dataset at all, which TRL refuses in its own words.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("`train_dataset` is empty: give a dataset (or a split of it) with at least one row.")
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps} and `train_dataset` is streamed: set `max_steps` to the number of "
            "optimizer steps to train for, since a stream has no length."
        )
    if not isinstance(first.get(SAMPLE_ID, 0), int) and not args.keeps_everything:
        raise ValueError(
            f"`train_dataset` has the column {SAMPLE_ID!r}, {first[SAMPLE_ID]!r} in its first row: rename "
            "it, or give signed integers that name the samples."
        )
    vision = sorted({"image", "images"} & first.keys())
    if vision:
        raise ValueError(
            f"`train_dataset` has the column {vision[0]!r}: use a text dataset or remove the column, since Q-Tuning "
            "does not prune vision data."
        )
    refuse_preferences(first, (args.score_column, args.group_column))
    if not formatted:
        refuse_unknown_columns(first, args.dataset_text_field)
    if args.group_column is not None and args.group_column not in first:
        raise ValueError(
            f"`group_column` is {args.group_column!r}: choose one of the dataset's columns ({', '.join(first)}), or "
            "leave it out."
        )
    if "column" in args.sample_needs:
        _refuse_unusable_scores(dataset, first, args)
    return first


def _refuse_unusable_scores(dataset: Any, first: dict[str, Any], args: QTuningSFTConfig) -> None:
    """Raise a `ValueError` if `score_column` cannot select; of a stream only the first row is known."""
    name = args.score_column
    if name not in first:
        raise ValueError(f"`score_column` is {name!r}: choose one of the dataset's columns ({', '.join(first)}).")
    values = list(dataset[name]) if isinstance(dataset, Dataset) else [first[name]]
    for row, value in enumerate(values):
        if not isinstance(value, (bool, int, float)) or value != value:
            raise ValueError(
                f"`score_column` is {name!r}, whose value in row {row} is {value!r}: give every row a number, or true "
                "or false."
            )
    if isinstance(first[name], bool) and args.pool_factor > 1:
        raise ValueError(
            f"`score_column` is {name!r}, which marks samples, and `pool_factor` is {args.pool_factor}: set "
            "`pool_factor` to 1, since the marked ones may not fit into one optimizer step."
        )


def refuse_missing_attention(model: Any, args: QTuningSFTConfig) -> None:
    """Raise a `ValueError` if the token pruner needs attention weights and the model's attention gives none."""
    implementation = str(model.config._attn_implementation)
    if "attention" in args.token_needs and implementation != "eager":
        raise ValueError(
            f"`token_pruner` is {args.token_pruner!r} and the model's attention is {implementation!r}, which gives no "
            "attention weights: set `attn_implementation` to 'eager'."
        )


def refuse_what_shards_cannot(model: Any, args: QTuningSFTConfig) -> None:
    """Raise a `ValueError` if the token pruner needs more of a sharded model than forwards that all processes make."""
    if "attention" in args.token_needs:
        raise ValueError(
            f"`token_pruner` is {args.token_pruner!r} and the model is sharded (FSDP or DeepSpeed): train without, or "
            "use another token pruner, since attention weights are read sample by sample."
        )
    if "base" in args.token_needs and is_partitioned(model) and not isinstance(model, PeftModel):
        raise ValueError(
            f"`token_pruner` is {args.token_pruner!r}, which compares with the model before fine-tuning, and ZeRO-3 "
            "partitions the model as it is loaded: train an adapter, or use ZeRO-2."
        )


def needs_chat_template(example: dict[str, Any] | None, args: QTuningSFTConfig) -> bool:
    """Whether the examples are conversations and no `chat_template_path` says how to write them down."""
    if example is None or "input_ids" in example or args.chat_template_path is not None:
        return False
    return is_conversational(example) or is_conversational_from_value(example)


def refuse_missing_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if a tokenizer cannot write a conversation down."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"`train_dataset` holds conversations and the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "set `chat_template_path` to a Jinja file or to a model that has one, or use prompt/completion columns."
        )


def refuse_missing_answers(dataset: Any, check: DataCheck, args: QTuningSFTConfig) -> None:
    """
    Raise a `ValueError` if no prepared row has an answer token.

    Args:
        dataset (`Dataset` or `IterableDataset`): The training set as TRL prepared it.
        check ([`~data_check.DataCheck`]): What was counted of it.
        args ([`QTuningSFTConfig`]): The configuration.
    """

    def has_answer(example: dict[str, Any]) -> bool:
        return any(label != -100 for label in example.get("labels", example["input_ids"])[1:])

    if any(has_answer(example) for example in dataset):
        return
    if check.dropped and check.dropped[CUT_WHOLE] == check.dropped.total():
        raise ValueError(
            f"`max_length` is {args.max_length}: it cuts off the whole answer of each of the "
            f"{check.dropped[CUT_WHOLE]} rows; raise it, or shorten the prompts."
        )
    if check.dropped and not check.dropped[CUT_WHOLE]:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in check.dropped.items())
        raise ValueError(
            f"`train_dataset` has no row with an answer token ({reasons}): give each row an answer, and labels other "
            "than -100 for its tokens."
        )
    raise ValueError(
        "`train_dataset` has no row with an answer token: check that the answers are not empty, and that "
        f"`max_length` ({args.max_length}), `completion_only_loss` and `assistant_only_loss` leave labels other "
        "than -100."
    )
