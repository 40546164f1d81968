"""What `qtuning eval` reports: the paper's tasks and the metric of each, their averages, and the table of a run."""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE, ADAPTER, MODEL = "base", "adapter", "model"
RECORD_NAME = "eval"


@dataclass(frozen=True)
class PaperTask:
    """
    A task of the paper, and what stands for it in lm-eval or among our own (docs/evaluation.md says why).

    Args:
        name (`str`): Its name in the paper.
        task (`str`): Its name in lm-eval, a task or a group of tasks.
        metric (`str`): lm-eval's name of the metric and of the filter that extracts the answer.
        groups (`tuple[str, ...]`): The paper's averages that it is part of.
        scale (`float`): What makes lm-eval's figure a share from 0 to 1.
        counted (`Callable`, *optional*): Whether the metric is about a document. If `None`, about all.
    """

    name: str
    task: str
    metric: str
    groups: tuple[str, ...]
    scale: float = 1.0
    counted: Callable[[Mapping[str, Any]], bool] | None = None


ALIGNMENT, REASONING = "alignment", "reasoning"
PAPER_TASKS = (
    PaperTask("ARC-Easy", "arc_easy", "acc_norm,none", (ALIGNMENT,)),
    PaperTask("ARC-Challenge", "arc_challenge", "acc_norm,none", (ALIGNMENT,)),
    PaperTask("GSM8K", "gsm8k", "exact_match,flexible-extract", (ALIGNMENT, REASONING)),
    # Only the questions that have an answer: lm-eval never counts an abstention as right (its issue #3212).
    PaperTask(
        "SQuAD", "squadv2", "HasAns_exact,none", (ALIGNMENT,), 0.01, lambda document: bool(document["answers"]["text"])
    ),
    PaperTask("TriviaQA", "triviaqa", "exact_match,remove_whitespace", (ALIGNMENT,)),
    PaperTask("MATH", "minerva_math", "math_verify,none", (REASONING,)),
)
# The same as OpenCompass put them to the authors' models; the task files are in `paper_tasks/`.
PAPER_PROTOCOL = (
    PaperTask("ARC-Easy", "paper_arc_easy", "acc,none", (ALIGNMENT,)),
    PaperTask("ARC-Challenge", "paper_arc_challenge", "acc,none", (ALIGNMENT,)),
    PaperTask("GSM8K", "paper_gsm8k", "exact_match,none", (ALIGNMENT, REASONING)),
    PaperTask("SQuAD", "paper_squad", "exact_match,none", (ALIGNMENT,)),
    PaperTask("TriviaQA", "paper_triviaqa", "contains_alias,none", (ALIGNMENT,)),
    PaperTask("MATH", "paper_math", "exact_match,none", (REASONING,)),
)
PROTOCOLS = {"lm-eval": PAPER_TASKS, "paper": PAPER_PROTOCOL}
BY_TASK = {paper.task: paper for papers in PROTOCOLS.values() for paper in papers}


# The record


def chosen_metric(task: str, metrics: Mapping[str, Any]) -> str:
    """The metric that is shown, as `name,filter`: the paper task's own, otherwise the first that the task gives."""
    paper = BY_TASK.get(task)
    if paper is not None and paper.metric in metrics:
        return paper.metric
    return next(name for name in metrics if "," in name and "_stderr," not in name)


def task_row(
    task: str, leaves: Sequence[str], columns: Mapping[str, Mapping[str, Any]], limit: int | None
) -> dict[str, Any]:
    """
    What the record says of one task or group of tasks.

    Args:
        task (`str`): Its name in lm-eval.
        leaves (`Sequence[str]`): The tasks of the group; of a task, itself.
        columns (`Mapping[str, Mapping]`): For each model, what `lm_eval.simple_evaluate` returned, samples included.
        limit (`int` or `None`): Samples asked for in each task; `None` for all.

    Returns:
        `dict`: `task`, `paper_name`, `metric`, `filter`, `num_fewshot`, `samples`, `prompt`, `version`,
        `config_hash` (SHA-256), and for each model the value, its standard error and `samples_hash`.
    """
    first = next(iter(columns.values()))
    metric = chosen_metric(task, first["results"][task])
    name, filter_name = metric.split(",", 1)
    paper = BY_TASK.get(task)
    is_paper_metric = paper is not None and metric == paper.metric
    scale = paper.scale if paper is not None and is_paper_metric else 1.0
    samples = [sample for leaf in leaves for sample in first["samples"][leaf] if sample["filter"] == filter_name]
    counted = samples
    if paper is not None and is_paper_metric and paper.counted is not None:
        counted = [sample for sample in samples if paper.counted(sample["doc"])]
    sizes = [first["n-samples"][leaf]["original"] for leaf in leaves]
    results = {}
    for column, result in columns.items():
        metrics = result["results"][task]
        value, stderr = metrics[metric], metrics.get(f"{name}_stderr,{filter_name}")
        results[column] = {
            # Of no sample at all lm-eval would say 0.
            "value": float(value) * scale if counted else None,
            "stderr": float(stderr) * scale if isinstance(stderr, (int, float)) else None,
            "all_metrics": {key: _plain(figure) for key, figure in metrics.items() if "," in key},
            # lm-eval's own `task_hashes`: equal if two models, or two runs, saw the same documents and prompts.
            "samples_hash": {leaf: samples_hash(result["samples"][leaf]) for leaf in leaves},
        }
    config = first["configs"][leaves[0]]
    return {
        "task": task,
        "paper_name": paper.name if paper else None,
        "metric": name,
        "filter": filter_name,
        "num_fewshot": first["n-shot"].get(task, first["n-shot"][leaves[0]]),
        "samples": {
            "in_task": sum(sizes),
            "asked_for": sum(min(limit or size, size) for size in sizes),
            "evaluated": len(samples),
            "counted_by_metric": len(counted),
        },
        "prompt": {
            "description": config.get("description", ""),
            "doc_to_text": config.get("doc_to_text"),
            "first_sample": _first_request(samples[0]),
        },
        "version": first["versions"].get(task),
        "config_hash": sha256(
            json.dumps({leaf: _definition(first["configs"][leaf]) for leaf in leaves}, sort_keys=True, default=str)
        ),
        "results": results,
    }


