"""`--help` of the commands that take recipes: our options first, then those of TRL that most runs need."""

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from trl import SFTConfig

from .config import QTuningSFTConfig

# Headings of `--help`, and the options below each; `--help-all` shows the others too.
OURS = {
    "what to keep": ("budget", "sample_ratio", "token_ratio", "token_pruning", "token_budget"),
    "which candidates are compared, and by whom": (
        "selection_scope", "pool_factor", "sample_pruner", "token_pruner", "score_column", "reference_model",
        "group_column",
    ),
}  # fmt: skip
TRLS = {
    "model": (
        "model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha",
        "lora_target_modules", "load_in_4bit",
    ),
    "data": (
        "dataset_name", "datasets", "dataset_train_split", "test_split_size", "prompt_template", "completion_template",
        "as_messages", "messages_column", "dataset_text_field", "chat_template_path", "fallback_chat_template",
        "assistant_only_loss", "completion_only_loss", "max_length", "packing",
    ),
    "training": (
        "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu",
        "seed", "eval_strategy", "eval_steps", "logging_steps", "save_strategy", "save_steps",
        "resume_from_checkpoint", "report_to", "push_to_hub",
    ),
}  # fmt: skip
REST = "all other options of TRL and transformers"


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's, with each option written once: `--sample_ratio X` means `--sample-ratio X` too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        if action.nargs == 0:
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "value").strip("_").upper().replace("STRING_TO_BOOL", "BOOL")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is dataclasses.MISSING or action.default in (None, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class HelpAll(argparse.Action):
    """`--help-all`: the help with every option."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(format_help(parser, everything=True), end="")
        parser.exit()


def format_help(parser: argparse.ArgumentParser, everything: bool = False) -> str:
    """
    The help of a parser of recipes.

    Args:
        parser (`argparse.ArgumentParser`): The parser.
        everything (`bool`): Whether to list the options of TRL and transformers that few runs need, too.
    """
    formatter = parser.formatter_class(prog=parser.prog)
    formatter.add_text(f"usage: {parser.prog} --config RECIPE [--option VALUE ...] [options of accelerate launch]")
    formatter.add_text(parser.description)
    for heading, actions in sections(parser).items():
        if heading != REST or everything:
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
    if not everything:
        formatter.add_text(f"{REST}: {parser.prog} --help-all. Options of the launcher: accelerate launch --help.")
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def sections(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Each option of the parser under one heading, in the order in which they are shown."""
    # The first of those with one name: `--no_record` comes after `--record`, which takes true and false.
    actions = {action.dest: action for action in reversed(parser._actions)}
    host = {field.name for field in dataclasses.fields(SFTConfig)}
    method = [field.name for field in dataclasses.fields(QTuningSFTConfig) if field.name not in host]
    common = {name for names in TRLS.values() for name in names}
    ours = [*dict.fromkeys(name for names in OURS.values() for name in names)]
    shown: dict[str, Iterable[str]] = {
        "recipe": ("config", "help", "help_all"),
        **OURS,
        "details of the method, scoring and records": [name for name in method if name not in ours],
    }
    listed = {name for names in shown.values() for name in names}
    own = [name for name in actions if name in _own_fields(parser) and name not in listed | common]
    if own:
        shown = {"recipe": shown.pop("recipe"), "this command": own, **shown}
    shown |= TRLS
    listed = {name for names in shown.values() for name in names}
    shown[REST] = [name for name in actions if name not in listed]
    return {heading: [actions[name] for name in names if name in actions] for heading, names in shown.items()}


def _own_fields(parser: argparse.ArgumentParser) -> set[str]:
    """Options that a dataclass of this package adds to those of the dataclass it is made from."""
    own = set()
    for kind in getattr(parser, "dataclass_types", ()):
        if kind.__module__.startswith(__package__):
            inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
            own |= {field.name for field in dataclasses.fields(kind)} - inherited
    return own
