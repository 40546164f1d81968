"""The wheel: pyproject.toml lists every package, and what lies beside the code is shipped with it."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_listed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "qtuning_trl").rglob("__init__.py")}
    assert set(TOOL["packages"]) == found | {"qtuning_trl.shipped_recipes"}


def test_every_file_beside_the_code_is_shipped():
    shipped = set()
    for package, patterns in TOOL["package-data"].items():
        folder = ROOT / TOOL["package-dir"].get(package, package.replace(".", "/"))
        shipped |= {path for pattern in patterns for path in folder.glob(pattern)}
    beside = {
        path
        for folder in ("qtuning_trl", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert beside - shipped == set()
