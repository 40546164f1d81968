"""
List the recipes that come with the package, or copy one to edit.

```bash
qtuning recipes
qtuning recipes copy smollm2-1.7b-lora my.yaml
qtuning sft --config my.yaml
```
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import yaml

from ..cli import EPILOG
from ..recipe_files import SHIPPED, find_shipped, load_recipe, shipped_names

CARD = re.compile(r"card with (\d+ GB)")
# A row of the table that `qtuning plan --recipes` makes: the recipe, its micro-batch, and the peak that is planned.
PLANNED = re.compile(r"^\| `([^`]+)` \|[^|]+\| ([\d.]+) \|", re.MULTILINE)


def make_parser() -> argparse.ArgumentParser:
    """The options of `qtuning recipes`."""
    parser = argparse.ArgumentParser(
        prog="qtuning recipes", description=(__doc__ or "").strip().split("\n")[0], epilog=EPILOG, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    copy = commands.add_parser("copy", help="write a recipe, with all that it builds on, to a file of your own")
    copy.add_argument("name", metavar="NAME", help="one that `qtuning recipes` lists")
    copy.add_argument("file", metavar="FILE", nargs="?", help="where it goes (default: NAME.yaml here)")
    return parser


def main(argv: Sequence[str]) -> int:
    """`qtuning recipes`: list, or copy; raises what [`copy_recipe`] raises."""
    options = make_parser().parse_args(list(argv))
    if options.command == "copy":
        file = copy_recipe(options.name, options.file)
        runs = "model_name_or_path" in load_recipe(file)
        following = f"\nNext:\n  qtuning sft --config {quote(str(file))}" if runs else ""
        print(f"{options.name} copied to {file}{following}")
    else:
        print(listing())
    return 0


def listing() -> str:
    """A line for each recipe: its name, the card it is meant for, the peak memory of its plan, model and data."""
    rows, data = [("recipe", "card", "planned peak", "model", "data")], [("name", "what it is for")]
    peaks = dict(PLANNED.findall((SHIPPED / "README.md").read_text(encoding="utf-8")))
    for name in shipped_names():
        if name.startswith("data/"):
            data.append((name, _first_comment(name).split(". ")[0].rstrip(".")))
            continue
        recipe = load_recipe(SHIPPED / f"{name}.yaml")
        if "model_name_or_path" in recipe:  # or it is what others build on, or for `qtuning compare`
            card = CARD.search(_first_comment(name))
            size = card[1] if card else "CPU" if recipe.get("use_cpu") else "-"
            peak = f"{peaks[name]} GiB" if name in peaks else "-"
            rows.append((name, size, peak, recipe["model_name_or_path"], recipe["dataset_name"]))
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(4)]
    lines = ["".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    width = max(len(name) for name, _ in data) + 2
    about = [f"  {name.ljust(width)}{what}" for name, what in data]
    usage = "qtuning sft --config NAME trains by one; qtuning recipes copy NAME gives a file to edit."
    maps = "Data: `--config NAME --config data/...`, or `base: [NAME, data/...]` in a recipe of your own:"
    return "\n".join([*lines, "", maps, *about, "", usage])


def _first_comment(name: str) -> str:
    first = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ")


def copy_recipe(name: str, file: str | None = None) -> Path:
    """
    Write a recipe that comes with the package to a file, merged with those it builds on; its chat template beside it.

    Args:
        name (`str`): Name of the recipe.
        file (`str`, *optional*): Where it goes; by default its name in the current folder.

    Raises:
        `ValueError`: If there is no such recipe, or the file is there already.
    """
    source = find_shipped(name)
    if source is None:
        raise ValueError(f"`NAME` is {name!r}: give one that `qtuning recipes` lists.")
    target = Path(file).expanduser() if file else Path(f"{source.stem}.yaml")
    recipe = load_recipe(source)
    options = ("chat_template_path", "fallback_chat_template")
    templates = {option: Path(recipe[option]) for option in options if recipe.get(option)}
    for path in {target, *(target.parent / template.name for template in templates.values())}:
        if path.exists():
            raise ValueError(f"`FILE` is '{path}', which is there already: give another, or remove it.")
    for option, template in templates.items():
        recipe[option] = template.name
        shutil.copyfile(template, target.parent / template.name)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
    comment = f"# {_first_comment(source.relative_to(SHIPPED).with_suffix('').as_posix())}\n"
    help_line = "# `qtuning sft --help-all` explains each key; remove those that you leave as TRL has them.\n"
    target.write_text(comment + help_line + text, encoding="utf-8")
    return target
