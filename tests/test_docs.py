"""The pages: all are in the index, each says for whom it is, no line of prose is too long, no link leads nowhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")
NOTEBOOK = DOCS / "quickstart.ipynb"
MOST_CHARACTERS = 120
MOST_LINES = 120  # of the README


def prose(path: Path) -> list[str]:
    """Lines that are no code, no table and no picture."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [line for line in text.splitlines() if not line.lstrip().startswith(("|", "!["))]


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"]({page.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_for_whom_it_is(page):
    first = [line for line in page.read_text(encoding="utf-8").splitlines() if line][1]
    assert first.startswith("For "), first


@pytest.mark.parametrize("page", [*PAGES, DOCS / "README.md", ROOT / "README.md"], ids=lambda page: page.name)
def test_lines_can_be_read_and_links_lead_somewhere(page):
    assert [line for line in prose(page) if len(line) > MOST_CHARACTERS and "http" not in line] == []
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_notebook_ships_without_outputs_and_its_links_lead_somewhere():
    """`pytest --nbmake docs/quickstart.ipynb` runs it, as `.ci/run` and the README's command do."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    pages = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert pages
    assert all((DOCS / page).exists() for page in pages)


def test_whoever_runs_the_tests_runs_the_notebook():
    for path in (".ci/run", ".github/workflows/ci.yml", "README.md"):
        assert "--nbmake tests docs/quickstart.ipynb" in (ROOT / path).read_text(encoding="utf-8"), path


def test_links_to_a_section_of_a_page_name_one_that_it_has():
    missing = []
    for page in [*PAGES, DOCS / "README.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, section = target.partition("#")
            if "://" in target or not file.endswith(".md"):
                continue
            text = (page.parent / file).read_text(encoding="utf-8")
            heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            if section not in slugs:
                missing.append(f"{page.name}: {target}")
    assert not missing
