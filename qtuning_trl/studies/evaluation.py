"""Running lm-eval's tasks on a model: what `qtuning eval` does between its options and its record."""

import difflib
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import cause
from .evaluation_record import (
    ALIGNMENT,
    BY_TASK,
    MODEL,
    PAPER_PROTOCOL,
    REASONING,
    averages,
    sha256,
    task_row,
    write_record,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from ..trainer import QTuningSFTTrainer

PAPER_TASK_FILES = Path(__file__).parent / "paper_tasks"

# Tasks


def load_tasks(
    names: Sequence[str], include_path: str | None, tokenizer: str | None = None
) -> tuple["TaskManager", dict[str, dict[str, Any]]]:
    """
    Load the tasks with their data: lm-eval's, those of the paper's protocol, and one's own.

    Args:
        names (`Sequence[str]`): Names of tasks and groups.
        include_path (`str`, *optional*): Folder of task files, which take precedence.
        tokenizer (`str`, *optional*): Name or folder of the tokenizer, for tasks that count tokens.

    Returns:
        `tuple[TaskManager, dict]`: lm-eval's manager of tasks; its `tasks` and `groups` by name.

    Raises:
        `ValueError`: If there is no task of a name, or its data cannot be had.
    """
    from huggingface_hub.utils import logging as hub_logging
    from lm_eval.tasks import TaskManager

    hub_logging.set_verbosity_error()  # it would tell of every attempt to connect
    folders: list[str | Path] = [PAPER_TASK_FILES, *([include_path] if include_path else [])]
    metadata: Any = {"tokenizer": tokenizer} if tokenizer else None
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folders, metadata=metadata)  # takes five seconds
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        remedy = f"do you mean {nearest[0]!r}?" if nearest else "`lm-eval ls tasks` lists lm-eval's."
        raise ValueError(f"`--tasks` has {unknown[0]!r}, which is no task: {remedy}")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name in names:
        try:
            with _quiet("lm_eval.api.task") if name in BY_TASK else nullcontext():
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
        temperature (`float`, *optional*): Replies are sampled at it from the whole vocabulary; with 0.0 they are
            greedy; if `None`, they are what each task says.
        seed (`int`): Seed of the sampling. Another batch size, too, gives other replies.
    """

    batch_size: str = "8"
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    temperature: float | None = None
    seed: int = 1234  # lm-eval's default


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
    generation: dict[str, Any] | None = None
    if options.temperature is not None:
        generation = {"do_sample": False, "temperature": 0.0}
    if options.temperature:
        generation = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    with _quiet("lm_eval.evaluator"):
        return simple_evaluate(
            model=lm,
            tasks=[loaded["groups"].get(row) or loaded["tasks"][row] for row in row_names(loaded)],
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            gen_kwargs=generation,
            torch_random_seed=options.seed,
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
        "temperature": options.temperature,
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

    from ..records.run import versions

    return {**versions(), "lm_eval": version("lm_eval")}


# `accuracy` of a comparison


def paper_reasoning(trainer: "QTuningSFTTrainer") -> float:
    """The paper's average of GSM8K and MATH (Table 2), see [`paper_accuracy`]; `accuracy` of a comparison names it."""
    return paper_accuracy(trainer, [paper.task for paper in PAPER_PROTOCOL if REASONING in paper.groups])


def paper_alignment(trainer: "QTuningSFTTrainer") -> float:
    """The paper's average of five tasks (Table 1), see [`paper_accuracy`]; `accuracy` of a comparison names it."""
    return paper_accuracy(trainer, [paper.task for paper in PAPER_PROTOCOL if ALIGNMENT in paper.groups])


def paper_accuracy(
    trainer: "QTuningSFTTrainer", tasks: Sequence[str], include_path: str | None = None, limit: int | None = None
) -> float:
    """
    Mean share of right answers of a trainer's model on tasks of the paper's protocol, sampled as theirs.

    The tasks are run twice, greedily and sampled at temperature 1 with the run's seed, `per_device_eval_batch_size`
    samples at once. What both gave is written beside the model, as `eval_greedy` and `eval_sampled`, .json and .md.

    Args:
        trainer ([`QTuningSFTTrainer`]): The trainer, before or after training.
        tasks (`Sequence[str]`): Names of tasks.
        include_path (`str`, *optional*): Folder of task files, which take precedence.
        limit (`int`, *optional*): Samples of each task; all of them if `None`.

    Returns:
        `float`: From 0 to 1.

    Raises:
        `ValueError`: If there is no task of a name, or its data cannot be had.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    manager, loaded = load_tasks(tasks, include_path, tokenizer.name_or_path)
    was_training = model.training
    model.eval()
    shares = []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        options = Options(
            str(trainer.args.per_device_eval_batch_size), limit, temperature=temperature, seed=trainer.args.seed
        )
        results = {MODEL: evaluate(model, tokenizer, manager, loaded, options)}
        named = {"model": model.name_or_path, "adapter": None, "tokenizer": tokenizer.name_or_path}
        record = make_record(model, tokenizer, manager, loaded, results, options, named)
        write_record(folder, record, f"eval_{name}")
        shares.append(statistics.fmean(row["results"][MODEL]["value"] for row in record["tasks"]))
    model.train(was_training)
    return shares[-1]
