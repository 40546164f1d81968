"""A plan in words."""

from textwrap import fill
from typing import Any

import yaml

from .plan import GIB, Plan

WIDTH = 110
PHASES = {"optimizer": "the optimizer's step", "scoring": "scoring", "training": "training", "plain": "plain SFT"}
# A card that decides nothing between two others is left out of the table.
TABLE_CARDS = (6, 8, 10, 12, 16, 24, 48, 80)
ORDER = ("weights", "adapters", "gradients", "optimizer", "scoring", "training micro-batch", "head")


def describe(plan: Plan) -> str:
    """The plan as `qtuning plan` prints it."""
    setting, memory, time, run, lengths = plan.setting, plan.memory, plan.time, plan.run, plan.lengths
    rows = f"{setting.rows} x {setting.accumulation} rows"
    kind = "4-bit weights, " if setting.four_bit else ""
    checkpointing = "with" if setting.checkpointing else "without"
    lines = [f"{plan.model}: {kind}{rows}, {checkpointing} gradient checkpointing"]
    quantiles = ", ".join(f"{lengths[share]:,} ({share})" for share in ("50%", "90%", "99%"))
    lines += [f"Rows of {lengths['mean']:,.0f} tokens on average, {quantiles}, {lengths['longest']:,} at most", ""]

    lines += ["Peak memory, GiB"]
    named = sorted(memory.parts.items(), key=lambda part: ORDER.index(part[0]) if part[0] in ORDER else len(ORDER))
    lines += [f"  {name:<22}{size / GIB:>7.2f}" for name, size in named]
    lines += [f"  {'together':<22}{memory.bytes / GIB:>7.2f}   set by {PHASES[memory.sets_peak]}"]
    others = {PHASES[name]: size for name, size in memory.peaks.items() if name not in ("plain", memory.sets_peak)}
    lines += [
        f"  {'while ' + name if name == 'scoring' else name:<22}{size / GIB:>7.2f}" for name, size in others.items()
    ]
    lines += [f"  {'plain SFT':<22}{memory.plain_bytes / GIB:>7.2f}"]
    lines += [
        f"The head takes {memory.head / GIB:.2f} GiB of its own, at another moment"
        if "head" not in memory.parts
        else "",
        "",
    ]

    lines += [f"Card with {size} GB: {answer}" for size, answer in plan.verdict.items()]
    if memory.free_tokens:
        lines += [f"Survivors go without checkpointing, {memory.free_tokens:,} tokens at a time"]
    if memory.scoring_tokens:
        lines += [f"Scoring takes {memory.scoring_tokens:,} tokens at a time"]
    lines += [
        "",
        f"Time of a step, plain SFT's being 1: scoring {time['scoring']:.2f} + training {time['training']:.2f} = "
        f"{time['step']:.2f}, {1 / time['step']:.2f} times as fast",
        f"A step: {run['candidates']:,} candidates, {run['survivors']:,} survivors",
    ]
    if run["steps"] is not None:
        lines += [f"The run: {run['steps']:,} optimizer steps, {run['tokens']:,} tokens of candidates"]
    return "\n".join([*lines, "", *(fill(note, WIDTH) for note in plan.notes)])


def one_line(plan: Plan) -> str:
    """Peak memory, the card that it fits, and the time of a step, as the dry run says them."""
    memory, time = plan.memory, plan.time
    fitting = [size for size, answer in plan.verdict.items() if answer == "fits"]
    if plan.card is not None:
        answer = plan.verdict[f"{plan.card:g}"]
        card = f"{'is tight on' if answer == 'tight' else answer} this card with {plan.card:g} GiB"
    elif fitting:
        card = f"fits a card with {fitting[0]} GB"
    else:
        card = f"fits no card with {TABLE_CARDS[-1]} GB"
    return (
        f"Plan, counted for a GPU and not measured: {memory.bytes / GIB:.2f} GiB at the peak (plain SFT "
        f"{memory.plain_bytes / GIB:.2f}), {card}; a step takes {time['step']:.2f} of the time of plain SFT's "
        f"(scoring {time['scoring']:.2f}, training {time['training']:.2f})."
    )


def describe_lines(lines: dict[str, Any]) -> str:
    """Lines to put into a recipe."""
    if not lines:
        return "The recipe's own settings are the fastest that fit."
    return "Put into the recipe:\n\n" + yaml.safe_dump(lines, sort_keys=False).rstrip()


def recipe_table(rows: list[tuple[str, dict[float, Plan]]]) -> str:
    """
    A Markdown table of recipes by cards.

    Args:
        rows (`list[tuple[str, dict[float, Plan]]]`): Of each recipe, its name and its plan for each card.
    """
    head = ["recipe", "rows x tokens", "peak, GiB", "plain SFT's", *(f"{card} GB" for card in TABLE_CARDS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, plans in rows:
        first = next(iter(plans.values()))
        micro_batch = f"{first.setting.rows} x {first.lengths['longest']}"
        cells = [f"`{name}`", micro_batch, f"{first.least / GIB:.2f}", f"{first.memory.plain_bytes / GIB:.2f}"]
        for card in TABLE_CARDS:
            plan = plans[card]
            answer = plan.verdict[f"{card:g}"]
            speed = f"{1 / plan.time['step']:.2f}x"
            cells.append("-" if answer == "does not fit" else f"{speed}, tight" if answer == "tight" else speed)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
