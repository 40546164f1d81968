"""
Compare pruners with each other and with full data: one table from a grid of runs over one recipe.

```bash
qtuning compare --config compare.yaml --dry-run
qtuning compare --config compare.yaml
```

Each run is a process of its own in a folder of its own, with a recipe (`run.yaml`) that `qtuning sft` can repeat.
Started again, a comparison goes on with the runs that have no result yet.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from ..cli import EPILOG, FAILED_RUN, exit_on_error
from ..interrupts import SIGNALLED, ended_in_one_line
from ..records.parts import write_whole
from ..records.run import RunRecord
from ..studies.compare import (
    FAILURE_NAME,
    RECIPE_NAME,
    RESULT_NAME,
    ZERO_SHOT,
    Comparison,
    Run,
    load_comparison,
    markdown,
    read_result,
    read_results,
    summarize,
    table_cells,
    to_json,
    write_result,
)

TABLE_NAME = "comparison"
SECONDS_TO_END = 20.0  # for a run that is told to: it may be in the middle of a long computation
EVALUATED = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")


def main(argv: Sequence[str]) -> int:
    """
    `qtuning compare`.

    Returns:
        `int`: 0, or 1 if a run failed or was ended by a signal.

    Raises:
        `ValueError`: If the comparison, or the options of one of its runs, cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="qtuning compare", description=(__doc__ or "").strip().split("\n")[0], epilog=EPILOG
    )
    parser.add_argument("--config", required=True, help="the comparison: a YAML file")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the runs and their estimated cost")
    parser.add_argument("--retry", action="store_true", help="repeat runs that failed")
    arguments = parser.parse_args(argv)
    comparison = load_comparison(arguments.config)
    folder = Path(comparison.output_dir)
    runs = comparison.runs()
    _check_options(comparison, runs)
    for run in runs:
        _refuse_another_result(folder / run.name, comparison, run)
    if arguments.dry_run:
        _print_plan(folder, runs)
        return 0
    for run in runs:
        _write_recipe(folder / run.name, comparison, run)
    context = _process_context()
    for number, run in enumerate(runs, 1):
        _run(context, folder / run.name, run, comparison, f"{number}/{len(runs)}", arguments.retry)
    results = read_results(folder, runs)
    rows = summarize(results)
    _print_table(rows, str(comparison.title))
    (folder / f"{TABLE_NAME}.md").write_text(markdown(rows, str(comparison.title)), encoding="utf-8")
    text = json.dumps(to_json(comparison, results), indent=2)
    (folder / f"{TABLE_NAME}.json").write_text(text + "\n", encoding="utf-8")
    print(f"Written to {folder / TABLE_NAME}.md and .json")
    if len(results) < len(runs):
        print(f"{len(runs) - len(results)} of {len(runs)} runs were ended by a signal: start again to repeat them.")
    return 1 if len(results) < len(runs) or any(row["failures"] for row in rows) else 0


def _recipe(folder: Path, comparison: Comparison, run: Run) -> str:
    """All that a run's result depends on: without `base`, whose files may change, and with what measures it."""
    recipe = {
        **comparison.settings,
        **comparison.options,
        **run.options,
        "seed": run.seed,
        "output_dir": str(folder / "model"),
        "save_strategy": "no",
        "report_to": "none",
    }
    measured = f"# measured by {comparison.accuracy}\n" if comparison.accuracy else ""
    return measured + yaml.safe_dump(recipe, sort_keys=False)


def _refuse_another_result(folder: Path, comparison: Comparison, run: Run) -> None:
    if (folder / RESULT_NAME).is_file() and _written(folder) != _recipe(folder, comparison, run):
        raise ValueError(
            f"`output_dir` is {comparison.output_dir!r}, where {run.name} has a result of other options, of another "
            "recipe or of another `accuracy`: give another `output_dir`, or remove that folder."
        )


def _write_recipe(folder: Path, comparison: Comparison, run: Run) -> None:
    text = _recipe(folder, comparison, run)
    if _written(folder) != text:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE_NAME).unlink(missing_ok=True)  # of other options
        write_whole(folder / RECIPE_NAME, text)


def _written(folder: Path) -> str | None:
    path = folder / RECIPE_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _check_options(comparison: Comparison, runs: list[Run]) -> None:
    """Parse every run's recipe, and find the function that measures accuracy, before the first one starts."""
    from .sft import parse

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, RECIPE_NAME)
        for run in runs:
            path.write_text(_recipe(path.parent, comparison, run), encoding="utf-8")
            parse(["--config", str(path)], prog="qtuning compare")
    if comparison.accuracy:
        _accuracy_function(comparison.accuracy)


def _accuracy_function(name: str) -> Callable[[Any], float | dict[str, float]]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`accuracy` is {name!r}, which cannot be loaded ({error}): give it as 'module:function', with the module "
            "on `PYTHONPATH`."
        ) from error


def _print_plan(folder: Path, runs: list[Run]) -> None:
    results = read_results(folder, runs)
    seconds = [results[run]["seconds"] / run.cost for run in results if run.cost and "seconds" in results[run]]
    table = Table(title=f"{len(runs)} runs, {len(results)} finished")
    for heading in ("run", "estimated cost", "state"):
        table.add_column(heading)
    for run in runs:
        state = "failed" if "failure" in results.get(run, {}) else "finished" if run in results else "to do"
        table.add_row(f"{run.pruner} {run.budget} seed {run.seed}", f"{run.cost:.2f}", state)
    Console().print(table)
    left = sum(run.cost for run in runs if run not in results)
    text = f"To do: as much as {left:.1f} runs on the full data"
    if seconds:
        text += f", about {left * sum(seconds) / len(seconds) / 60:.0f} minutes by the runs that are finished"
    print(text + ".")


