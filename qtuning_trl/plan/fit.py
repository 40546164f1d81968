"""The fastest settings of a recipe that fit a card; what is learnt stays the same, but for 4-bit weights if it must."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from .plan import Plan, Planner, Setting, largest, room_of

# A micro-batch of more rows makes no step faster that is counted in operations, nor on a card that these keep busy.
MOST_ROWS = 16


def fit(planner: Planner, card: float) -> Plan:
    """
    The fastest plan whose peak fits the card with room for fragmentation.

    The candidates of a step, those that are compared, `max_length` and all that is learnt from stay as the recipe has
    them. 4-bit weights are taken only if the recipe's own do not fit with as few rows at a time as there may be.

    Args:
        planner ([`Planner`]): Of the recipe.
        card (`float`): GiB of the card.

    Raises:
        `ValueError`: If nothing fits; it says what would.
    """
    own = planner.setting
    for four_bit in [True] if own.four_bit else [False, True]:
        base = replace(own, four_bit=four_bit, free_tokens=None, scoring_tokens=None)
        plans = [plan for setting in _settings(planner, base) if (plan := _fitting(planner, setting, card))]
        if plans:
            # Of equally fast ones, that with the larger micro-batch: a card is slow with few tokens at a time.
            return min(plans, key=lambda plan: (round(plan.time["step"], 2), -plan.setting.rows))
    rows = own.rows if planner.pool_is_micro_batch else 1
    longest = _longest_that_fits(
        planner, replace(own, rows=rows, four_bit=True, checkpointing=True, survivors="true"), card
    )
    remedy = f"with `max_length` {longest} it would" if longest else "choose a smaller model, since its weights do not"
    at_once = f"{'one row' if rows == 1 else f'{rows} rows'} of {planner.lengths.longest} tokens at a time"
    raise ValueError(
        f"`--fit` is {card:g} and {planner.model_args.model_name_or_path} in 4 bits, {at_once}, does not fit: {remedy}."
    )


def _settings(planner: Planner, base: Setting) -> list[Setting]:
    """The settings to try: as many candidates in a step as `base` has, survivors checkpointed as the card allows."""
    candidates = base.rows * base.accumulation
    sizes = [rows for rows in range(1, min(candidates, MOST_ROWS) + 1) if candidates % rows == 0]
    if planner.pool_is_micro_batch:  # other micro-batches would be other pools
        sizes = [base.rows]
    settings = [replace(base, rows=rows, accumulation=candidates // rows, checkpointing=True) for rows in sizes]
    if planner.prunes:
        return [replace(setting, survivors="auto") for setting in settings]
    return [replace(setting, checkpointing=checkpointing) for setting in settings for checkpointing in (True, False)]


def _fitting(planner: Planner, setting: Setting, card: float) -> Plan | None:
    if planner.memory(setting).bytes > room_of(card):
        return None
    plan = planner.plan(setting, card)
    if setting.survivors != "auto":
        return plan
    # What `auto` would find on this card, written down, so that two runs of the recipe are the same.
    free = plan.memory.free_tokens
    written = replace(setting, survivors="auto" if free else "true", free_tokens=free or None)
    return planner.plan(written, card)


def _longest_that_fits(planner: Planner, setting: Setting, card: float) -> int:
    counted, step = planner.counted(True), max(1, planner.lengths.longest // 32)

    def peak(steps: int) -> int:
        return counted.train(planner.batch(setting.rows, steps * step), setting.checkpointing).peak.bytes

    return step * largest(peak, 32, room_of(card))


def recipe_lines(plan: Plan, own: Setting) -> dict[str, Any]:
    """The options of a recipe that the plan's settings are, those apart that are as `own` has them."""
    setting = plan.setting
    lines: dict[str, Any] = {}
    for option, value, before in (
        ("per_device_train_batch_size", setting.rows, own.rows),
        ("gradient_accumulation_steps", setting.accumulation, own.accumulation),
        ("gradient_checkpointing", setting.checkpointing, own.checkpointing),
        ("survivor_checkpointing", setting.survivors, own.survivors),
        ("survivor_batch_tokens", setting.free_tokens, own.free_tokens),
    ):
        if value != before:
            lines[option] = value
    if plan.memory.scoring_tokens and plan.memory.scoring_tokens != own.scoring_tokens:
        lines["scoring_batch_tokens"] = plan.memory.scoring_tokens
    if setting.four_bit and not own.four_bit:
        lines |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    return lines


def write_recipe(path: Path, bases: list[str], lines: dict[str, Any], card: float) -> None:
    """
    Write a recipe of these lines that builds on `bases`, files or names of shipped ones.

    Raises:
        `ValueError`: If the file is there already.
    """
    if path.exists():
        raise ValueError(f"`--write` is '{path}': the file exists; give the name of a new one.")
    folder = path.resolve().parent
    head = f"# Settings that fit a card with {card:g} GB, by `qtuning plan --fit {card:g}`.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = {"base": [_from(folder, base) for base in bases], **lines}
    path.write_text(head + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _from(folder: Path, base: str) -> str:
    """A recipe's file as one in this folder names it; the name of a shipped recipe is the same anywhere."""
    if not Path(base).is_file():
        return base
    file = Path(base).resolve()
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)
