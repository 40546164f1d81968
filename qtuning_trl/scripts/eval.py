"""
Evaluate a model, or a model and its adapter side by side, by lm-eval: by default on the paper's six tasks.

```bash
qtuning eval --adapter runs/demo
qtuning eval --model meta-llama/Llama-2-7b-hf --adapter my-run --tasks gsm8k minerva_math --limit 100
qtuning eval --adapter my-run --protocol paper --temperature 1
qtuning eval --model my-model --tasks my_task --include_path my_tasks
```
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import EPILOG, FAILED_RUN, exit_on_error
from ..studies.evaluation import Options, evaluate, load_tasks, make_record
from ..studies.evaluation_model import (
    apply_adapter,
    check_vocabulary,
    find_model,
    load_model,
    load_tokenizer,
    pick_device,
    same_model,
)
from ..studies.evaluation_record import (
    ADAPTER,
    BASE,
    MODEL,
    PROTOCOLS,
    RECORD_NAME,
    notes,
    table_cells,
    write_record,
)

DEFAULT_OUTPUT = "runs/eval"


def make_parser() -> argparse.ArgumentParser:
    """The options of `qtuning eval`."""
    parser = argparse.ArgumentParser(
        prog="qtuning eval", description=(__doc__ or "").strip().split("\n")[0], epilog=EPILOG, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        type=expanduser,
        help="folder or name of the model; if left out, the base model that the adapter names",
    )
    add(
        "--adapter",
        type=expanduser,
        help="folder or name of a PEFT adapter (LoRA): the model is evaluated without and with it",
    )
    add("--no_base", action="store_true", help="evaluate the adapter alone, not the base model beside it")
    add("--protocol", default="lm-eval", choices=tuple(PROTOCOLS),
        help="whose versions of the paper's six tasks: lm-eval's, or the authors' (default: %(default)s)")  # fmt: skip
    add("--tasks", nargs="+", metavar="TASK", help="tasks or groups of lm-eval, or of `--include_path`; default: the "
        "protocol's, " + "; or ".join(" ".join(paper.task for paper in papers) for papers in PROTOCOLS.values())
    )  # fmt: skip
    add("--include_path", help="folder of task files (YAML) of your own; they take precedence over lm-eval's")
    add("--limit", type=int, help="evaluate only the first so many samples of each task: for a trial, not for a result")
    add("--num_fewshot", type=int, help="examples in the prompt, for all tasks; default: what each task says")
    add("--temperature", type=float, help="sample the replies at this temperature; with 0 each token is the likeliest; "
        "default: what each task says, which is 0 for all of the paper's")  # fmt: skip
    add("--seed", type=int, default=Options.seed, help="seed of the sampling (default: %(default)s)")
    add("--apply_chat_template", action="store_true", help="put the prompts in the tokenizer's chat template")
    add("--tokenizer", help="folder or name of the tokenizer; default: the adapter's if it has one, else the model's")
    add("--batch_size", default="8", help="samples at once, or 'auto' for what fits (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights; 'auto' is the one they were saved in (default: %(default)s)")  # fmt: skip
    add("--load_in_4bit", action="store_true", help="load the model in 4-bit NF4, as QLoRA trains on")
    add("--device", help="such as 'cpu' or 'cuda:1'; default: an accelerator if there is one")
    add("--use_cpu", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    add(
        "--output",
        type=expanduser,
        help=f"folder for {RECORD_NAME}.json and {RECORD_NAME}.md; default: the adapter's, else {DEFAULT_OUTPUT}",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """
    `qtuning eval`.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: For bad input, in one sentence, before any task is evaluated.
    """
    arguments = make_parser().parse_args(argv)
    console = Console()
    check_arguments(arguments)
    device = pick_device(arguments.device)
    name, named_base, revision = find_model(arguments.model, arguments.adapter)
    if named_base is not None and not same_model(name, named_base):
        console.print(
            f"Warning: `--model` is {name!r}, but the adapter names {named_base!r} as its base model.", markup=False
        )
    tokenizer, tokenizer_name = load_tokenizer(
        arguments.tokenizer, arguments.adapter, name, arguments.apply_chat_template, revision
    )
    names = task_names(arguments.tasks, arguments.protocol)
    console.print(f"Loading tasks: {', '.join(names)}", markup=False)
    manager, loaded = load_tasks(names, arguments.include_path, tokenizer_name)
    model: Any = load_model(name, arguments.dtype, device, arguments.load_in_4bit, revision)
    check_vocabulary(model, tokenizer, tokenizer_name)
    applied = None
    columns = [MODEL]
    if arguments.adapter:
        columns = [ADAPTER] if arguments.no_base else [BASE, ADAPTER]
        model, applied = apply_adapter(model, tokenizer, arguments.adapter, with_base=BASE in columns)
    options = Options(
        arguments.batch_size,
        arguments.limit,
        arguments.num_fewshot,
        arguments.apply_chat_template,
        arguments.temperature,
        arguments.seed,
    )
    folder = Path(arguments.output or default_output(arguments.adapter))
    folder.mkdir(parents=True, exist_ok=True)
    with exit_on_error(FAILED_RUN):
        results = {}
        for column in columns:
            console.print(f"Evaluating: {column}")
            with model.disable_adapter() if column == BASE else nullcontext():
                results[column] = evaluate(model, tokenizer, manager, loaded, options)
        named = {
            "model": name,
            "revision": revision,
            "adapter": applied and {"path": arguments.adapter, "base_model_name_or_path": named_base, **applied},
            "tokenizer": tokenizer_name,
            "load_in_4bit": arguments.load_in_4bit,
            "protocol": arguments.protocol,
            "include_path": arguments.include_path,
        }
        record = make_record(model, tokenizer, manager, loaded, results, options, named)
        write_record(folder, record)
        print_record(console, record)
        console.print(f"Written to {folder / RECORD_NAME}.json and .md", markup=False)
    return 0


# What can be checked before anything is loaded


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError`, or an `ImportError` without lm-eval, for what cannot be run."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("`qtuning eval` needs lm-eval: run `pip install 'qtuning-trl[eval]'`.") from error
    if not arguments.model and not arguments.adapter:
        raise ValueError(
            "`--model` is not given: name a model or its folder, or give `--adapter`, which names its base."
        )
    if arguments.no_base and not arguments.adapter:
        raise ValueError(
            "`--no_base` leaves nothing to evaluate without `--adapter`: give one, or leave `--no_base` out."
        )
    for option in ("model", "adapter", "tokenizer"):
        value = getattr(arguments, option)
        if value and value.startswith(("./", "../", "/", "~")) and not Path(value).exists():
            raise ValueError(f"`--{option}` is {value!r}: no such folder.")
    adapter = Path(arguments.adapter) if arguments.adapter else None
    if adapter is not None and adapter.exists() and not (adapter / "adapter_config.json").is_file():
        raise ValueError(
            f"`--adapter` is {arguments.adapter!r}: it holds no adapter_config.json; give the folder that training "
            "saved the adapter to, or `--model` for a whole model."
        )
    if arguments.include_path and not Path(arguments.include_path).is_dir():
        raise ValueError(
            f"`--include_path` is {arguments.include_path!r}: no such folder; give one of task files (YAML)."
        )
    for option, lowest in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(arguments, option)
        if value is not None and value < lowest:
            raise ValueError(f"`--{option}` is {value}: give a number of at least {lowest}.")
    temperature = arguments.temperature
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(
            f"`--temperature` is {temperature:g}: give 0 for greedy replies, or a number above, such as 1."
        )
    prompting = {
        "num_fewshot": arguments.num_fewshot is not None,
        "apply_chat_template": arguments.apply_chat_template,
    }
    given = [option for option, is_given in prompting.items() if is_given]
    if arguments.protocol == "paper" and given:
        raise ValueError(
            f"`--{given[0]}` is given with `--protocol paper`, which sets the prompts: leave one of the two out."
        )
    if arguments.batch_size != "auto" and not (arguments.batch_size.isdecimal() and int(arguments.batch_size) > 0):
        raise ValueError(f"`--batch_size` is {arguments.batch_size!r}: give a number of at least 1, or 'auto'.")
    output = Path(arguments.output or default_output(arguments.adapter))
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output` is '{output}', which is a file: give a folder.")


def default_output(adapter: str | None) -> str:
    return adapter if adapter and Path(adapter).is_dir() else DEFAULT_OUTPUT


def task_names(tasks: Sequence[str] | None, protocol: str) -> list[str]:
    """The tasks asked for, each once; both `a b` and lm-eval's `a,b` are understood."""
    if tasks is None:
        return [paper.task for paper in PROTOCOLS[protocol]]
    return list(dict.fromkeys(name for entry in tasks for name in entry.split(",") if name))


def print_record(console: Console, record: dict[str, Any]) -> None:
    headings, cells = table_cells(record)
    table = Table(title=record["model"])
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    console.print(table)
    for note in notes(record):
        console.print(note, markup=False)