def _process_context() -> Any:
    """
    How the runs' processes start. Where there is no GPU, a server that has imported everything forks them, since
    importing takes longer than a small run; CUDA survives no fork.
    """
    import torch

    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtuning_trl.scripts.sft", "qtuning_trl.trainer"])
    return context


def _run(context: Any, folder: Path, run: Run, comparison: Comparison, place: str, retry: bool) -> None:
    failure = folder / FAILURE_NAME
    if read_result(folder) is not None or (failure.is_file() and not retry):
        return
    failure.unlink(missing_ok=True)
    print(f"[{place}] {run.pruner} {run.budget} seed {run.seed}", flush=True)
    process = context.Process(target=_run_here, args=(folder, run.pruner, comparison.accuracy))
    try:
        process.start()
        process.join()
    finally:
        if process.pid is not None:
            _end(process)
    status = process.exitcode or 0
    if status < 0 or status > SIGNALLED:
        # Killed from outside, as by Ctrl-C or for want of memory: no verdict on the run, which is repeated next time.
        print(f"  ended by signal {-status if status < 0 else status - SIGNALLED}; see {folder / 'log.txt'}")
    elif status:
        lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        reason = next((line for line in reversed(lines) if "error:" in line.lower()), lines[-1] if lines else "")
        failure.write_text(reason + "\n", encoding="utf-8")
        print(f"  failed: {reason}")


def _end(process: Any) -> None:
    """End the process of a run, if it is still there: this one has been told to stop (Ctrl-C, SIGTERM)."""
    process.terminate()
    process.join(SECONDS_TO_END)
    process.kill()


def _run_here(folder: Path, pruner: str, accuracy: str | None) -> None:
    """What the process of one run does: everything it prints goes into its log."""
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with ended_in_one_line(), exit_on_error(FAILED_RUN):
        write_result(folder, train_and_measure(folder, pruner, accuracy))


def _end_with_parent() -> None:
    """End this process when the comparison is gone, were it by SIGKILL: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    headings, cells = table_cells(rows)
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pruner" else "right")
    for line in cells:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for row in rows:
        for failure in row["failures"]:
            console.print(f"{row['pruner']} {row['budget']}, {failure}", markup=False)


class Curve(TrainerCallback):
    """
    The clocks of a run without its evaluations, and what each of these found.

    Args:
        record (`Callable`): Returns the run's counts.
    """

    def __init__(self, record: Callable[[], RunRecord]):
        self.record = record
        self.points: list[dict[str, float]] = []
        # Of this process; other work on the machine stretches the first and not the second.
        self.seconds = self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._since = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self._stop()
        self._since = time.perf_counter(), time.process_time()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._since is None:  # after training
            return
        self._since = time.perf_counter(), time.process_time()
        point = {"step": state.global_step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        point["tokens"] = self.record().totals["counts"]["kept_answer_tokens"]
        self.points.append(point | {name: value for name, value in (metrics or {}).items() if name in EVALUATED})

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since[0]
            self.cpu_seconds += time.process_time() - self._since[1]
            self._since = None


def train_and_measure(folder: Path, pruner: str, accuracy: str | None) -> dict[str, Any]:
    """
    Train by a run's recipe (not for zero-shot), and measure.

    Returns:
        `dict`: `eval_loss` (nats a token), `accuracy` if a function measures it, `figures` (whatever else it gives, and
        the evaluation's entropy), `kept_samples` and `kept_tokens` (shares of the candidates), `seconds` and
        `cpu_seconds` (of this process, which other work on the machine does not stretch), both without evaluation,
        `curve` (where `eval_strategy` asks for evaluations while training), `seconds_selecting`, `peak_bytes`, `steps`,
        `groups` (counts by `group_column`), `quadrants`, `filled` (by quadrant), `versions`.
    """
    from .sft import build_trainer, parse

    script_args, training_args, model_args, dataset_args = parse(["--config", str(folder / RECIPE_NAME)]).dataclasses
    trainer = build_trainer(script_args, training_args, model_args, dataset_args, with_eval=True)
    curve = Curve(lambda: trainer.run_record)
    trainer.add_callback(curve)
    if pruner != ZERO_SHOT:
        trainer.train()
    summary, evaluated = trainer.summary(), trainer.evaluate()
    figures = {name: value for name, value in evaluated.items() if name in EVALUATED}
    if accuracy:
        measured = _accuracy_function(accuracy)(trainer)
        figures |= measured if isinstance(measured, dict) else {"accuracy": measured}
    return {
        "eval_loss": figures.pop("eval_loss"),
        **({"accuracy": figures.pop("accuracy")} if "accuracy" in figures else {}),
        "figures": figures,
        "curve": curve.points,
        "seconds": curve.seconds,
        "cpu_seconds": curve.cpu_seconds,
        "seconds_selecting": sum(summary["seconds"][phase] for phase in ("scoring", "selection", "collation")),
        "kept_samples": summary["sample_ratio_reached"],
        "kept_tokens": summary["answer_tokens"]["ratio_reached"],
        "peak_bytes": summary["peak_memory"]["bytes"],
        "steps": summary["steps"],
        "groups": summary.get("groups"),
        "quadrants": summary["quadrants"],
        "filled": summary["filled_by_quadrant"],
        "versions": summary["versions"],
    }
