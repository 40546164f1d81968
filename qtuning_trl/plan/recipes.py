"""The table of plans in `recipes/README.md`: each recipe on each card, as `qtuning plan` has it."""

import re
from collections.abc import Callable
from pathlib import Path

from .plan import CARDS, Plan, Planner
from .text import recipe_table

START, END = "<!-- plans: made by `qtuning plan --recipes recipes` -->", "<!-- end of plans -->"
NOT_PLANNED = ("base", "qlora", "demo")
CARD = re.compile(r"Meant for a card with (\d+) GB")


def recipe_paths(folder: Path) -> list[Path]:
    """The recipes that name a model to be trained on a card."""
    return sorted(path for path in folder.glob("*.yaml") if path.stem not in NOT_PLANNED)


def plans_by_card(planner: Planner) -> dict[float, Plan]:
    """A recipe's plan on each card up to 24 GB."""
    return {card: planner.plan(card=card) for card in CARDS[: CARDS.index(24) + 1]}


def smallest_card(plans: dict[float, Plan]) -> float:
    """The smallest card that the recipe fits."""
    return next(card for card, plan in plans.items() if plan.verdict[f"{card:g}"] == "fits")


def update_readme(folder: Path, planner: Callable[[Path], Planner]) -> bool:
    """
    Bring the table between the marks in `README.md` up to date; whether it was not.

    Args:
        folder (`Path`): That of the recipes and README.md.
        planner (`Callable`): Takes the path of a recipe.

    Raises:
        `ValueError`: If the marks are not there, or a recipe names another card than the smallest that it fits.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"`--recipes` is '{folder}': put the lines '{START}' and '{END}' into its README.md.")
    rows = []
    for recipe in recipe_paths(folder):
        plans = plans_by_card(planner(recipe))
        named = CARD.search(recipe.read_text(encoding="utf-8"))
        if named is None or float(named[1]) != smallest_card(plans):
            raise ValueError(
                f"{recipe} does not say 'Meant for a card with {smallest_card(plans):g} GB', the smallest it fits: "
                "correct its first line."
            )
        rows.append((recipe.stem, plans))
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    new = f"{before}{START}\n\n{recipe_table(rows)}\n\n{END}{after}"
    if new == text:
        return False
    path.write_text(new, encoding="utf-8")
    return True
