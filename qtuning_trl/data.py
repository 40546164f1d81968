"""Data sets: loading those a recipe names, and mapping their columns onto those TRL takes."""

from collections.abc import Callable, Collection
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from . import demo
from .files import FORMATS, file_names, what_is_wrong

Row = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# What TRL looks at to tell one type of data set from another: left beside the mapped columns, they would mislead it.
TRL_COLUMNS = {"prompt", "completion", "messages", "text"}


# Loading


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> dict[str, Any]:
    """
    Load what `datasets` or `dataset_name` say, as `trl sft` does; a name may also be a local file.

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
        return _loaded(given, lambda: get_dataset(dataset_args), files)
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
        return _loaded(
            f"`test_split_size` is {dataset_args.test_split_size}",
            lambda: train.train_test_split(test_size=dataset_args.test_split_size),
        )
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


def normalize_messages(turns: list[dict[str, Any]]) -> list[dict[str, str]]:
    """
    A conversation in TRL's form, from ShareGPT's (`from`, `value`) or OpenAI's (`role`, `content`).

    Raises:
        `ValueError`: If a turn has another role than those of a user, an assistant or the system.
    """
    messages = []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        text = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if role not in ROLES:
            raise ValueError(
                f"`messages_column` holds a turn with the role {role!r}: remove such conversations, or name the role "
                f"one of {', '.join(ROLES)}."
            )
        messages.append({"role": ROLES[role], "content": text or ""})
    return messages


def map_columns(
    dataset: Dataset | IterableDataset,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    messages_column: str | None = None,
    keep: Collection[str | None] = (),
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Give a data set the columns `prompt` and `completion`, or `messages`, in place of those they are made from.

    Args:
        dataset (`Dataset` or `IterableDataset`): The data.
        prompt_template (`str`, *optional*): [`Template`] of the prompt.
        completion_template (`str`, *optional*): [`Template`] of the completion. The two go together.
        messages_column (`str`, *optional*): Column of conversations, see [`normalize_messages`].
        keep (`Collection[str]`): Columns to keep, even if a template uses them.
        num_proc (`int`, *optional*): Processes to map with.

    Returns:
        The mapped data set with all other columns; `dataset` itself if nothing is to be mapped.

    Raises:
        `ValueError`: If options contradict each other or name columns that are not there.
    """
    if messages_column is None and prompt_template is None and completion_template is None:
        return dataset
    if messages_column is not None:
        for option, template in (("prompt_template", prompt_template), ("completion_template", completion_template)):
            if template is not None:
                raise ValueError(
                    f"`messages_column` is {messages_column!r} and `{option}` is {template!r}: give only one of the "
                    "two, since a row becomes either messages or a prompt with its completion."
                )
        used = {messages_column: "messages_column"}
        produced = {"messages"}
        convert: Callable[[Row], Row] = _MessagesMapping(messages_column)
    else:
        templates = {"prompt_template": prompt_template, "completion_template": completion_template}
        for option, template in templates.items():
            if template is None:
                raise ValueError(f"`{option}` is not given: give it too, such as '{{question}}' or '{{answer}}'.")
        prompt, completion = (Template(str(template), option) for option, template in templates.items())
        used = dict.fromkeys([*prompt.columns, *completion.columns], "completion_template")
        used |= dict.fromkeys(prompt.columns, "prompt_template")
        produced = {"prompt", "completion"}
        convert = _TemplateMapping(prompt, completion)

    columns = dataset.column_names or list(next(iter(dataset), {}))
    for name, option in used.items():
        if name not in columns:
            raise ValueError(f"`{option}` names the column {name!r}: use those there are ({', '.join(columns)}).")
    removed = [name for name in columns if (name in used or name in TRL_COLUMNS - produced) and name not in keep]
    options: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc}
    return dataset.map(convert, remove_columns=removed, **options)


class _TemplateMapping:
    """A class and not a closure, so that its pickle, and with it the fingerprint of the mapped data, is stable."""

    def __init__(self, prompt: Template, completion: Template):
        self.prompt, self.completion = prompt, completion

    def __call__(self, row: Row) -> Row:
        return {"prompt": self.prompt.render(row), "completion": self.completion.render(row)}


class _MessagesMapping:
    def __init__(self, column: str):
        self.column = column

    def __call__(self, row: Row) -> Row:
        return {"messages": normalize_messages(row[self.column])}
