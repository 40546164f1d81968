"""The table of plans in `recipes/README.md`: each recipe on each card, as `qtuning plan` has it."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .plan import Plan, Planner
from .text import TABLE_CARDS, recipe_table

START, END = "<!-- plans: made by `qtuning plan --recipes recipes` -->", "<!-- end of plans -->"
CARD = re.compile(r"Meant for a card with (\d+) GB")


def plans_by_card(planner: Planner) -> dict[float, Plan]:
    """A recipe's plan on each card of the table."""
    return {card: planner.plan(card=card) for card in TABLE_CARDS}


def smallest_card(plans: dict[float, Plan]) -> float:
    """The smallest card that the recipe fits."""
    return next(card for card, plan in plans.items() if plan.verdict[f"{card:g}"] == "fits")


def named_card(path: Path) -> float | None:
    """The card that a recipe says it is meant for."""
    named = CARD.search(path.read_text(encoding="utf-8"))
    return float(named[1]) if named else None


def update_readme(folder: Path, recipes: Iterable[Path], planner: Callable[[Path], Planner]) -> bool:
    """
    Bring the table between the marks in `README.md` up to date; whether it was not.

    Args:
        folder (`Path`): That of the recipes and README.md.
        recipes (`Iterable[Path]`): Those to plan, in the order of the table.
        planner (`Callable`): Takes the path of a recipe.

    Raises:
        `ValueError`: If the marks are not there; or, after it has written, if a recipe names another card than the
            smallest that it fits.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"`--recipes` is '{folder}': put the lines '{START}' and '{END}' into its README.md.")
    rows, wrong = [], []
    for recipe in recipes:
        plans = plans_by_card(planner(recipe))
        if named_card(recipe) != smallest_card(plans):
            wrong.append(f"{recipe.name} ({smallest_card(plans):g} GB)")
        rows.append((str(recipe.relative_to(folder).with_suffix("")), plans))
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    new = f"{before}{START}\n\n{recipe_table(rows)}\n\n{END}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    if wrong:
        raise ValueError(
            f"The smallest card that a recipe fits is not the one its first line names: {', '.join(wrong)}."
        )
    return new != text
