"""
Worked additions with known faults: the demo's data, and the grading of answers to it.

A row is a sum of two three-digit numbers, worked column by column from the right, and its answer:

    prompt      "247+385="
    completion  "7+5=12, 4+8+1=13, 2+3+1=6, answer 632"

What is planted, and what a good selection does with it:

| kind | how it is made | what it is worth |
|---|---|---|
| clean | right steps, right answer, no two alike | to be learnt from |
| mislabelled | right steps, then the answer of no such sum | the steps are good, the last number is not |
| garbled | the completion's characters in random order | noise |
| easy | single digits without a carry | nothing new |
| duplicate | one of a few clean problems, again and again | nothing new after the first |
"""

import random
import re
import zlib

from datasets import Dataset, DatasetDict

KINDS = ("clean", "mislabelled", "garbled", "easy", "duplicate")
SHARES = {"mislabelled": 0.3, "garbled": 0.1, "easy": 0.15, "duplicate": 0.1}
COPIES = 20  # of each problem among the duplicates
TRAIN_ROWS, TEST_ROWS = 6400, 200
DIGITS = 3  # of the numbers in the demo
ANSWER = re.compile(r"answer (\d+)")


# One problem


def worked_sum(a: int, b: int, dropped: tuple[int, ...] = ()) -> str:
    """
    The worked addition of two numbers.

    Args:
        a, b (`int`): Numbers with equally many digits.
        dropped (`tuple[int, ...]`): Columns, counted from the right, whose carry is forgotten.

    Returns:
        `str`: The steps and the answer, e.g. `"7+5=12, 4+8+1=13, 2+3+1=6, answer 632"`.
    """
    steps, digits, carry = [], "", 0
    columns = list(zip(reversed(str(a)), reversed(str(b)), strict=True))
    for column, (x, y) in enumerate(columns):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        digits = str(total % 10) + digits
        carry = int(total >= 10 and column not in dropped)
    return ", ".join([*steps, f"answer {'1' if carry else ''}{digits}"])


def final_answer(text: str) -> int | None:
    """The last answer given in a text, or `None` if there is none."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None


def operands(prompt: str) -> tuple[int, int]:
    """The numbers that a prompt such as `"247+385="` asks the sum of."""
    a, b = prompt.removesuffix("=").split("+")
    return int(a), int(b)


def right_answer(prompt: str) -> int:
    """The sum that a prompt asks for."""
    return sum(operands(prompt))


def is_held_out(a: int, b: int) -> bool:
    """Whether a problem belongs to the held-out tenth; `a+b` and `b+a` are the same problem."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


def draw_problem(rng: random.Random, held_out: bool = False, digits: int = DIGITS) -> tuple[int, int]:
    """Two numbers of as many digits, from the held-out problems or from the others."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if is_held_out(a, b) == held_out:
            return a, b


def draw_problems(
    rng: random.Random, count: int, held_out: bool = False, digits: int = DIGITS
) -> list[tuple[int, int]]:
    """As many different problems; `a+b` and `b+a` are the same problem."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    while len(found) < count:
        a, b = draw_problem(rng, held_out, digits)
        found[min(a, b), max(a, b)] = (a, b)
    return list(found.values())


# Rows


def _row(a: int, b: int, completion: str, kind: str) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "completion": completion, "kind": kind}


def _clean(rng: random.Random, a: int, b: int) -> dict[str, str]:
    return _row(a, b, worked_sum(a, b), "clean")


def _mislabelled(rng: random.Random, a: int, b: int) -> dict[str, str]:
    steps, _, answer = worked_sum(a, b).rpartition(" ")
    lowest = 2 * 10 ** (len(str(a)) - 1)
    wrong = rng.choice([number for number in range(lowest, 10 * lowest - 1) if number != int(answer)])
    return _row(a, b, f"{steps} {wrong}", "mislabelled")


def _garbled(rng: random.Random, a: int, b: int) -> dict[str, str]:
    completion = worked_sum(a, b)
    return _row(a, b, "".join(rng.sample(completion, len(completion))), "garbled")


def _easy(rng: random.Random) -> dict[str, str]:
    a = rng.randint(0, 9)
    b = rng.randint(0, 9 - a)
    return _row(a, b, worked_sum(a, b), "easy")


def noisy_arithmetic(
    num_rows: int = TRAIN_ROWS,
    seed: int = 0,
    mislabelled: float = SHARES["mislabelled"],
    garbled: float = SHARES["garbled"],
    easy: float = SHARES["easy"],
    duplicate: float = SHARES["duplicate"],
    digits: int = DIGITS,
) -> Dataset:
    """
    A shuffled pool of worked additions with planted faults; the rest of the shares is clean.

    Args:
        num_rows (`int`): Rows in all.
        seed (`int`): Seed of the generator; the global one is left alone.
        mislabelled, garbled, easy, duplicate (`float`): Share of each kind; exactly `round(share * num_rows)` rows.
        digits (`int`): Digits of the numbers, but for the easy ones.

    Returns:
        [`~datasets.Dataset`]: With the texts `prompt`, `completion` and `kind`.

    Raises:
        `ValueError`: If a share is negative, or they add up to more than 1.
    """
    shares = {"mislabelled": mislabelled, "garbled": garbled, "easy": easy, "duplicate": duplicate}
    counts = {kind: round(share * num_rows) for kind, share in shares.items()}
    counts["clean"] = num_rows - sum(counts.values())
    if min(counts.values()) < 0:
        raise ValueError(f"The shares are {shares}: give shares of at least 0 that add up to at most 1.")

    rng = random.Random(seed)
    repeated = -(-counts["duplicate"] // COPIES)  # problems behind the duplicates
    problems = draw_problems(rng, num_rows - counts["easy"] - counts["duplicate"] + repeated, digits=digits)
    originals, others = problems[:repeated], iter(problems[repeated:])
    rows = [_easy(rng) for _ in range(counts["easy"])]
    rows += [
        _row(a, b, worked_sum(a, b), "duplicate")
        for a, b in (originals[index % repeated] for index in range(counts["duplicate"]))
    ]
    for kind, make in (("clean", _clean), ("mislabelled", _mislabelled), ("garbled", _garbled)):
        rows += [make(rng, *next(others)) for _ in range(counts[kind])]
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def held_out(num_rows: int = TEST_ROWS, seed: int = 0, digits: int = DIGITS) -> Dataset:
    """Clean problems, none of which can occur in [`noisy_arithmetic`] or in the base model's training data."""
    rng = random.Random(seed)
    problems = draw_problems(rng, num_rows, held_out=True, digits=digits)
    return Dataset.from_list([_clean(rng, a, b) for a, b in problems])


def load_demo_dataset(seed: int = 0) -> DatasetDict:
    """The demo's data: a noisy `train` split, and a clean `test` split of other problems."""
    return DatasetDict(train=noisy_arithmetic(seed=seed), test=held_out(seed=seed))
