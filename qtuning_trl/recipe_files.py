"""Recipes as files: YAML that may build on others, and those that come with the package."""

import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

BASE_KEY = "base"
# In a wheel the recipes are inside the package, in a clone beside it.
_PLACES = (Path(__file__).parent / "shipped_recipes", Path(__file__).parents[1] / "recipes")
SHIPPED = next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def shipped_names() -> list[str]:
    """Names of the recipes that come with the package: those to train by, then `data/...` and `paper/...`."""
    paths = (
        *sorted(SHIPPED.glob("*.yaml")),
        *sorted(SHIPPED.glob("data/*.yaml")),
        *sorted(SHIPPED.glob("paper/*.yaml")),
    )
    return [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in paths]


def find_recipe(name: str | Path) -> Path:
    """
    The file that a path, or the name of a recipe that comes with the package, means.

    A file that exists comes first. `recipes/demo.yaml`, as a clone has it, means the shipped `demo` anywhere.
    """
    path = Path(name).expanduser()
    return path if path.is_file() else find_shipped(name) or path


def find_shipped(name: str | Path) -> Path | None:
    """The file of a recipe that comes with the package, by its name or as a clone has it; `None` if there is none."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    shipped = SHIPPED / f"{path.as_posix().removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    return shipped if shipped.is_file() else None


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Read a recipe and the ones it builds on.

    The key `base` names one file or a list of files, relative to the recipe, or recipes that come with the package.
    They are merged in order, a later one replacing the keys of an earlier one, and the recipe itself comes last. Only
    `env` is merged key by key. Relative `chat_template_path`, `fallback_chat_template` and `data_files` that exist
    beside the recipe that names them, and not in the current directory, are made to point there.

    Raises:
        `ValueError`: If a file is missing, is no YAML mapping, names a key twice, or builds on itself; in one sentence.
    """
    return _load(find_recipe(path), ())


def recipe_paths(folder: Path) -> list[Path]:
    """The recipes in a folder, and in `paper` below it, that name a model to be trained on a card."""
    recipes = {path: load_recipe(path) for part in ("", "paper") for path in sorted((folder / part).glob("*.yaml"))}
    return [path for path, recipe in recipes.items() if "model_name_or_path" in recipe and not recipe.get("use_cpu")]


def load_recipes(paths: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Several recipes as one, as if they were the `base` of another: a later one replaces keys of an earlier one.

    Returns:
        `tuple`: The recipe, and for each of its keys which of the paths it comes from.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in paths:
        recipe = load_recipe(path)
        merged = _merge(merged, recipe)
        origins |= dict.fromkeys(recipe, path)
    return merged, origins


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
        beside = path.parent / Path(base).expanduser()
        found = beside if beside.is_file() else find_shipped(base) or beside
        merged = _merge(merged, _load(found, (*children, where)))
    return _merge(merged, _resolve_paths(recipe, path.parent))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of two equal keys; here they are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _TwiceError(
                    f"has `{key.value}` twice, in lines {lines[key.value]} and {line}: remove one of them."
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


class _TwiceError(ValueError):
    pass


def _read_mapping(path: Path, children: Sequence[Path]) -> dict[str, Any]:
    option = f"`{BASE_KEY}` in {children[-1]}" if children else "`--config`"
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        near = difflib.get_close_matches(path.name.removesuffix(".yaml"), shipped_names(), n=1, cutoff=0.87)
        remedy = f"did you mean '{near[0]}'?" if near else "or a name that `qtuning recipes` lists."
        raise ValueError(f"{option} is '{path}': give the path of a recipe ({error.strerror}), {remedy}") from None
    except _TwiceError as error:
        raise ValueError(f"{option} is '{path}', which {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} is '{path}': this is no YAML file ({' '.join(str(error).split())}).") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise ValueError(f"{option} is '{path}': give a YAML file of lines `key: value`.")
    if not isinstance(recipe.get("env") or {}, dict):
        raise ValueError(f"`env` in {path} is {recipe['env']!r}: give lines `NAME: value` below it.")
    return recipe


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
