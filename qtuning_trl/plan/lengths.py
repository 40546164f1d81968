"""How long the rows of a recipe's data are: of those that are local or cached, prepared as TRL prepares them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedConfig
from trl import DatasetMixtureConfig, ModelConfig

from .. import demo
from ..chat_templates import settle_chat_template
from ..config import QTuningSFTConfig
from ..data import holds_conversations, load_data, mapped, pick_split
from ..step.sample import answer_lengths, split_documents

# Rows whose tokens are counted: the longest by their characters, and others evenly spread over the data.
LONGEST, SPREAD = 256, 1024
# More rows than this are not even measured in characters.
MOST_ROWS = 500_000
ANSWER_SHARE = 0.5


@dataclass(frozen=True)
class Lengths:
    """
    Lengths of the rows that a run draws.

    Args:
        tokens (`np.ndarray` of shape `(rows,)`): Tokens of a sample of the rows.
        labelled (`np.ndarray` of shape `(rows,)`): Labelled tokens of the same rows.
        longest (`int`): Tokens of the longest row of all.
        rows (`int`, *optional*): Rows of the whole data set, if it is known.
        source (`str`): In words, where this is known from.
    """

    tokens: np.ndarray
    labelled: np.ndarray
    longest: int
    rows: int | None
    source: str


def assumed_lengths(training_args: QTuningSFTConfig, why: str) -> Lengths:
    """
    Rows of `max_length`, half of them answer, for data that is not here.

    Raises:
        `ValueError`: If there is no `max_length` either.
    """
    length = training_args.max_length
    if length is None:
        raise ValueError(
            f"`max_length` is not given and {why}: give `max_length`, since a plan needs to know how long rows are."
        )
    tokens = np.full(SPREAD, length)
    return Lengths(tokens, (tokens * ANSWER_SHARE).astype(int), length, None, f"{why}: rows of `max_length` assumed")


def data_lengths(
    config: PreTrainedConfig,
    script_args: Any,
    training_args: QTuningSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> Lengths:
    """
    Lengths of the recipe's data, or those of [`assumed_lengths`] if it, or the tokenizer, is not here.

    Raises:
        `ValueError`: If the data is here and cannot be used.
    """
    if not script_args.dataset_name and not dataset_args.datasets:
        return assumed_lengths(training_args, "no data is named")
    try:
        with _offline():
            data = pick_split(
                load_data(script_args, dataset_args), script_args.dataset_train_split, "dataset_train_split"
            )
    except ValueError as error:
        if "cannot be used" not in str(error):
            raise
        return assumed_lengths(training_args, "the data is neither local nor cached")
    if not isinstance(data, Dataset) or len(data) > MOST_ROWS:
        return assumed_lengths(training_args, "the data is a stream or too large to measure")
    try:
        with _offline():
            tokenizer = _tokenizer(model_args, training_args)
    except (OSError, ValueError):
        return assumed_lengths(training_args, "the tokenizer is not here")
    chosen = _chosen_rows(data)
    rows = mapped(data.select(chosen), script_args, training_args)
    if holds_conversations(rows):
        settle_chat_template(tokenizer, training_args, script_args.fallback_chat_template)
    prepared = _prepared(config, training_args, rows, tokenizer)
    labels = prepared["labels"] if "labels" in prepared.column_names else prepared["input_ids"]
    tokens = np.array([len(ids) for ids in prepared["input_ids"]])
    labelled = np.array([sum(label != -100 for label in row[1:]) for row in labels])
    spread = slice(-SPREAD, None) if len(tokens) > SPREAD else slice(None)
    source = f"{len(tokens):,} of {len(data):,} rows measured" if len(tokens) < len(data) else "all rows measured"
    return Lengths(tokens[spread], labelled[spread], int(tokens.max()), len(data), source)


def prepared_lengths(dataset: Any, training_args: QTuningSFTConfig) -> Lengths:
    """
    Lengths of the rows of a training set that TRL has prepared; those of [`assumed_lengths`] of a stream.

    Raises:
        `ValueError`: As [`assumed_lengths`].
    """
    if not isinstance(dataset, Dataset):
        return assumed_lengths(training_args, "the data is a stream")
    table = dataset.with_format("arrow").select_columns(["input_ids"])
    parts = [table[start : start + 1000]["input_ids"] for start in range(0, len(dataset), 1000)]
    tokens = np.concatenate([pc.list_value_length(part).to_numpy() for part in parts])
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), SPREAD)).astype(int)
    labelled = np.array([sum(answer_lengths(split_documents(dataset[int(row)]))) for row in chosen])
    return Lengths(tokens[chosen], labelled, int(tokens.max()), len(dataset), "those that would be trained on")


def _chosen_rows(data: Dataset) -> list[int]:
    """The rows that are the longest by their characters, and after them some of the others."""
    if len(data) <= LONGEST + SPREAD:
        return list(range(len(data)))
    columns = [column for column in data.column_names if column != "id"]
    characters = np.zeros(len(data), dtype=np.int64)
    for start in range(0, len(data), 1000):
        part = data.select_columns(columns)[start : start + 1000]
        for values in part.values():
            characters[start : start + len(values)] += [len(str(value)) for value in values]
    longest = np.argsort(-characters, kind="stable")[:LONGEST].tolist()
    others = np.linspace(0, len(data) - 1, SPREAD).astype(int).tolist()
    return [*longest, *others]


def _tokenizer(model_args: ModelConfig, training_args: QTuningSFTConfig) -> Any:
    name = str(model_args.model_name_or_path)
    return AutoTokenizer.from_pretrained(
        demo.base_model_path() if name == demo.BASE_MODEL else name,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def _prepared(config: PreTrainedConfig, training_args: QTuningSFTConfig, data: Any, tokenizer: Any) -> Dataset:
    """The rows as `SFTTrainer` would train on them, truncated, with labels; not packed."""
    from .model import bare_model
    from .trainer import stand_in_trainer

    trainer = stand_in_trainer(bare_model(config, layers=1), training_args, data, tokenizer)
    return trainer.train_dataset


@contextmanager
def _offline() -> Iterator[None]:
    """While it is open, data is taken from this machine alone."""
    import datasets.config
    import huggingface_hub.constants

    with (
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield
