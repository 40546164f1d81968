"""
What the cheaper ways of scoring do to the selection and to the outcome, on the demo: held-out accuracy over seeds, and
the share of survivors that exact scoring by the same model in the same step would not have kept.

    python tests/benchmarks/approximations.py --seeds 0 1 2 3 4 --json approximations.json
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

import qtuning_trl
from qtuning_trl import QTuningSFTTrainer, demo
from qtuning_trl.demo.report import accuracy
from qtuning_trl.records.run import versions
from qtuning_trl.scripts.sft import build_trainer, parse

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
ARMS = {
    "exact": [],
    "reuse 2 epochs": ["--score_reuse_epochs", "2"],
    "reuse 50 steps": ["--score_reuse_steps", "50"],
    "half the pool": ["--scored_share", "0.5"],
}


class ComparingTrainer(QTuningSFTTrainer):
    """Scores every pool exactly too, and counts the survivors on which the two disagree."""

    disagreements = 0
    survivors = 0

    def _prune_pool(self, groups, batch_tokens):
        scorer = self.scorer
        own = scorer.cache, scorer.proxy, self.args.scored_share
        scorer.cache, scorer.proxy, self.args.scored_share = None, None, 1.0
        super()._prune_pool(groups, batch_tokens)
        exact = self._kept()
        scorer.cache, scorer.proxy, self.args.scored_share = own
        result = super()._prune_pool(groups, batch_tokens)
        self.survivors += len(self._kept())
        self.disagreements += len(self._kept() - exact)
        return result

    def _kept(self) -> set[int]:
        pool = self.last_pool
        return {sample_id for sample_id, kept in zip(pool["sample_id"], pool["kept"], strict=True) if kept}


def run(arm: list[str], seed: int, compare: bool, budget: str) -> dict[str, float]:
    qtuning_trl.QTuningSFTTrainer = ComparingTrainer if compare else QTuningSFTTrainer  # what `build_trainer` imports
    with tempfile.TemporaryDirectory() as output:
        argv = ["--config", str(RECIPE), "--seed", str(seed), "--output_dir", output, "--budget", budget, *arm]
        trainer = build_trainer(*parse([*argv, "--disable_tqdm", "true", "--logging_strategy", "no"]).dataclasses)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    summary = trainer.summary()
    row = {
        "accuracy": accuracy(trainer.model, trainer.processing_class, demo.load_demo_dataset()["test"]),
        "scored": summary["scored"] / summary["candidates"],
        "stale": summary["stale_scores"] / summary["candidates"],
    }
    if compare:
        row["other_survivors"] = trainer.disagreements / trainer.survivors
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="25x50")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "proxy"], default=list(ARMS))
    parser.add_argument("--proxy", help="folder of a smaller model with the demo's tokenizer, for the arm `proxy`")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    disable_progress_bars()
    arms = {**ARMS, "proxy": ["--scoring_model", str(options.proxy)]}
    rows = []
    for seed in options.seeds:
        for arm in options.arms:
            rows.append({"arm": arm, "seed": seed, **run(arms[arm], seed, arm != "exact", options.budget)})
            print(rows[-1], file=sys.stderr, flush=True)
            if options.json:
                facts = {"budget": options.budget, "versions": versions(), "rows": rows}
                options.json.write_text(json.dumps(facts, indent=2) + "\n")
    table = Table(title=f"demo, {options.budget}, seeds {', '.join(map(str, options.seeds))}")
    for heading in ("arm", "accuracy", "of each seed", "scored", "stale", "other survivors"):
        table.add_column(heading)
    for arm in options.arms:
        mine = [row for row in rows if row["arm"] == arm]
        means = {name: statistics.mean(row[name] for row in mine) for name in mine[0] if name not in ("arm", "seed")}
        table.add_row(
            arm, f"{means['accuracy']:.1%}", " ".join(f"{row['accuracy']:.1%}" for row in mine),
            f"{means['scored']:.1%}", f"{means['stale']:.1%}",
            f"{means['other_survivors']:.1%}" if "other_survivors" in means else "-",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
