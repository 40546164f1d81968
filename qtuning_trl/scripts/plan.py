"""
Plan a run: will it fit the card, how fast is it against plain SFT, and which settings are the fastest that fit?

```bash
qtuning plan --config recipes/llama-3.1-8b-qlora.yaml
qtuning plan --config recipes/llama-3.1-8b-qlora.yaml --card 12
qtuning plan --config recipes/llama-3.1-8b-qlora.yaml --fit 12 --write my.yaml
qtuning plan --recipes recipes      # the table in recipes/README.md
```
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from ..cli import BAD_INPUT, EPILOG, exit_on_error, take_traceback_flag
from ..recipe_files import load_recipes, recipe_paths

SHARDED = ("use_fsdp", "use_deepspeed", "use_megatron_lm", "accelerate_config", "config_file")


@dataclass
class PlanArguments:
    """The options of `qtuning plan` itself."""

    card: float | None
    fit: float | None
    json: Path | None
    write: Path | None
    recipes: Path | None
    whole: bool
    config: list[str]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the options of `qtuning plan`; all others are those of `qtuning sft`."""
    parser = argparse.ArgumentParser(
        prog="qtuning plan",
        description=(__doc__ or "").strip().split("\n")[0],
        epilog=f"Any option of `qtuning sft` may follow, too. {EPILOG}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", action="append", default=[], help="the recipe to plan")
    parser.add_argument("--card", type=_gib, metavar="GB", help="plan for a card with so much memory, e.g. 12")
    parser.add_argument("--fit", type=_gib, metavar="GB", help="find the fastest settings that fit such a card")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --fit: write a recipe that builds on RECIPE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to a file, too; bytes, not GiB")
    parser.add_argument("--recipes", type=Path, metavar="FOLDER", help="bring the table in FOLDER/README.md up to date")
    parser.add_argument(
        "--whole", action="store_true", help="count every layer, for models whose layers differ in kind"
    )
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _gib(text: str) -> float:
    try:
        size = float(text.lower().removesuffix("gb").strip())
    except ValueError:
        size = 0.0
    if not 1 <= size <= 10_000:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: give the card's memory in GB, such as 12")
    return size


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message.rstrip('.')}; `qtuning plan --help` explains each option.")


def parse(argv: Sequence[str]) -> tuple[PlanArguments, list[str]]:
    """
    The options of `qtuning plan`, and the command line that is left for `qtuning sft`.

    Raises:
        `ValueError`: If they contradict each other.
    """
    namespace, rest = make_parser().parse_known_args(list(argv))
    options = PlanArguments(**vars(namespace))
    if options.card is not None and options.fit is not None:
        raise ValueError(f"`--card` is {options.card:g} and `--fit` is {options.fit:g}: give only one of the two.")
    if options.write is not None and (options.fit is None or not options.config):
        raise ValueError(
            f"`--write` is '{options.write}': give `--config` and `--fit` too, since it writes what they find."
        )
    if options.recipes is not None and not (options.recipes / "README.md").is_file():
        raise ValueError(f"`--recipes` is '{options.recipes}': give the folder that holds the recipes and README.md.")
    return options, [*(part for path in options.config for part in ("--config", path)), *rest]


def make_planner(argv: Sequence[str], whole: bool = False) -> Any:
    """
    The planner of a recipe and options of `qtuning sft`.

    Raises:
        `ValueError`: For what cannot be planned, in one sentence.
    """
    from ..files import refuse_data
    from ..plan.lengths import data_lengths
    from ..plan.model import model_config
    from ..plan.plan import Planner, refuse_sharded, refuse_uncounted_options
    from .sft import make_parser as make_recipe_parser

    parsed = make_recipe_parser().parse([*argv, *_as_on_cpu(argv)])
    script_args, training_args, model_args, dataset_args = parsed.dataclasses
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not given: name a model of the Hub or the folder of a local one.")
    if script_args.dataset_name or dataset_args.datasets:
        refuse_data(script_args.dataset_name, [vars(entry) for entry in dataset_args.datasets])
    refuse_uncounted_options(training_args, model_args)
    arguments = [part for argument in parsed.launch_args for part in argument.split("=", 1)]
    launched = [argument.removeprefix("--").replace("-", "_") for argument in arguments]
    sharded = [name for name in launched if name in SHARDED]
    if sharded:
        refuse_sharded(sharded[0])
    processes = 1
    if "num_processes" in launched:
        processes = int(arguments[launched.index("num_processes") + 1])
    config = model_config(model_args, training_args)
    lengths = data_lengths(config, script_args, training_args, model_args, dataset_args)
    return Planner(config, lengths, training_args, model_args, processes, whole)


def _as_on_cpu(argv: Sequence[str]) -> list[str]:
    """What a recipe for a GPU needs to be parsed on a CPU, which has no float16; bfloat16 is as large."""
    given, _ = load_recipes([value for option, value in pairwise(argv) if option == "--config"])
    typed = argv[argv.index("--fp16") + 1 :][:1] if "--fp16" in argv else [str(given.get("fp16", False))]
    half = typed == [] or typed[0].lower() != "false"
    return ["--use_cpu", "true", *(["--fp16", "false", "--bf16", "true"] if half else [])]


def recipe_planner(path: Path) -> Any:
    """The planner of one of our recipes; its data is nobody's yet, so rows of `max_length` are assumed."""
    return make_planner(["--config", str(path), "--dataset_name", ""])


def main(argv: Sequence[str]) -> int:
    """`qtuning plan`: print what it finds."""
    options, rest = parse(argv)
    _quieten()
    from ..plan.fit import fit, recipe_lines, write_recipe
    from ..plan.text import describe, describe_lines

    if options.recipes is not None:
        from ..plan.recipes import update_readme

        changed = update_readme(options.recipes, recipe_paths(options.recipes), recipe_planner)
        print(f"{options.recipes / 'README.md'}: {'updated' if changed else 'up to date'}")
        return 0
    planner = make_planner(rest, options.whole)
    if options.fit is None:
        plan = planner.plan(card=options.card)
        print(describe(plan))
    else:
        plan = fit(planner, options.fit)
        lines = recipe_lines(plan, planner.setting)
        print(describe(plan), describe_lines(lines), sep="\n\n")
        if options.write is not None:
            write_recipe(options.write, options.config, lines, options.fit)
            print(f"\nWritten: {options.write}")
    if options.json is not None:
        options.json.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0


def _quieten() -> None:
    """A plan is printed to be read; what libraries say about a model without weights is no use."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model is in shapes only
    with exit_on_error(BAD_INPUT):
        sys.exit(main(take_traceback_flag(sys.argv[1:])))
