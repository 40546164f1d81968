"""Recipes: plain TRL-style YAML files that may build on others, and the parser that reads them and the command line."""

import argparse
import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

BASE_KEY = "base"
ACCELERATE_CONFIG = "accelerate_config"
# Options of `accelerate launch` that say what is launched, which is not the recipe's to choose.
NOT_FOR_RECIPES = {"help", "module", "no_python", "training_script", "training_script_args", "main_training_function"}
# Names that older TRL recipes and handbooks use, and that no likeness in spelling would lead to.
RENAMED = {
    "torch_dtype": "dtype",
    "dataset_mixture": "datasets",
    "dataset_mixer": "datasets",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "model_name": "model_name_or_path",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}


# Files


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Read a recipe and the ones it builds on.

    The key `base` names one file or a list of files, relative to the recipe. They are merged in order, a later one
    replacing the keys of an earlier one, and the recipe itself comes last. Only `env` is merged key by key.
    Relative `chat_template_path`, `fallback_chat_template` and `data_files` that exist beside the recipe that names
    them, and not in the current directory, are made to point there.

    Raises:
        `ValueError`: If a file is missing, is no YAML mapping, or builds on itself; in one sentence.
    """
    return _load(Path(path), ())


def _load(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    where = path.resolve()
    if where in children:
        chain = " -> ".join(child.name for child in (*children[children.index(where) :], where))
        raise ValueError(f"`base` in {children[-1]} leads back to the recipe itself ({chain}): remove one of these.")
    recipe = _read_mapping(path, children)
    bases = recipe.pop(BASE_KEY, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"`{BASE_KEY}` in {path} is {bases!r}: give the path of a recipe, or a list of paths.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _load(path.parent / Path(base).expanduser(), (*children, where)))
    return _merge(merged, _resolve_paths(recipe, path.parent))


def _read_mapping(path: Path, children: Sequence[Path]) -> dict[str, Any]:
    option = f"`{BASE_KEY}` in {children[-1]}" if children else "`--config`"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option} is '{path}': give the path of a recipe ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} is '{path}': this is no YAML file ({_one_line(error)}).") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise ValueError(f"{option} is '{path}': give a YAML file of lines `key: value`.")
    if not isinstance(recipe.get("env") or {}, dict):
        raise ValueError(f"`env` in {path} is {recipe['env']!r}: give lines `NAME: value` below it.")
    return recipe


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = {**old, **new}
    if "env" in merged:
        merged["env"] = {**(old.get("env") or {}), **(new.get("env") or {})}
    return merged


def _resolve_paths(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Point the paths a recipe names at the files beside it, where the current directory has no such file."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, str) and not Path(value).exists() and (folder / value).exists():
            return str(folder / value)
        return value

    resolved = dict(recipe)
    for name in ("chat_template_path", "fallback_chat_template"):
        if name in recipe:
            resolved[name] = resolve(recipe[name])
    if isinstance(recipe.get("datasets"), list):
        resolved["datasets"] = [
            {**entry, "data_files": resolve(entry["data_files"])}
            if isinstance(entry, dict) and "data_files" in entry
            else entry
            for entry in recipe["datasets"]
        ]
    return resolved


# The command line


@dataclass
class Parsed:
    """
    What a recipe and a command line say.

    Args:
        dataclasses (`tuple`): One instance per dataclass type of the parser.
        launch_args (`list[str]`): What recipe and command line mean for `accelerate launch`.
        script_args (`list[str]`): The command line without what is meant for `accelerate launch`.
        typed_launch_args (`list[str]`): Those of `launch_args` that come from the command line.
    """

    dataclasses: tuple[Any, ...]
    launch_args: list[str]
    script_args: list[str]
    typed_launch_args: list[str]


class RecipeParser(TrlParser):
    """
    [`~trl.TrlParser`] that reads recipes by [`load_recipe`] and refuses what nobody knows.

    It takes keys of the dataclasses and of `accelerate launch`. Use one parser per parse: as in TRL, the values of a
    recipe become the parser's defaults.
    """

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any):
        super().__init__(list(dataclass_types), allow_abbrev=False, **kwargs)
        self.add_argument(
            "--config",
            metavar="RECIPE",
            default=argparse.SUPPRESS,
            help="Recipe: a YAML file of these options and those of `accelerate launch`; its key `base` names recipes "
            "it builds on. Options on the command line replace those of the recipe.",
        )
        self._hints = {
            name: hint for dtype in self.dataclass_types for name, hint in typing.get_type_hints(dtype).items()
        }
        self._actions_by_name = {a.dest: a for a in reversed(self._actions) if a.dest in self._hints}

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError` where argparse would print the usage of 200 options and exit."""
        raise ValueError(f"{message.rstrip('.')}; `{self.prog} --help` explains each option.")

    def parse(self, argv: Sequence[str]) -> Parsed:
        """
        Parse a command line and the recipe it names.

        Raises:
            `ValueError`: For unknown options, with the nearest known one, and for values that an option cannot take.
        """
        from accelerate.commands.launch import launch_command_parser

        launch_parser = launch_command_parser()
        launch_parser.error = self.error
        launch_actions = {a.dest: a for a in launch_parser._actions if a.dest not in NOT_FOR_RECIPES}

        config_path, argv = self._take_config(argv)
        recipe_launch_args = self._apply_recipe(config_path, launch_actions) if config_path is not None else []
        *dataclasses, extras = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        self._refuse_unknown_options(extras, launch_actions)
        script_args = _without_subsequence(argv, extras)
        if config_path is not None:
            script_args = ["--config", config_path, *script_args]
        typed = [part for token in extras for part in token.split("=", 1)]
        return Parsed(tuple(dataclasses), [*recipe_launch_args, *typed], script_args, typed)

    def _take_config(self, argv: Sequence[str]) -> tuple[str | None, list[str]]:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append", default=[])
        finder.error = self.error  # type: ignore[method-assign]
        found, rest = finder.parse_known_args(list(argv))
        if len(found.config) > 1:
            raise ValueError(
                f"`--config` is given {len(found.config)} times: give one; a recipe names others in `{BASE_KEY}`."
            )
        return (found.config[0] if found.config else None), rest

    def _apply_recipe(self, path: str, launch_actions: dict[str, argparse.Action]) -> list[str]:
        """Make a recipe's values the defaults, set its `env`, and return its arguments for `accelerate launch`."""
        recipe = load_recipe(path)
        for name, value in (recipe.pop("env", None) or {}).items():
            os.environ[name] = str(value)
        values, launch_args = {}, []
        for name, value in recipe.items():
            if name in self._actions_by_name:
                values[name] = self._checked_value(name, value, path)
            elif name in launch_actions or name == ACCELERATE_CONFIG:
                launch_args += _launch_argument(name, value, launch_actions.get(name))
            else:
                remedy = self._nearest(name, launch_actions)
                raise ValueError(f"`{name}: {value}` in {path} is no known option: {remedy}")
        self.set_defaults_with_config(**values)
        return launch_args

    def _nearest(self, name: str, launch_actions: dict[str, argparse.Action], dashes: str = "") -> str:
        known = [*self._actions_by_name, *launch_actions, ACCELERATE_CONFIG, BASE_KEY, "config", "env"]
        matches = difflib.get_close_matches(name, known, n=1)
        if name in RENAMED or matches:
            return f"did you mean `{dashes}{RENAMED.get(name) or matches[0]}`?"
        return f"`{self.prog} --help` lists those there are."

    def _refuse_unknown_options(self, extras: list[str], launch_actions: dict[str, argparse.Action]) -> None:
        """Refuse what neither the dataclasses nor `accelerate launch` take; each option comes with its own values."""
        options = {option: action for action in launch_actions.values() for option in action.option_strings}
        tokens = iter(extras)
        for token in tokens:
            option, equals, _ = token.partition("=")
            if option in options or option.replace("-", "_") == f"__{ACCELERATE_CONFIG}":
                takes_value = option not in options or options[option].nargs != 0
                if takes_value and not equals and next(tokens, None) is None:
                    raise ValueError(f"`{option}` has no value: give one after it.")
            elif option.startswith("-"):
                remedy = self._nearest(option.lstrip("-").replace("-", "_"), launch_actions, "--")
                raise ValueError(f"`{token}` is no known option: {remedy}")
            else:
                remedy = f"`--config {token}`" if token.endswith((".yaml", ".yml")) else "`--name value`"
                raise ValueError(f"`{token}` belongs to no option: give options as {remedy}.")

    def _checked_value(self, name: str, value: Any, path: str) -> Any:
        """A recipe's value as the option's type; argparse itself checks those of the command line only."""
        action, kinds = self._actions_by_name[name], _kinds(self._hints[name])
        given = f"`{name}` in {path} is {value!r}"
        if name == "datasets":
            return _checked_datasets(value, given)
        if value is None and types.NoneType not in kinds:
            raise ValueError(f"{given}: give {_wanted(action, kinds)}, or leave the key out.")
        # `resume_from_checkpoint: true` is the last checkpoint, though its type names paths only.
        if value is None or type(value) in kinds or (name == "resume_from_checkpoint" and isinstance(value, bool)):
            chosen = value
        elif value is False and "no" in (action.choices or ()):
            chosen = "no"  # YAML 1.1 reads a bare `no` as false
        elif isinstance(value, (list, dict, bool)):
            raise ValueError(f"{given}: give {_wanted(action, kinds)}.")
        else:
            chosen = _converted(action, value)
        invalid = action.choices is not None and chosen is not None and chosen not in action.choices
        if chosen is _INVALID or invalid:
            raise ValueError(f"{given}: give {_wanted(action, kinds)}.")
        return chosen


