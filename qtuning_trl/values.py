"""Values of options that cannot be meant, each refused in one sentence; nothing heavy is imported for that."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any

BUDGET = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*x\s*(\d+(?:\.\d+)?)\s*$")
SHARES = {
    # name: (lowest, its inclusion, highest, its inclusion, what to give)
    "sample_ratio": (0, False, 1, True, "a share greater than 0 and at most 1, such as 0.25"),
    "token_ratio": (0, False, 1, True, "a share greater than 0 and at most 1, such as 0.25"),
    "neighbor_weight": (0, True, 1, True, "a weight from 0 to 1, such as 0.5"),
    "infobatch_annealing": (0, True, 1, False, "a share of the run from 0 to below 1, such as the paper's 0.125"),
    "scored_share": (0, False, 1, True, "a share greater than 0 and at most 1, such as 0.5"),
    "record_tokens": (0, True, 1, True, "a share from 0 to 1, such as 0.1"),
}
COUNTS = {
    "pool_factor": "",
    "scoring_batch_tokens": ", or leave it out",
    "score_reuse_epochs": ", or leave it out",
    "score_reuse_steps": ", or leave it out",
    "per_device_train_batch_size": "",
    "per_device_eval_batch_size": "",
    "gradient_accumulation_steps": "",
}
SWITCHES = ("protect_special_tokens", "survivor_checkpointing", "record")
TEXTS = ("score_column", "group_column", "reference_model", "scoring_model")
NUMBERS = (*SHARES, *COUNTS, "num_train_epochs", "max_steps")


def refuse_bad_values(values: Mapping[str, Any]) -> None:
    """
    Look at those of the options above that `values` has.

    Raises:
        `ValueError`: In one sentence, for the first value that cannot be meant.
    """
    if values.get("budget") is not None:
        parse_budget(values["budget"])
    for name, (low, with_low, high, with_high, wanted) in SHARES.items():
        if name in values:
            value = values[name]
            if not _is_number(value):
                raise ValueError(f"`{name}` is {value!r}: give one number, {wanted}.")
            inside = (low <= value if with_low else low < value) and (value <= high if with_high else value < high)
            if not inside:
                near = f" (did you mean {value / 100:g}?)" if name.endswith("ratio") and 1 < value <= 100 else ""
                raise ValueError(f"`{name}` is {value}: give {wanted}{near}.")
    for name, otherwise in COUNTS.items():
        value = values.get(name, 1)
        if value is None and otherwise:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}: give a whole number of at least 1{otherwise}.")
    for name in SWITCHES:
        if not isinstance(values.get(name, True), bool):
            raise ValueError(f"`{name}` is {values[name]!r}: give true or false.")
    for name in TEXTS:
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"`{name}` is {values[name]!r}: give a name (a text), or leave it out.")
    _refuse_no_steps(values)


def _refuse_no_steps(values: Mapping[str, Any]) -> None:
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1)
    if steps == 0:
        raise ValueError(
            "`max_steps` is 0: give the number of optimizer steps, or leave it out to train for `num_train_epochs`."
        )
    if _is_number(epochs) and not epochs > 0 and not (_is_number(steps) and steps > 0):
        raise ValueError(f"`num_train_epochs` is {epochs}: give a number greater than 0, or `max_steps`.")


def refuse_missing_extras(values: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if 4 or 8 bits are asked for and bitsandbytes is not installed."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if str(values.get(name, False)).lower() == "true" and find_spec("bitsandbytes") is None:
            raise ValueError(f"`{name}` is true and bitsandbytes is missing: pip install 'qtuning-trl[quant]'.")


def parse_budget(budget: Any) -> tuple[float, float]:
    """
    The shares of samples and tokens, in (0, 1], that a budget such as `'12.5x50'` means.

    Raises:
        `ValueError`: If it is none, or was not written in per cent.
    """
    match = BUDGET.match(str(budget))
    if match is None:
        raise ValueError(f"`budget` is {budget!r}: give samples x tokens in per cent, such as '12.5x50'.")
    samples, tokens = map(float, match.groups())
    if not samples or not tokens:
        raise ValueError(f"`budget` is {budget!r}: give more than 0 per cent of samples and of tokens, as '12.5x50'.")
    if samples <= 1 and tokens <= 1:
        meant = f"{samples * 100:g}x{tokens * 100:g}"
        raise ValueError(
            f"`budget` is {budget!r}, which looks like shares: give per cent, here {meant!r}, "
            "or `sample_ratio` and `token_ratio`, which are shares."
        )
    if samples > 100 or tokens > 100:
        what = "samples" if samples > 100 else "tokens"
        raise ValueError(f"`budget` is {budget!r}: give at most 100 per cent of the {what}, as in '12.5x50'.")
    return samples / 100, tokens / 100


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
