"""The house: no room is too big, none is in a circle of imports, and the walk of a sample goes one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qtuning_trl"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in SOURCES}
MOST_LINES = {"module": 450, "class": 300, "function": 80}
OPTIONS = "QTuningSFTConfig"  # a list of options with their help, as long as they are many


def imports(path: Path) -> set[str]:
    """Modules of the package that a module names, those under `TYPE_CHECKING` and inside functions too."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    found = set()
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (parent, node.module)))
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found.add(submodule if submodule in NAMES or f"{submodule}.__init__" in NAMES else source)
    return {name if name in NAMES else f"{name}.__init__" for name in found} & NAMES.keys()


def test_what_the_package_offers_is_in_the_package():
    """Asked in a fresh process, which finds modules in this folder alone."""
    code = "import qtuning_trl, sys; [getattr(qtuning_trl, name) for name in qtuning_trl.__all__]"
    code += "; print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('qtuning_trl.')), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert {Path(line) for line in done.stdout.splitlines()} <= SOURCES.keys()


def test_no_module_class_or_function_is_too_long():
    too_long = []
    for path, tree in SOURCES.items():
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES["module"]:
            too_long.append(str(path))
        for node in ast.walk(tree):
            kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
            if kind and node.name != OPTIONS and node.end_lineno - node.lineno + 1 > MOST_LINES[kind]:
                too_long.append(f"{path}: {node.name}")
    assert not too_long


def test_every_module_can_be_imported_on_windows():
    missing = {"fcntl", "grp", "pwd", "resource", "termios"}
    for path, tree in SOURCES.items():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not missing & set(names), path


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(path) for name, path in NAMES.items()}
    assert graph["qtuning_trl.trainer"] >= {"qtuning_trl.step.scoring", "qtuning_trl.checks"}, "the reading is right"
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, "these modules are in a circle, or lean on one"


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("method", ()),
        ("pruners", ("method",)),
        ("host", ("config", "errors")),
        ("step", ("method", "pruners", "config", "host")),
        ("plan", ("method", "config", "data", "chat_templates", "demo", "errors", "host", "step")),
        ("records", ("method", "config", "errors", "step")),
        ("report", ("records",)),
    ],
)
def test_a_room_knows_only_those_below_it(room, below):
    rooms = {f"qtuning_trl.{name}" for name in (room, *below)}
    for name, path in NAMES.items():
        if name.startswith(f"qtuning_trl.{room}"):
            above = {other for other in imports(path) if ".".join(other.split(".")[:2]) not in rooms}
            assert not above, f"{name} knows {above}"
