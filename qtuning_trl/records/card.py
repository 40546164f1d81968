"""The model card: what it cites, and the facts of the run's summary."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .run import PHASES, SUMMARY_NAME

PAPER = {
    "title": "Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for Efficient "
    "Supervised Fine-Tuning",
    "id": "2509.23873",
    "citation": (
        "@article{wang2025qtuning,\n"
        "    title  = {{Winning the Pruning Gamble: A Unified Approach to Joint Sample and Token Pruning for "
        "Efficient Supervised Fine-Tuning}},\n"
        "    author = {Shaobo Wang and Jiaming Wang and Jiajun Zhang and Cong Wang and Yue Min and Zichen Wen and "
        "Xingzhang Ren and Fei Huang and Huiqiang Jiang and Junyang Lin and Dayiheng Liu and Linfeng Zhang},\n"
        "    year   = 2025,\n"
        "    eprint = {arXiv:2509.23873},\n"
        "}"
    ),
}


def model_card_section(summary: dict[str, Any]) -> str:
    """The facts of `qtuning_summary.json` as a Markdown section of the model card."""
    config, tokens, seconds = summary["config"], summary["answer_tokens"], summary["seconds"]
    selecting = sum(seconds[phase] for phase in PHASES if phase != "training")
    quadrants = ", ".join(f"{name.upper()} {summary['quadrants'][name]:,}" for name in ("q1", "q2", "q3", "q4"))
    filled = ", ".join(
        f"{count:,} from {name if name == 'between' else name.upper()}"
        for name, count in summary["filled_by_quadrant"].items()
        if count
    )
    rows = {
        "Pruners (samples, tokens)": f"{config['sample_pruner']}, {config['token_pruner']}",
        "Budget (samples x tokens)": f"{config['sample_ratio']:.4g} x {config['token_ratio']:.4g}",
        "Share of the samples, asked / reached": _shares(summary["shares"]["samples"]),
        "Share of the answer tokens, asked / reached": _shares(summary["shares"]["answer_tokens"]),
        "Candidates seen": f"{summary['candidates']:,} samples, {tokens['candidates']:,} answer tokens",
        "Trained on": f"{summary['kept']:,} samples, {tokens['kept']:,} answer tokens",
        "Quadrants of the candidates": f"{quadrants}, between the thresholds {summary['quadrants']['between']:,}",
        "Kept to fill the budget": f"{summary['filled']:,} samples" + (f" ({filled})" if filled else ""),
        "Optimizer steps": f"{summary['steps']:,}",
        "Time selecting / training": f"{selecting:.1f} s / {seconds['training']:.1f} s",
        "Peak memory": f"{summary['peak_memory']['bytes'] / 2**30:.2f} GiB ({summary['peak_memory']['device']})",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"\n## Q-Tuning\n\n| | |\n|---|---|\n{table}\n\nAll totals are in `{SUMMARY_NAME}`.\n"


def _shares(shares: dict[str, float | None]) -> str:
    return " / ".join("-" if share is None else f"{share:.2%}" for share in (shares["asked"], shares["reached"]))


def add_facts(path: Path, summary: dict[str, Any]) -> None:
    """Put the facts of a run's summary into the model card that TRL wrote."""
    card = ModelCard.load(path)
    head, separator, tail = card.text.partition("### Framework versions")
    card.text = head + model_card_section(summary).lstrip() + "\n" + separator + tail
    card.save(path)
