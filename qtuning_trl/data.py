"""Data sets: loading those a recipe names, and mapping their columns onto those TRL takes."""

from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from . import demo
from .config import QTuningSFTConfig
from .conversations import (
    HISTORY_COLUMN,
    SYSTEM_COLUMNS,
    TOOLS_COLUMN,
    is_conversation,
    normalize_messages,
    past_turns,
    tools_as_json,
    with_system,
)
from .files import FORMATS, file_names, what_is_wrong
from .shapes import (
    PAIRS,
    context_left_out,
    conversation_column,
    known_pairs,
    refuse_preferences,
    refuse_unknown_columns,
)

Row = dict[str, Any]
# What TRL looks at to tell one type of data set from another: left beside the mapped columns, they would mislead it.
TRL_COLUMNS = {"prompt", "completion", "messages", "text"}


# Loading


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> dict[str, Any]:
    """
    Load what `datasets` or `dataset_name` say, as `trl sft` does; a name may also be a local file.

    With `test_split_size` the two splits are called "train" and "test", and so `script_args` says from then on.

    Returns:
        `dict`: One data set per split.

    Raises:
        `ValueError`: If there is no such data set, file or split; in one sentence.
    """
    dataset_args = _local_files_as_formats(dataset_args)
    streaming = dataset_args.streaming if dataset_args.datasets else script_args.dataset_streaming
    if dataset_args.test_split_size is not None and streaming:
        raise ValueError(
            f"`test_split_size` is {dataset_args.test_split_size} and the data is streamed: name a test split in "
            "`dataset_test_split`, or do not stream, since a stream cannot be split."
        )
    if dataset_args.datasets:
        given = f"`datasets` is {', '.join(repr(_described(entry)) for entry in dataset_args.datasets)}"
        files = [file for entry in dataset_args.datasets for file in file_names(entry.data_files)]
        mixture = _loaded(given, lambda: get_dataset(dataset_args), files)
        return mixture if dataset_args.test_split_size is None else _renamed(mixture, script_args)
    name = script_args.dataset_name
    if name is None:
        raise ValueError("`dataset_name` is not given: name a data set or a local file, or list some in `datasets`.")
    given = f"`dataset_name` is {name!r}"
    path = _local_file(name)
    if name == demo.DATASET:
        splits: Any = demo.load_demo_dataset()
    elif path is not None:
        form = FORMATS[path.suffix]
        splits = _loaded(given, lambda: load_dataset(form, data_files=str(path), streaming=streaming), [name])
    else:
        splits = _loaded(given, lambda: load_dataset(name, name=script_args.dataset_config, streaming=streaming))
    if dataset_args.test_split_size is not None:
        train = pick_split(splits, script_args.dataset_train_split, "dataset_train_split")
        splits = _loaded(
            f"`test_split_size` is {dataset_args.test_split_size}",
            lambda: train.train_test_split(test_size=dataset_args.test_split_size),
        )
        return _renamed(splits, script_args)
    return splits


def _renamed(splits: Any, script_args: ScriptArguments) -> Any:
    script_args.dataset_train_split, script_args.dataset_test_split = "train", "test"
    return splits


def _described(entry: Any) -> str:
    return f"{entry.path} {entry.data_files}" if entry.data_files else entry.path


def _loaded(given: str, load: Callable[[], Any], files: Collection[str] = ()) -> Any:
    try:
        return load()
    except Exception as error:  # the builders of `datasets` raise whatever their formats raise
        cause = what_is_wrong(files)
        if cause is not None:
            raise ValueError(f"{given}, which cannot be read: {cause}.") from error
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{given}, which cannot be used ({cause.rstrip('.')}): check it, or give a local file."
        ) from error


def pick_split(splits: Any, name: str, option: str) -> Any:
    """
    One of the splits that were loaded.

    Raises:
        `ValueError`: If it is not among them.
    """
    if name not in splits:
        remedy = "choose one of the splits there are"
        if option == "dataset_test_split":
            remedy = "choose one of the splits there are, set `test_split_size`, or set `eval_strategy` to 'no'"
        raise ValueError(f"`{option}` is {name!r}: {remedy} ({', '.join(splits)}).")
    return splits[name]


