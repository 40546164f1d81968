"""Running lm-eval's tasks on a model: what `qtuning eval` does between its options and its record."""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .evaluation_model import cause
from .evaluation_record import averages, sha256, task_row

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase


# Tasks


def load_tasks(names: Sequence[str], include_path: str | None) -> tuple["TaskManager", dict[str, dict[str, Any]]]:
    """
    Load the tasks with their data.

    Returns:
        `tuple[TaskManager, dict]`: lm-eval's manager of tasks; its `tasks` and `groups` by name.

    Raises:
        `ValueError`: If there is no task of a name, or its data cannot be had.
    """
    from huggingface_hub.utils import logging as hub_logging
    from lm_eval.tasks import TaskManager

    hub_logging.set_verbosity_error()  # it would tell of every attempt to connect
    manager = None
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            manager = own
    if manager is None:
        manager = TaskManager(include_path=include_path)  # takes five seconds
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        remedy = f"do you mean {nearest[0]!r}?" if nearest else "`lm-eval ls tasks` lists lm-eval's."
        raise ValueError(f"`--tasks` has {unknown[0]!r}, which is no task: {remedy}")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # whatever the libraries below, or a task's own code, may raise
            raise ValueError(
                f"`--tasks` has {name!r}, whose data cannot be loaded ({cause(error)}): lm-eval's tasks fetch theirs "
                "from the Hub, so check the connection; your own task files (`--include_path`) can name local ones."
            ) from error
        loaded["tasks"].update(found["tasks"])
        loaded["groups"].update(found["groups"])
    return manager, loaded


def row_names(loaded: dict[str, dict[str, Any]]) -> list[str]:
    """Tasks, and for those of a group with a figure of its own the outermost group."""
    owner = {}
    for name, group in reversed(list(loaded["groups"].items())):  # outer groups come first
        if group.has_aggregation:
            owner.update(dict.fromkeys((task.task_name for task in group.get_all_tasks()), name))
    return list(dict.fromkeys(owner.get(name, name) for name in loaded["tasks"]))


def task_record(
    row: str,
    manager: "TaskManager",
    loaded: dict[str, dict[str, Any]],
    results: dict[str, dict[str, Any]],
    limit: int | None,
) -> dict[str, Any]:
    """What the record says of a task, with the file that defines it."""
    group = loaded["groups"].get(row)
    leaves = [row] if group is None else [task.task_name for task in group.get_all_tasks()]
    return {**task_row(row, leaves, results, limit), "source": str(manager.task_index[row].yaml_path)}


# The run


@dataclass(frozen=True)
class Options:
    """
    How tasks are run.

    Args:
        batch_size (`str`): Samples at once, or "auto" for what fits.
        limit (`int`, *optional*): Samples of each task; all of them if `None`.
        num_fewshot (`int`, *optional*): Examples in the prompt; what each task says if `None`.
        apply_chat_template (`bool`): Whether the prompts are put in the tokenizer's chat template.
    """

    batch_size: str = "8"
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    manager: "TaskManager",
    loaded: dict[str, dict[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for a model as it is now, samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Warnings about a model that was loaded before, which is what is meant; warnings about prompts stay.
    with _quiet("lm_eval.models.huggingface"):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=options.batch_size)
    with _quiet("lm_eval.evaluator"):
        return simple_evaluate(
            model=lm,
            tasks=[loaded["groups"].get(row) or loaded["tasks"][row] for row in row_names(loaded)],
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings from a logger, for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_record(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    manager: "TaskManager",
    loaded: dict[str, dict[str, Any]],
    results: dict[str, dict[str, Any]],
    options: Options,
    named: dict[str, Any],
) -> dict[str, Any]:
    """
    What `eval.json` says.

    Args:
        model (`PreTrainedModel` or `PeftModel`), tokenizer ([`~transformers.PreTrainedTokenizerBase`]): What ran.
        manager (`TaskManager`), loaded (`dict`): What [`load_tasks`] returned.
        results (`dict`): For each column of the table, what [`evaluate`] returned.
        options ([`Options`]): How the tasks were run.
        named (`dict`): What the caller knows: `model`, `adapter`, `tokenizer` and whatever else it wants to say.

    Returns:
        `dict`: Plain values; docs/evaluation.md describes them.
    """
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        **named,
        "chat_template": {
            "applied": options.apply_chat_template,
            "sha256": sha256(str(tokenizer.get_chat_template())) if options.apply_chat_template else None,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_size": options.batch_size,
        "limit": options.limit,
        **run_facts(next(iter(results.values()))),
        "columns": list(results),
        "tasks": [task_record(row, manager, loaded, results, options.limit) for row in row_names(loaded)],
    }
    record["averages"] = averages(record["tasks"])
    return record


def run_facts(result: dict[str, Any]) -> dict[str, Any]:
    """Seeds and the longest sequence that lm-eval used."""
    config = result["config"]
    seeds = {name: config[f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")}
    return {"seeds": seeds, "max_length": result.get("max_length")}


def package_versions() -> dict[str, str]:
    from importlib.metadata import version

    from .record import versions

    return {**versions(), "lm_eval": version("lm_eval")}
