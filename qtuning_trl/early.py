"""What is wrong with a command line and its recipe, told at once: before torch, transformers and TRL are imported."""

from collections.abc import Sequence
from typing import Any

from .files import refuse_unusable_files
from .names import known_names, remedy
from .recipe_files import load_recipes
from .values import NUMBERS, parse_budget, refuse_bad_values, refuse_missing_extras

# What `qtuning score` calls two of these options.
ALIASES = {"model": "model_name_or_path", "dataset": "dataset_name"}
HELP = {"-h", "--help", "--help-all", "--help_all"}


def check_early(argv: Sequence[str], script: str) -> None:
    """
    Check a command line of `qtuning sft` or `qtuning score` as far as that goes without any library.

    What is let through here is checked again, and the types of all values with it, once the libraries are there.

    Raises:
        `ValueError`: In one sentence, for the first thing that is wrong.
    """
    if HELP & set(argv):
        return
    prog = f"qtuning {script}"
    tokens = list(argv)
    if tokens and not tokens[0].startswith("-"):
        form = f"`--config {tokens[0]}`" if tokens[0].endswith((".yaml", ".yml")) else "`--name value`"
        raise ValueError(f"`{tokens[0]}` belongs to no option: give options as {form}.")
    options = _options(tokens)
    typed = {name: (token, value) for name, token, value in options if name != "config"}
    known = known_names(script)
    configs = [value for name, _, value in options if name == "config"]
    paths = [value for value in configs if value is not None]
    if len(paths) < len(configs):
        return  # the parser says it better
    recipe, origins = load_recipes(paths)
    if known is not None:
        for name, value in recipe.items():
            if name not in known:
                where = origins[name]
                raise ValueError(f"`{name}: {value}` in {where} is no known option: {remedy(name, known, prog)}")
        for name, (token, _) in typed.items():
            if name not in known and name.removeprefix("no_") not in known:
                raise ValueError(f"`{token}` is no known option: {remedy(name, known, prog, '--')}")
    values = {ALIASES.get(name, name): value for name, value in recipe.items()}
    values |= {ALIASES.get(name, name): value for name, (_, value) in typed.items()}
    if script == "score":  # which does not train, whatever the recipe says
        values |= {"resume_from_checkpoint": None, "output_dir": None}
    plain = _plain_values(values)
    refuse_bad_values(plain)
    _refuse_two_budgets(plain, values)
    refuse_missing_extras(values)
    if _well_formed(values.get("datasets"), known):
        refuse_unusable_files(values)


def _options(tokens: list[str]) -> list[tuple[str, str, str | None]]:
    """Options of a command line: their names, with underscores, the token as it was typed, and the value."""
    found = []
    for index, token in enumerate(tokens):
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            following = tokens[index + 1] if index + 1 < len(tokens) else "--"
            given = value if equals else None if following.startswith("--") else following
            found.append((name.replace("-", "_"), token, given))
    return found


def _well_formed(datasets: Any, known: set[str] | None) -> bool:
    if datasets is None:
        return True
    entries = datasets if isinstance(datasets, list) else [datasets]
    return all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) and (known is None or entry.keys() <= known)
        for entry in entries
    )


def _refuse_two_budgets(plain: dict[str, Any], values: dict[str, Any]) -> None:
    """What is written is known here alone: later a share that is the option's default cannot be told from none."""
    if "budget" not in plain:
        return
    for name, ratio in zip(("sample_ratio", "token_ratio"), parse_budget(plain["budget"]), strict=True):
        pruned = values.get(name.replace("ratio", "pruner")) != "none"
        if pruned and plain.get(name, ratio) != ratio:
            raise ValueError(
                f"`budget` is {plain['budget']!r} and `{name}` is {plain[name]}: they disagree, so give only one of "
                "the two; `--budget` replaces a recipe's."
            )


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Those values that can be looked at as they are; of the wrong type are those that the parser will refuse."""
    plain = {"budget": values["budget"]} if isinstance(values.get("budget"), str) else {}
    for name in set(NUMBERS) & values.keys():
        try:
            number = float(str(values[name]))
        except ValueError:
            continue
        plain[name] = int(number) if number.is_integer() else number
    return plain