def _local_file(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.suffix in FORMATS and path.is_file() else None


def _local_files_as_formats(dataset_args: DatasetMixtureConfig) -> DatasetMixtureConfig:
    """Let an entry's `path` be a data file: `datasets` wants the format there, and the file in `data_files`."""
    for entry in dataset_args.datasets:
        path = _local_file(entry.path)
        if path is not None:
            entry.path, entry.data_files = FORMATS[path.suffix], str(path)
    return dataset_args


# Mapping columns


class Template:
    r"""
    A text with the names of columns in braces, e.g. `"Question: {instruction}\n{input}\nAnswer:"`.

    A paragraph (up to a blank line), or a line of one, is left out where all the columns it names are empty; so an
    empty `input` leaves neither a blank line nor a heading without a text. Braces themselves are written `{{` and `}}`.

    Raises:
        `ValueError`: If the braces do not match or hold more than a name.
    """

    def __init__(self, text: str, option: str = "prompt_template"):
        try:
            self.paragraphs = [[_parse_line(line) for line in part.split("\n")] for part in text.split("\n\n")]
        except ValueError as error:
            raise ValueError(
                f"`{option}` is {text!r}: {error}; give columns in braces, such as '{{instruction}}'."
            ) from None
        pieces = (piece for lines in self.paragraphs for line in lines for piece in line)
        self.columns = list(dict.fromkeys(name for _, name in pieces if name is not None))
        if not self.columns:
            raise ValueError(f"`{option}` is {text!r}: name a column in braces, such as '{{instruction}}'.")

    def render(self, row: Row) -> str:
        values = {name: "" if row[name] is None else str(row[name]) for name in self.columns}
        paragraphs = []
        for lines in self.paragraphs:
            kept = [line for line in lines if not _is_void(line, values)]
            if kept and not _is_void([piece for line in lines for piece in line], values):
                paragraphs.append("\n".join(_filled(line, values) for line in kept))
        return "\n\n".join(paragraphs)


def _parse_line(line: str) -> list[tuple[str, str | None]]:
    pieces = []
    for literal, name, spec, conversion in Formatter().parse(line):
        if name == "" or spec or conversion:
            raise ValueError("the braces hold no plain column name")
        pieces.append((literal, name))
    return pieces


def _is_void(pieces: list[tuple[str, str | None]], values: dict[str, str]) -> bool:
    named = [values[name] for _, name in pieces if name is not None]
    return bool(named) and not any(value.strip() for value in named)


def _filled(line: list[tuple[str, str | None]], values: dict[str, str]) -> str:
    return "".join(literal + (values[name] if name is not None else "") for literal, name in line)


def map_columns(
    dataset: Dataset | IterableDataset,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    messages_column: str | None = None,
    as_messages: bool = False,
    keep: Collection[str | None] = (),
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Give a data set the columns `prompt` and `completion`, or `messages`, in place of those they are made from.

    A column `system` (or `system_prompt`) and a column `tools` go with a conversation, and with `as_messages` Alpaca's
    `history` too: as turns, and as what the chat template is told of tools.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        prompt_template (`str`, *optional*): [`Template`] of the prompt.
        completion_template (`str`, *optional*): [`Template`] of the completion. The two go together.
        messages_column (`str`, *optional*): Column of conversations, see [`~conversations.normalize_messages`].
        as_messages (`bool`): Make the prompt a user's turn and the completion an assistant's, for the chat template.
            Without templates, the columns must be a set that is known (`shapes.PAIRS`).
        keep (`Collection[str]`): Columns to keep, even if a template uses them.
        num_proc (`int`, *optional*): Processes to map with.

    Returns:
        The mapped data set with all other columns; `dataset` itself if nothing is to be mapped.

    Raises:
        `ValueError`: If options contradict each other or name columns that are not there, or a column holds what
            nothing carries into the prompt.
    """
    templates = {"prompt_template": prompt_template, "completion_template": completion_template}
    if messages_column is None and not any(templates.values()) and not as_messages:
        return dataset
    columns = dataset.column_names or list(next(iter(dataset), {}))
    beside = _Beside(columns)
    if messages_column is not None:
        _refuse_two_mappings(messages_column, templates, as_messages)
        used = {messages_column: "messages_column"}
        produced: dict[str, Any] = {"messages": List(Json())}
        convert: Callable[[Row], Row] = _MessagesMapping(messages_column, beside)
    else:
        if as_messages and not any(templates.values()):
            templates = _known_templates(columns)
        for option, template in templates.items():
            if template is None:
                raise ValueError(f"`{option}` is not given: give it too, such as '{{question}}' or '{{answer}}'.")
        prompt, completion = (Template(str(template), option) for option, template in templates.items())
        used = dict.fromkeys([*prompt.columns, *completion.columns], "completion_template")
        used |= dict.fromkeys(prompt.columns, "prompt_template")
        kind = List(Json()) if as_messages else Value("string")
        produced = {"prompt": kind, "completion": kind}
        beside = _Beside([name for name in columns if name not in used])
        convert = _TurnsMapping(prompt, completion, beside) if as_messages else _TemplateMapping(prompt, completion)

    for name, option in used.items():
        if name not in columns:
            raise ValueError(
                f"`{option}` names the column {name!r}: use those there are ({', '.join(columns)}), or replace the "
                "recipe's mapping by that of a file in recipes/data, such as `--config data/local`."
            )
    if messages_column is None:
        _refuse_lost_columns(dataset, context_left_out(columns, used))
    if messages_column is None and not as_messages:
        _refuse_lost_columns(dataset, beside.names(), "set `as_messages` to true, which takes it along, ")
    else:
        if beside.tools is not None:
            produced[TOOLS_COLUMN] = Value("string")
        used |= dict.fromkeys(beside.names(with_history=as_messages), "")
    removed = [name for name in columns if (name in used or name in TRL_COLUMNS - {*produced}) and name not in keep]
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        left = {name: kind for name, kind in dataset.features.items() if name not in removed}
        # Json: Arrow would give each turn, and the arguments of each tool call, the keys of all others.
        options = {"num_proc": num_proc, "features": Features({**left, **produced})}
    return dataset.map(convert, remove_columns=removed, **options)


def mapped(dataset: Any, script_args: Any, training_args: QTuningSFTConfig) -> Any:
    """
    A data set with its columns mapped as options say; conversations that none names are recognized.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        script_args ([`~scripts.sft.QTuningScriptArguments`]): How columns are mapped.
        training_args ([`QTuningSFTConfig`]): Its `assistant_only_loss` is set for conversations that were recognized.

    Raises:
        `ValueError`: As [`map_columns`] and [`recognize`].
    """
    counted = (training_args.group_column, training_args.score_column)
    templates = (script_args.prompt_template, script_args.completion_template)
    column = script_args.messages_column
    first = telling_row(dataset)
    if column is not None and isinstance(first.get(column), str):
        raise ValueError(
            f"`messages_column` names the column {column!r}, which holds text: give a column of conversations (lists "
            "of turns), or use `prompt_template` and `completion_template`."
        )
    if column is None and not any(templates) and not script_args.as_messages:
        column = recognize(dataset, counted, training_args.dataset_text_field)
        if column not in (None, "messages"):
            training_args.assistant_only_loss = True
    num_proc = training_args.dataset_num_proc
    return map_columns(dataset, *templates, column, script_args.as_messages, keep=counted, num_proc=num_proc)


def telling_row(dataset: Any) -> Row:
    """The first row, or the one of the first hundred with the fewest gaps where that has any; empty of empty data."""

    def gaps(row: Row) -> int:
        return sum(value is None or (isinstance(value, list) and not value) for value in row.values())

    first: Row = next(iter(dataset), {})
    return min(islice(iter(dataset), 100), key=gaps) if gaps(first) else first


def holds_conversations(dataset: Any) -> bool:
    """Whether a mapped data set needs a chat template."""
    first = telling_row(dataset)
    return is_conversation(first.get("messages")) or is_conversation(first.get("prompt"))


def recognize(dataset: Dataset | IterableDataset, counted: tuple[str | None, ...], text_field: str) -> str | None:
    """
    The column of conversations of a data set that no option maps.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        counted (`tuple[str]`): Columns that an option names.
        text_field (`str`): Column of whole texts.

    Returns:
        `str` or `None`: A name for `messages_column`; `None` if TRL takes the columns as they are.

    Raises:
        `ValueError`: If the data set holds preferences, or columns that nothing is known to be done with.
    """
    first = telling_row(dataset)
    if not first:
        return None
    refuse_preferences(first, counted)
    column = None if "input_ids" in first or text_field in first else conversation_column(first)
    if column is None:
        refuse_unknown_columns(first, text_field)
    return column


class _Beside:
    """The columns beside a conversation or an instruction that belong to it."""

    def __init__(self, columns: Collection[str]):
        self.system = next((name for name in SYSTEM_COLUMNS if name in columns), None)
        self.tools = TOOLS_COLUMN if TOOLS_COLUMN in columns else None
        self.history = HISTORY_COLUMN if HISTORY_COLUMN in columns else None

    def names(self, with_history: bool = True) -> list[str]:
        found = (self.system, self.tools, self.history if with_history else None)
        return [name for name in found if name is not None]


def _refuse_two_mappings(column: str, templates: dict[str, str | None], as_messages: bool) -> None:
    for option, value in {**templates, "as_messages": as_messages or None}.items():
        if value is not None:
            raise ValueError(
                f"`messages_column` is {column!r} and `{option}` is {value!r}: give only one of the two, since a row "
                "becomes either messages or a prompt with its completion."
            )


def _known_templates(columns: list[str]) -> dict[str, str | None]:
    pairs = known_pairs(columns)
    if pairs is None:
        known = ", ".join(f"{pairs.prompt} and {pairs.answer}" for pairs in PAIRS)
        raise ValueError(
            f"`as_messages` is true and the columns are {', '.join(columns)}: say by `prompt_template` and "
            f"`completion_template` which of them make the user's turn and the answer, or rename them ({known})."
        )
    prompt, completion = pairs.templates(columns)
    return {"prompt_template": prompt, "completion_template": completion}


def _refuse_lost_columns(dataset: Dataset | IterableDataset, names: list[str], remedy: str = "") -> None:
    """Raise a `ValueError` for what belongs to the prompt and no template names, if these columns hold any."""
    rows = dataset if isinstance(dataset, Dataset) else list(dataset.take(1))
    for name in names:
        values = rows[name] if isinstance(rows, Dataset) else [row[name] for row in rows]
        filled = sum(bool(value) for value in values)
        if filled:
            own = "" if name == HISTORY_COLUMN else f"name it in `prompt_template` ('{{{name}}}'), "
            raise ValueError(
                f"`train_dataset` has the column {name!r}, filled in {filled:,} of its rows, which no template names: "
                f"{remedy}{own}or remove the column."
            )


class _TemplateMapping:
    """A class and not a closure, so that its pickle, and with it the fingerprint of the mapped data, is stable."""

    def __init__(self, prompt: Template, completion: Template):
        self.prompt, self.completion = prompt, completion

    def __call__(self, row: Row) -> Row:
        return {"prompt": self.prompt.render(row), "completion": self.completion.render(row)}


class _TurnsMapping(_TemplateMapping):
    def __init__(self, prompt: Template, completion: Template, beside: _Beside):
        super().__init__(prompt, completion)
        self.beside = beside

    def __call__(self, row: Row) -> Row:
        beside = self.beside
        turns = past_turns(row[beside.history]) if beside.history else []
        turns.append({"role": "user", "content": self.prompt.render(row)})
        answer = [{"role": "assistant", "content": self.completion.render(row)}]
        return _carried({"prompt": turns, "completion": answer}, "prompt", row, beside)


class _MessagesMapping:
    def __init__(self, column: str, beside: _Beside):
        self.column, self.beside = column, beside

    def __call__(self, row: Row) -> Row:
        return _carried({"messages": normalize_messages(row[self.column])}, "messages", row, self.beside)


def _carried(mapped: Row, turns: str, row: Row, beside: _Beside) -> Row:
    """A mapped row with the system text and the tools that belong to it."""
    if beside.system:
        mapped[turns] = with_system(mapped[turns], row[beside.system])
    if beside.tools:
        mapped[TOOLS_COLUMN] = tools_as_json(row[beside.tools])
    return mapped
