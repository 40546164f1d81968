"""What the demo prints at its end: the kinds that were kept, accuracy before and after, seconds, and files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from ..records.run import SUMMARY_NAME, THRESHOLDS
from ..report.plots import plot_eu_plane
from .arithmetic import KINDS, final_answer, operands, right_answer, worked_sum

if TYPE_CHECKING:
    from datasets import Dataset

    from ..trainer import QTuningSFTTrainer

PLOT_NAME = "eu_plane.png"
POOLS_KEPT = 8
SPARE_TOKENS = 5  # that an answer may have more than the longest right one


def accuracy(
    model: Any,
    tokenizer: Any,
    dataset: "Dataset",
    batch_size: int = 100,
) -> float:
    """
    Share of problems whose final answer is right, by greedy generation; the steps do not count.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, with or without an adapter; its mode is restored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        dataset ([`~datasets.Dataset`]): With prompts such as `"247+385="` in the column `prompt`.
        batch_size (`int`): Problems in one batch of generation.

    Returns:
        `float`: From 0 to 1.

    Raises:
        `ValueError`: If the dataset is empty.
    """
    prompts = list(dataset["prompt"])
    if not prompts:
        raise ValueError("The dataset has no problem to measure accuracy on: give at least one row.")
    right_texts = [worked_sum(*operands(prompt)) for prompt in prompts]
    max_new_tokens = max(map(len, tokenizer(right_texts)["input_ids"])) + 1 + SPARE_TOKENS
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
            )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            final_answer(answer) == right_answer(prompt) for prompt, answer in zip(batch, answers, strict=True)
        )
    model.train(was_training)
    return right / len(prompts)


def held_out_accuracy(trainer: "QTuningSFTTrainer") -> float:
    """Accuracy of a trainer's model on the problems of its test split; `accuracy` of a comparison can name it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return accuracy(model, trainer.processing_class, trainer.eval_dataset)


class PoolCollector(TrainerCallback):
    """Keeps the pools of the last `POOLS_KEPT` steps of the trainer."""

    def __init__(self, trainer: "QTuningSFTTrainer"):
        self.trainer = trainer
        self.pools: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.last_pool is not None:
            self.pools = [*self.pools, self.trainer.last_pool][-POOLS_KEPT:]

    def pool(self) -> dict[str, Any] | None:
        """The pools together, with the mean of their thresholds; `None` if no step selected."""
        if not self.pools:
            return None
        columns = [name for name in self.pools[0] if name != "thresholds"]
        together: dict[str, Any] = {name: [value for pool in self.pools for value in pool[name]] for name in columns}
        together["thresholds"] = {
            name: sum(pool["thresholds"][name] for pool in self.pools) / len(self.pools) for name in THRESHOLDS
        }
        return together


class DemoReport:
    """
    The demo's report: made before training, since it measures the accuracy to start from, and finished after it.

    Args:
        trainer ([`QTuningSFTTrainer`]): The trainer, with `group_column="kind"`; gets a [`PoolCollector`].
        test_dataset ([`~datasets.Dataset`]): Clean held-out problems.
    """

    def __init__(self, trainer: "QTuningSFTTrainer", test_dataset: "Dataset"):
        self.trainer = trainer
        self.test_dataset = test_dataset
        self.accuracy_before = self._accuracy()
        self.collector = PoolCollector(trainer)
        trainer.add_callback(self.collector)

    def _accuracy(self) -> float:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return accuracy(model, self.trainer.processing_class, self.test_dataset)

    def finish(self, output_dir: str | Path) -> None:
        """Measure accuracy again, print the report, and write the figure into the output directory."""
        print_report(self.trainer, self.collector, self.accuracy_before, self._accuracy(), output_dir)


def print_report(
    trainer: "QTuningSFTTrainer",
    collector: PoolCollector,
    accuracy_before: float,
    accuracy_after: float,
    output_dir: str | Path,
) -> None:
    """
    Print what was kept of each planted kind, accuracy before and after, seconds, and where the files lie.

    Args:
        trainer ([`QTuningSFTTrainer`]): The trainer, after training.
        collector ([`PoolCollector`]): The pools of its last steps; drawn into `eu_plane.png`.
        accuracy_before, accuracy_after (`float`): Shares of right answers, from 0 to 1.
        output_dir (`str` or `Path`): Folder of the run.
    """
    summary = trainer.summary()
    console = Console(highlight=False)
    console.print()
    console.print(_kinds_table(summary["groups"]))
    console.print(_facts_table(summary["seconds"], accuracy_before, accuracy_after))
    for name, place in (
        ("adapter", Path(output_dir)),
        ("summary", Path(output_dir, SUMMARY_NAME)),
        ("EU plane", _write_plot(collector, Path(output_dir))),
    ):
        # `soft_wrap`, so that a path is never broken and can be copied.
        console.print(f"{name:<9} {place}", soft_wrap=True, markup=False)


def _write_plot(collector: PoolCollector, output_dir: Path) -> Path | str:
    """Path of the figure; or why there is none, since a run must not fail at its end for want of one."""
    pool = collector.pool()
    if pool is None:
        return "not drawn: no step selected"
    try:
        figure = plot_eu_plane(pool, color_by="group")
    except ImportError as error:
        return f"not drawn: {error}"
    output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_dir / PLOT_NAME, dpi=150)
    return output_dir / PLOT_NAME


def _kinds_table(groups: dict[str, dict[str, int]]) -> Table:
    """One row a kind: its share of the candidates, its share of the survivors, and what part of it survived."""
    table = Table(title="What was kept, over all steps", title_justify="left")
    table.add_column("kind")
    for name in ("share of the pool", "share of the survivors", "kept"):
        table.add_column(name, justify="right")
    candidates = sum(counts["candidates"] for counts in groups.values())
    kept = sum(counts["kept"] for counts in groups.values())
    known = [kind for kind in KINDS if kind in groups]
    for kind in [*known, *sorted(set(groups) - set(known))]:
        counts = groups[kind]
        shares = (counts["candidates"] / candidates, counts["kept"] / max(kept, 1))
        rate = counts["kept"] / max(counts["candidates"], 1)
        table.add_row(kind, *(f"{share:.1%}" for share in (*shares, rate)))
    return table


def _facts_table(seconds: dict[str, float], accuracy_before: float, accuracy_after: float) -> Table:
    """Accuracy before and after, and the seconds of each phase."""
    selecting = sum(seconds[phase] for phase in ("scoring", "selection", "collation"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("accuracy on clean held-out problems", f"{accuracy_before:.1%} before, {accuracy_after:.1%} after")
    table.add_row(
        "seconds selecting",
        f"{selecting:.1f} (scoring {seconds['scoring']:.1f}, selection {seconds['selection']:.1f}, "
        f"collation {seconds['collation']:.1f})",
    )
    table.add_row("seconds training", f"{seconds['training']:.1f}")
    return table
