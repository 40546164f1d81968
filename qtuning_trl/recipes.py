"""The parser that reads recipes and the command line: plain TRL-style options, those of Q-Tuning and of accelerate."""

import argparse
import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NoReturn

from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from .help import Formatter, HelpAll, format_help
from .names import OTHERS, remedy
from .recipe_files import load_recipes

ACCELERATE_CONFIG = "accelerate_config"
# Options of `accelerate launch` that say what is launched, which is not the recipe's to choose.
NOT_FOR_RECIPES = {"help", "module", "no_python", "training_script", "training_script_args", "main_training_function"}


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
    [`~trl.TrlParser`] that reads recipes by [`load_recipes`] and refuses what nobody knows.

    It takes keys of the dataclasses and of `accelerate launch`. Use one parser per parse: as in TRL, the values of a
    recipe become the parser's defaults.
    """

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any):
        super().__init__(list(dataclass_types), allow_abbrev=False, formatter_class=Formatter, **kwargs)
        self.add_argument(
            "--config",
            type=_recipe,
            default=argparse.SUPPRESS,
            help="A YAML file of these options and those of `accelerate launch`, or one that `qtuning recipes` lists; "
            "its key `base` names recipes it builds on. Given several times, a later one replaces keys of an earlier "
            "one. Options on the command line replace those of the recipes.",
        )
        self.add_argument(
            "--help-all", "--help_all", nargs=0, action=HelpAll, default=argparse.SUPPRESS,
            help="show every option and exit",
        )  # fmt: skip
        self._hints = {
            name: hint for dtype in self.dataclass_types for name, hint in typing.get_type_hints(dtype).items()
        }
        self._actions_by_name = {a.dest: a for a in reversed(self._actions) if a.dest in self._hints}

    def format_help(self) -> str:
        """Our options first, then the most used ones of TRL; `--help-all` has the others."""
        return format_help(self)

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

        paths, argv = self._take_configs(argv)
        recipe_launch_args = self._apply_recipes(paths, launch_actions)
        *dataclasses, extras = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        self._refuse_unknown_options(extras, launch_actions)
        script_args = _without_subsequence(argv, extras)
        script_args = [*(part for path in paths for part in ("--config", path)), *script_args]
        typed = [part for token in extras for part in token.split("=", 1)]
        return Parsed(tuple(dataclasses), [*recipe_launch_args, *typed], script_args, typed)

    def _take_configs(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append", default=[])
        finder.error = self.error  # type: ignore[method-assign]
        found, rest = finder.parse_known_args(list(argv))
        return found.config, rest

    def _apply_recipes(self, paths: list[str], launch_actions: dict[str, argparse.Action]) -> list[str]:
        """Make the recipes' values the defaults, set their `env`, and return what is for `accelerate launch`."""
        recipe, origins = load_recipes(paths)
        for name, value in (recipe.pop("env", None) or {}).items():
            os.environ[name] = str(value)
        values, launch_args = {}, []
        for name, value in recipe.items():
            if name in self._actions_by_name:
                values[name] = self._checked_value(name, value, origins[name])
            elif name in launch_actions or name == ACCELERATE_CONFIG:
                launch_args += _launch_argument(name, value, launch_actions.get(name))
            else:
                raise ValueError(
                    f"`{name}: {value}` in {origins[name]} is no known option: {self._remedy(name, launch_actions)}"
                )
        self.set_defaults_with_config(**values)
        return launch_args

    def _remedy(self, name: str, launch_actions: dict[str, argparse.Action], dashes: str = "") -> str:
        return remedy(name, {*self._actions_by_name, *launch_actions, *OTHERS}, self.prog, dashes)

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
                name = option.lstrip("-").replace("-", "_")
                raise ValueError(f"`{token}` is no known option: {self._remedy(name, launch_actions, '--')}")
            else:
                form = f"`--config {token}`" if token.endswith((".yaml", ".yml")) else "`--name value`"
                raise ValueError(f"`{token}` belongs to no option: give options as {form}.")

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
        elif isinstance(value, bool) and str(value).lower() in (action.choices or ()):
            chosen = str(value).lower()
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


def _recipe(text: str) -> str:
    return text  # its name is what the help calls the value


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