_INVALID = object()


def _converted(action: argparse.Action, value: Any) -> Any:
    """A scalar by way of the text it would be on the command line (YAML 1.1 reads `1e-4` as a text)."""
    try:
        return action.type(str(value)) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return _INVALID


def _kinds(hint: Any) -> set[Any]:
    """The plain types of a type hint: `{float, NoneType}` for `float | None`, `{list}` for `list[str]`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    kind = origin or hint
    if origin is typing.Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return {str}
    return {kind}


def _wanted(action: argparse.Action, kinds: set[Any]) -> str:
    if action.choices is not None:
        return "one of " + ", ".join(str(choice) for choice in action.choices)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text (in quotes)"}
    names |= {list: "a list", dict: "a mapping"}
    return " or ".join(name for kind, name in names.items() if kind in kinds) or "another value"


def _checked_datasets(value: Any, given: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{given}: give a list of entries such as `- path: json` with their `data_files`.")
    known = [field.name for field in fields(DatasetConfig)]
    for entry in value:
        for key in entry:
            if key not in known:
                near = (difflib.get_close_matches(str(key), known, n=1) or [", ".join(known)])[0]
                raise ValueError(f"{given}: an entry has no `{key}`, give `{near}`.")
        if not isinstance(entry.get("path"), str):
            raise ValueError(f"{given}: each entry needs a `path`, the name of a dataset or of a file format.")
    return value


def _launch_argument(name: str, value: Any, action: argparse.Action | None) -> list[str]:
    if value is None:
        return []
    if action is not None and action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is {value!r}: give true or false.")
        return [f"--{name}"] if value else []
    if value is False and action is not None and "no" in (action.choices or ()):
        return [f"--{name}", "no"]
    return [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]


def _without_subsequence(tokens: Sequence[str], removed: Sequence[str]) -> list[str]:
    """`tokens` without `removed`, which argparse returns in their order."""
    rest, kept = list(removed), []
    for token in tokens:
        if rest and token == rest[0]:
            rest.pop(0)
        else:
            kept.append(token)
    return kept
