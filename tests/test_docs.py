"""The pages: all are in the index, each says for whom it is, no line of prose is too long, no link leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")
MOST_CHARACTERS = 120


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
