"""The console script `qtuning`, and how every entry point reports errors: one line, unless a traceback is wanted."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from .interrupts import INTERRUPTED, ended_in_one_line, signals_passed_on

COMMANDS = {
    "sft": "fine-tune a model: qtuning sft --config recipe.yaml",
    "demo": "see it work: a tiny model, a minute or two on a CPU",
    "recipes": "list the recipes that come with it; copy one to edit",
    "plan": "will it fit, how fast, what to set: qtuning plan --help",
    "score": "score a data set, without training: qtuning score --help",
    "compare": "compare pruners: qtuning compare --config compare.yaml",
    "eval": "evaluate a model and its adapter: qtuning eval --adapter RUN",
    "report": "show what runs kept: qtuning report RUN [RUN ...]",
    "merge": "merge a run's adapter into its model: qtuning merge RUN",
    "completion": "complete options in a shell: qtuning completion bash",
}
LAUNCHED = ("sft", "score")  # through accelerate; the others run in this process
# Patches libraries while it runs: in a process of its own, which leaves nothing behind.
OWN_PROCESS = ("plan",)
TRACEBACK_VARIABLE = "QTUNING_TRACEBACK"
BAD_INPUT = 2
FAILED_RUN = 1
REFUSALS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)

EPILOG = (
    "Errors are one line and exit with status 2 (bad input), 1 (a run that failed) or 130 (Ctrl-C). Add "
    f"--traceback, or set {TRACEBACK_VARIABLE}=1, for the traceback."
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the `qtuning` command.

    Returns:
        `int`: The exit status: 0, 1 for a run that failed, 2 for bad input, 130 for one that Ctrl-C ended.
    """
    parser = argparse.ArgumentParser(
        prog="qtuning", description="Q-Tuning for TRL: prune samples and tokens while fine-tuning.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"qtuning-trl {version('qtuning-trl')}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, help_line in COMMANDS.items():
        subparsers.add_parser(name, add_help=False, help=help_line)
    argv = list(sys.argv[1:] if argv is None else argv)
    # The command's own options are its own parser's business; building that one takes seconds.
    arguments = parser.parse_args(argv[:1])
    if arguments.command is None:
        parser.print_help()
        return 0
    if arguments.command == "demo":
        return run_script("sft", ["--config", "demo", *argv[1:]])
    if arguments.command in LAUNCHED:
        return run_script(arguments.command, argv[1:])
    if arguments.command in OWN_PROCESS:
        return subprocess.run(
            [sys.executable, "-m", f"{__package__}.scripts.{arguments.command}", *argv[1:]]
        ).returncode
    argv = take_traceback_flag(argv)
    with ended_in_one_line(), exit_on_error(BAD_INPUT):
        return import_module(f".scripts.{arguments.command}", __package__).main(argv[1:])


def run_script(name: str, argv: Sequence[str]) -> int:
    """`qtuning sft` or `score`: check everything that can be checked before, then run it under `accelerate launch`."""
    argv = take_traceback_flag(argv)
    with ended_in_one_line(), exit_on_error(BAD_INPUT):
        from .early import check_early

        check_early(argv, name)
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        script = import_module(f"{__package__}.scripts.{name}")
        parsed = script.parse(argv, prog=f"qtuning {name}")
        launch_args = resolve_accelerate_config_argument(
            ["--accelerate_config" if arg == "--accelerate-config" else arg for arg in parsed.launch_args]
        )
        return launch([*launch_args, "--module", script.MODULE, *parsed.script_args])


def launch(arguments: Sequence[str]) -> int:
    """
    Run `accelerate launch`; the launched processes report their own errors.

    Returns:
        `int`: The exit status of the run.

    Raises:
        `ValueError`: If accelerate cannot take the arguments.
    """
    import logging

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch_parser = launch_command_parser()
    launch_parser.error = _refuse_launch_arguments
    launch_args = launch_parser.parse_args(list(arguments))
    if not torch.accelerator.is_available() or launch_args.cpu:
        _say_one_process(launch_args)
        _use_the_cores(launch_args)
    if not wants_traceback():
        logging.disable(logging.ERROR)  # torchrun logs a page about each process that ends
    try:
        with signals_passed_on():
            launch_command(launch_args)
    except subprocess.CalledProcessError as error:
        return _exit_status(error.returncode)
    except ChildFailedError as error:
        if wants_traceback():
            raise
        return _exit_status(error.get_first_failure()[1].exitcode)
    except SignalException as error:  # torchrun has ended its processes by it
        return _exit_status(-error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _refuse_launch_arguments(message: str) -> None:
    raise ValueError(f"accelerate launch: {message}; `accelerate launch --help` explains its options.")


def _say_one_process(arguments: argparse.Namespace) -> None:
    """accelerate starts one process on a CPU, however many are asked for, unless it is told to launch several."""
    if (arguments.num_processes or 1) > 1 and not _several(arguments) and not arguments.tpu:
        print(
            f"qtuning: `num_processes` is {arguments.num_processes}, and accelerate starts one process on a CPU; for "
            f"{arguments.num_processes}: ACCELERATE_USE_CPU=true qtuning ... --multi_gpu --num_processes "
            f"{arguments.num_processes}",
            file=sys.stderr,
        )


def _several(arguments: argparse.Namespace) -> bool:
    """Whether accelerate starts more than one process on a CPU."""
    several = arguments.multi_gpu or arguments.use_deepspeed or arguments.use_fsdp or arguments.use_megatron_lm
    return bool(several and not arguments.cpu)


def _use_the_cores(arguments: argparse.Namespace) -> None:
    """
    Give each process on a CPU as many threads as PyTorch would take; accelerate gives it one, unless a configuration
    says that there is no GPU. `OMP_NUM_THREADS` and `--num_cpu_threads_per_process` have their say.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file

    configured = arguments.config_file is not None or os.path.isfile(default_config_file)
    if arguments.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ and not configured:
        here = -(-(arguments.num_processes or 1) // (arguments.num_machines or 1)) if _several(arguments) else 1
        arguments.num_cpu_threads_per_process = max(1, torch.get_num_threads() // here)


def _exit_status(returncode: int) -> int:
    if returncode in (BAD_INPUT, FAILED_RUN):
        return returncode
    if returncode in (INTERRUPTED, -signal.SIGINT):
        return INTERRUPTED
    if returncode < 0:
        # A new line first: a process that is ended leaves its progress bar where it stands.
        print(f"\nqtuning: error: the run was ended by signal {-returncode}.", file=sys.stderr)
    return FAILED_RUN


def take_traceback_flag(argv: Sequence[str]) -> list[str]:
    """`argv` without `--traceback`, which sets an environment variable, so that launched processes see it too."""
    if "--traceback" in argv:
        os.environ[TRACEBACK_VARIABLE] = "1"
    return [argument for argument in argv if argument != "--traceback"]


def wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


@contextmanager
def exit_on_error(status: int) -> Iterator[None]:
    """
    Turn an exception into one line on the standard error and an exit with `status`.

    Our own refusals, and those of the libraries below, are of the types `REFUSALS`. Anything else is a surprise, and
    the line says how to see where it comes from.
    """
    try:
        yield
    except Exception as error:
        if wants_traceback():
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, REFUSALS) or not message:
            message = f"{type(error).__name__}: {message} (--traceback, or {TRACEBACK_VARIABLE}=1, shows where)"
        if _first_to_report():
            print(f"qtuning: error: {message}", file=sys.stderr, flush=True)
        # Threads and process groups of a broken run may wait forever for each other at a normal exit.
        sys.exit(status)


def _first_to_report() -> bool:
    """
    Whether no other process of this machine has reported yet: all of them meet the same bad input.

    Not rank 0 always: torchrun ends the others as soon as one has failed, perhaps before rank 0 could speak.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
    try:
        Path(error_file).parent.parent.joinpath("qtuning_reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
