"""What a terminal is shown: one short line a log, and what was kept when a run ends. Trackers get every figure."""

import os
from shlex import quote
from typing import Any

WIDTH = 100
PREFIX = "qtuning/"


def log_line(logs: dict[str, Any], step: int, steps: int) -> str:
    """
    A log in at most 100 columns; `log_history` and the trackers hold the rest.

    Args:
        logs (`dict`): What was logged: of training, of an evaluation, of the end of a run, or anything else.
        step (`int`): Optimizer steps done.
        steps (`int`): Optimizer steps of the run.
    """
    parts = [f"step {step}/{steps}"]
    if "loss" in logs:
        parts += [f"loss {_short(logs['loss'])}", f"lr {_short(logs.get('learning_rate'))}", *_kept(logs)]
    elif any(key.startswith("eval_") for key in logs):
        names = {"eval_loss": "loss", "eval_mean_token_accuracy": "token accuracy", "eval_runtime": "seconds"}
        parts += ["evaluation", *(f"{name} {_short(logs[key])}" for key, name in names.items() if key in logs)]
    elif "train_runtime" in logs:
        parts += ["done", f"mean loss {_short(logs.get('train_loss'))}", f"in {_time(logs['train_runtime'])}"]
    else:
        parts += [f"{key} {_short(value)}" for key, value in logs.items() if key not in ("epoch", "total_flos")]
    line = "  ".join(parts)
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _kept(logs: dict[str, Any]) -> list[str]:
    if f"{PREFIX}kept_samples" not in logs:
        return []
    kept, pool, tokens, of = (
        logs.get(f"{PREFIX}{name}", 0.0)
        for name in ("kept_samples", "pool_samples", "kept_answer_tokens", "pool_answer_tokens")
    )
    selecting, training = (logs.get(f"{PREFIX}seconds_{name}", 0.0) for name in ("selecting", "training"))
    return [
        f"kept {kept:.0f}/{pool:.0f}",
        f"tokens {tokens / max(of, 1):.0%}",
        f"{selecting + training:.2g} s a step, selecting {selecting / max(selecting + training, 1e-9):.0%}",
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def closing_lines(summary: dict[str, Any], output_dir: str, adapter: bool, recorded: bool, summary_name: str) -> str:
    """
    What a run says at its end: what was kept, in which time, where it lies, and what can be done with it.

    Args:
        summary (`dict`): That of the run, as `qtuning_summary.json` holds it.
        output_dir (`str`): Folder of the run.
        adapter (`bool`): Whether it holds an adapter and not a whole model.
        recorded (`bool`): Whether it has a record, which a report is made from.
        summary_name (`str`): Name of the summary's file in it.
    """
    tokens, seconds = summary["answer_tokens"], summary["seconds"]
    share = 1 - seconds["training"] / max(seconds["total"], 1e-9)
    done = [
        f"Trained on {summary['kept']:,} of {summary['candidates']:,} samples and {tokens['kept']:,} of "
        f"{tokens['candidates']:,} answer tokens ({_share(tokens)}),",
        f"in {summary['steps']:,} steps and {_time(seconds['total'])}, {share:.0%} of it to select.",
        f"{'Adapter' if adapter else 'Model'} saved to {output_dir}; "
        f"what was kept: {os.path.join(output_dir, summary_name)}",
        "Next:",
        *([f"  qtuning report {quote(output_dir)}"] if recorded else []),
        f"  qtuning eval {'--adapter' if adapter else '--model'} {quote(output_dir)}",
    ]
    if adapter:
        done.append(f"  qtuning merge {quote(output_dir)}  (for vLLM, Ollama and others: docs/from_file_to_model.md)")
    return "\n".join(done)


def _share(counts: dict[str, int]) -> str:
    return f"{counts['kept'] / max(counts['candidates'], 1):.1%}"
