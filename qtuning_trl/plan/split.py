"""How the survivors of an optimizer step are dealt into micro-batches with and without gradient checkpointing."""

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Survivors of one micro-batch, by their places in the list of lengths, and whether they are checkpointed."""

    places: list[int]
    checkpointing: bool


def split_survivors(lengths: Sequence[int], most_rows: int, slots: int, free_tokens: int) -> list[Part]:
    """
    As few survivors as possible with gradient checkpointing, the others without, as many at a time as memory allows.

    Rows too long to go without it are checkpointed, in full micro-batches, and so are more of the longest where there
    would be more micro-batches than the step has slots.

    Args:
        lengths (`Sequence[int]`): Tokens of each survivor, `most_rows * slots` of them at most.
        most_rows (`int`): Rows of a micro-batch.
        slots (`int`): Micro-batches that the step has, the most there can be.
        free_tokens (`int`): Tokens, padding included, of a micro-batch without checkpointing.

    Returns:
        `list[Part]`: The micro-batches, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    too_long = sum(length > free_tokens for length in lengths)
    first = -(-too_long // most_rows) * most_rows
    for checkpointed in [too_long, *range(first, len(order) + most_rows, most_rows)]:
        parts = [
            Part(order[start : min(start + most_rows, checkpointed)], True)
            for start in range(0, min(checkpointed, len(order)), most_rows)
        ]
        parts += [Part(places, False) for places in _filled(order[checkpointed:], lengths, most_rows, free_tokens)]
        if len(parts) <= slots:
            return parts
    raise ValueError(f"{len(lengths)} survivors do not fit into {slots} micro-batches of {most_rows} rows.")


def _filled(order: list[int], lengths: Sequence[int], most_rows: int, tokens: int) -> list[list[int]]:
    """Places in order, a micro-batch filled until it has `most_rows` rows or another would exceed `tokens`."""
    batches: list[list[int]] = []
    for place in order:
        full = not batches or len(batches[-1]) == most_rows
        if full or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(place)
    return batches
