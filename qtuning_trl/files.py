"""Files and folders that options name: what can be seen of them before anything is loaded."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}
# Forms of tables that are met often and not read, and how to get one that is.
OTHER_FORMS = {
    ".tsv": "tab-separated values are not read; save it with commas as .csv, or as JSON lines",
    ".xlsx": "Excel's files are not read; save the sheet as .csv",
    ".xls": "Excel's files are not read; save the sheet as .csv",
    ".yaml": "YAML is no form of data; for a recipe give `--config`",
}


def refuse_unusable_files(values: Mapping[str, Any]) -> None:
    """
    Look at the model, the data, the template and the folders that options name.

    Args:
        values (`Mapping`): Options by name; `datasets` as a list of mappings.

    Raises:
        `ValueError`: If no model or no data is named, or what is named is not there or cannot be meant.
    """
    _refuse_model(values.get("model_name_or_path"))
    refuse_data(values.get("dataset_name"), values.get("datasets"))
    for option in ("chat_template_path", "fallback_chat_template"):
        template = values.get(option)
        if template is not None and str(template).endswith((".jinja", ".j2")) and not Path(template).is_file():
            raise ValueError(f"`{option}` is {template!r}: no such file; give a Jinja file or a model.")
    output_dir = values.get("output_dir")
    if output_dir is not None:
        _refuse_output(str(output_dir))
    _refuse_checkpoint(values.get("resume_from_checkpoint"), output_dir)


def _refuse_model(model: Any) -> None:
    if model is None:
        raise ValueError("`model_name_or_path` is not given: name a model of the Hub or the folder of a local one.")
    folder = Path(str(model)).expanduser()
    if not folder.exists():
        if _looks_local(str(model)):
            raise ValueError(f"`model_name_or_path` is {model!r}: no such folder; give one that holds a model.")
        return
    if folder.is_file():
        raise ValueError(f"`model_name_or_path` is {model!r}, which is a file: give the folder that holds the model.")
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"`model_name_or_path` is {model!r}, which holds an adapter: give its base model, {base!r}, or make one "
            f"model of the two by `qtuning merge {model}`."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"`model_name_or_path` is {model!r}, which holds no config.json: give the folder of a model, as "
            "`save_pretrained` writes it."
        )


def refuse_data(name: Any, datasets: Any) -> None:
    """Raise a `ValueError` if no data is named, or a file of it is not there."""
    if not datasets:
        if name is None:
            raise ValueError(
                "`dataset_name` is not given: name a data set or a local file, or list some in `datasets`."
            )
        _refuse_form(str(name), f"`dataset_name` is {name!r}")
        if _looks_local(str(name)) and not Path(str(name)).expanduser().exists():
            raise ValueError(f"`dataset_name` is {name!r}: no such file or folder; give one that exists.")
        return
    for entry in datasets:
        path, data_dir = entry["path"], entry.get("data_dir")
        _refuse_form(path, f"`datasets` has the `path` {path!r}")
        if _looks_local(path) and not Path(path).expanduser().exists():
            raise ValueError(f"`datasets` has the `path` {path!r}: no such file or folder; give one that exists.")
        if path in FORMATS.values() and not entry.get("data_files") and not data_dir:
            raise ValueError(f"`datasets` has the `path` {path!r} alone: name the local files in its `data_files`.")
        for file in file_names(entry.get("data_files")):
            _refuse_form(file, f"`datasets` has the `data_files` {file!r}")
            is_plain = "://" not in file and not set("*?[") & set(file)
            if is_plain and not Path(data_dir or "", file).exists():
                raise ValueError(f"`datasets` has the `data_files` {file!r}: no such file; give one that exists.")


def _refuse_form(name: str, given: str) -> None:
    form = OTHER_FORMS.get(Path(name).suffix.lower())
    if form is not None:
        raise ValueError(f"{given}: {form}.")


def _refuse_output(output_dir: str) -> None:
    folder = Path(output_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {output_dir!r}, and {there} is a file: give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` is {output_dir!r}, and {there} cannot be written to: give another folder.")


def _refuse_checkpoint(wanted: Any, output_dir: Any) -> None:
    """Refuse a folder that is no checkpoint; whether it is whole is seen when it is read."""
    if wanted is None or str(wanted).lower() == "false":
        return
    if str(wanted).lower() == "true":
        if not any(Path(str(output_dir)).expanduser().glob("checkpoint-*")):
            raise ValueError(
                f"`resume_from_checkpoint` is true and `output_dir` {str(output_dir)!r} holds no checkpoint: leave "
                "`resume_from_checkpoint` out to start anew, or give the `output_dir` of the interrupted run."
            )
        return
    folder = Path(str(wanted)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` is {wanted!r}: no such folder; give a checkpoint's, or true.")
    inside = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if not (folder / "trainer_state.json").is_file():
        remedy = f"give one of those in it, such as {str(inside[-1])!r}" if inside else "give a folder checkpoint-N"
        raise ValueError(
            f"`resume_from_checkpoint` is {wanted!r}, which is no checkpoint (it holds no trainer_state.json): "
            f"{remedy}, or true for the last one in `output_dir`."
        )


def _looks_local(name: str) -> bool:
    return name.startswith(("./", "../", "/", "~")) or Path(name).suffix in FORMATS


def file_names(data_files: Any) -> Iterator[str]:
    """The names in `data_files`, which is one, or a list or a mapping of them."""
    if isinstance(data_files, str):
        yield data_files
    elif data_files is not None:
        for item in data_files.values() if isinstance(data_files, dict) else data_files:
            yield from file_names(item)


def what_is_wrong(files: Iterable[str]) -> str | None:
    """
    Why a local data file cannot be read, in the words of the one who wrote it; `None` if nothing is found.

    Asked only after the library has failed, since it reads the files.
    """
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file() or path.suffix not in (".json", ".jsonl", ".csv", ".txt"):
            continue
        text, found = path.read_bytes().decode("utf-8", errors="replace"), "\ufffd"
        if found in text:
            number = text[: text.index(found)].count("\n") + 1
            return f"line {number} of {name} is not UTF-8, perhaps Latin-1 or Windows-1252: save the file as UTF-8"
        whole = _json_error(text)
        if FORMATS[path.suffix] != "json" or whole is None:
            continue
        if text.lstrip().startswith("["):
            return f"line {whole.lineno} of {name} is no JSON ({whole.msg}): mend it"
        for number, line in enumerate(text.splitlines(), 1):
            error = _json_error(line) if line.strip() else None
            if error is not None:
                return f"line {number} of {name} is no JSON ({error.msg}): mend or remove it"
    return None


def _json_error(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None