def _first_request(sample: Mapping[str, Any]) -> dict[str, Any]:
    prompt, rest = sample["arguments"][0]
    if isinstance(rest, str):
        return {"prompt": prompt, "continuations": [request[1] for request in sample["arguments"]]}
    return {"prompt": prompt, "generation_kwargs": rest}


def _definition(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's configuration without what belongs to the run: the tokenizer, whose folder is that of the adapter."""
    metadata = {key: value for key, value in config.get("metadata", {}).items() if key != "tokenizer"}
    return {**config, "metadata": metadata}


def _plain(figure: Any) -> Any:
    return float(figure) if isinstance(figure, (int, float)) else str(figure)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def samples_hash(samples: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the documents, prompts and targets of a task, as lm-eval's result files have it."""
    return sha256("".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples))


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    The paper's averages, for the groups of which a task was evaluated.

    An average over only some of its tasks would not be the paper's: then it is `None`, and `missing` says why.
    """
    by_task = {row["task"]: row for row in rows}
    found = []
    for protocol, papers in PROTOCOLS.items():
        for group in (ALIGNMENT, REASONING):
            members = [paper.task for paper in papers if group in paper.groups]
            tasks = [task for task in members if task in by_task]
            if not tasks:
                continue
            missing = [task for task in members if task not in by_task]
            results = {}
            for column in by_task[tasks[0]]["results"]:
                values = [by_task[task]["results"][column]["value"] for task in tasks]
                results[column] = None if missing or None in values else statistics.fmean(values)
            found.append({"group": group, "protocol": protocol, "tasks": tasks, "missing": missing, "results": results})
    return found


# The table


def table_cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table that is shown and written; a change is from base model to adapter."""
    columns = record["columns"]
    headings = ["task", "metric", "few-shot", "samples", *columns]
    if len(columns) == 2:
        headings.append("change")
    cells = []
    for row in record["tasks"]:
        samples = row["samples"]
        label = f"{row['paper_name']} ({row['task']})" if row["paper_name"] else row["task"]
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        count = str(samples["counted_by_metric"])
        if samples["counted_by_metric"] != samples["in_task"]:
            count += f" of {samples['in_task']}"
        values = [row["results"][column]["value"] for column in columns]
        errors = [row["results"][column]["stderr"] for column in columns]
        cells.append([label, metric, str(row["num_fewshot"]), count, *_value_cells(values, errors)])
    for average in record["averages"]:
        values = [average["results"][column] for column in columns]
        label = f"average, {average['group']} ({len(average['tasks'])} tasks)"
        cells.append([label, "", "", "", *_value_cells(values, [None] * len(values))])
    return headings, cells


def _value_cells(values: Sequence[float | None], errors: Sequence[float | None]) -> list[str]:
    cells = []
    for value, error in zip(values, errors, strict=True):
        cells.append("-" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if len(values) == 2:
        base, adapter = values
        cells.append("-" if base is None or adapter is None else f"{adapter - base:+.4f}")
    return cells


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, in sentences."""
    found = ["A value is lm-eval's, with its standard error; shares of right answers are from 0 to 1."]
    if record.get("temperature"):
        found.append(
            f"Replies were sampled at temperature {record['temperature']:g} with the seed {record['seeds']['torch']}."
        )
    for average in record["averages"]:
        if average["missing"]:
            found.append(
                f"No average for {average['group']}: {', '.join(average['missing'])} not evaluated "
                f"(it is over {', '.join(sorted([*average['tasks'], *average['missing']]))})."
            )
    for row in record["tasks"]:
        samples = row["samples"]
        if samples["evaluated"] != samples["in_task"]:
            found.append(
                f"{row['task']}: {samples['evaluated']} of its {samples['in_task']} samples were evaluated, "
                f"{samples['asked_for']} asked for."
            )
        if samples["counted_by_metric"] != samples["evaluated"]:
            found.append(
                f"{row['task']}: {row['metric']} is about {samples['counted_by_metric']} of the "
                f"{samples['evaluated']} samples evaluated."
            )
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """The table as Markdown, with what was evaluated above and the notes below."""
    headings, cells = table_cells(record)
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    lines = ["## qtuning eval", "", f"Model `{record['model']}`"]
    if record["adapter"]:
        lines[-1] += f", adapter `{record['adapter']['path']}`"
    chat = "with the chat template" if record["chat_template"]["applied"] else "without a chat template"
    lines[-1] += f"; prompts {chat}; {record['date']}."
    lines += ["", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    lines += ["", *(f"- {note}" for note in notes(record)), "", versions]
    return "\n".join(lines) + "\n"


def write_record(folder: Path, record: Mapping[str, Any], name: str = RECORD_NAME) -> None:
    """Write `<name>.json`, and the table as `<name>.md`."""
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(record), encoding="utf-8")
