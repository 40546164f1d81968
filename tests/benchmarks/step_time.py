"""
Seconds per optimizer step and peak memory: plain `SFTTrainer` beside Q-Tuning, in one run.

The arms take turns, each on the same candidates and a fresh copy of the same random model; medians over the rounds,
ratios within a round. `ARMS` says what each arm is.

    python tests/benchmarks/step_time.py --json step_time.json
    python tests/benchmarks/step_time.py --accumulation 64 --length 64   # a pool of 512
    python tests/benchmarks/step_time.py --arms full lean "12.5x50" --model smollm2-135m --no-gradient_checkpointing
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.record import PHASES, StepCounts, synchronize, versions

VOCABULARY = 49152
MODELS = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "smollm2-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
}
KEY_VALUE_HEADS = {"small": 2, "smollm2-135m": 3, "smollm2-1.7b": 32}
ARMS = {
    "full": "plain SFTTrainer as TRL ships it",
    "lean": "all candidates, without scoring, by our collation and our labelled-positions head",
    "bfd": "SFTTrainer with bfd packing, all candidates",
    "random 12.5": "SFTTrainer on a random eighth of the candidates",
    "100x100": "QTuningSFTTrainer that keeps everything",
    "12.5x50": "Q-Tuning",
    "25x50": "Q-Tuning",
    "50x70": "Q-Tuning",
    "12.5x50 mask": "Q-Tuning, pruned tokens masked instead of dropped",
    "12.5x50 small": "Q-Tuning, micro_batches: small (low peak memory)",
    "12.5x50 small rowwise": "the same, scored row by row: whether scoring sets the peak",
    "12.5x50 free": "Q-Tuning, survivor_checkpointing: false",
    "25x50 free": "Q-Tuning, survivor_checkpointing: false",
    "50x70 free": "Q-Tuning, survivor_checkpointing: false",
    "12.5x50 amortised": "Q-Tuning, score_reuse_epochs: 3, mean over three epochs",
    "12.5x50 half": "Q-Tuning, scored_share: 0.5",
}
OPTIONS = {
    "mask": {"token_pruning": "mask"},
    "small": {"micro_batches": "small"},
    "small rowwise": {"micro_batches": "small", "scoring_batch_tokens": 1},
    "free": {"survivor_checkpointing": False},
    "amortised": {"score_reuse_epochs": 3},
    "half": {"scored_share": 0.5},
}
DEFAULT_ARMS = ["full", "lean", "12.5x50", "25x50", "50x70"]


class PeakMemory(threading.Thread):
    """Peak of this process's resident memory while it runs, in bytes above that at its start (CPU)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self._resident()
        self.peak = 0
        self.running = True

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def run(self):
        while self.running:
            self.peak = max(self.peak, self._resident() - self.start_bytes)
            time.sleep(0.002)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.peak


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before; the first has warm-up in it."""

    def __init__(self):
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *_args, **_kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs):
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_dataset(rows: int, length: int) -> Dataset:
    """Rows of `length / 2` to `length` tokens, prompt and answer about equal."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(rows):
        size = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
    return Dataset.from_list(examples)


def make_model(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=KEY_VALUE_HEADS[name], tie_word_embeddings=True,
        max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=1, **MODELS[name],
    )  # fmt: skip
    return LlamaForCausalLM(config)


class LeanSFTTrainer(QTuningSFTTrainer):
    """Trains on every candidate by our collation and head, without scoring, so that only pruning differs."""

    def _prune_pool(self, groups, batch_tokens):
        return [document for group in groups for document in group], StepCounts(scored=False)


def step_seconds(seconds: list[float], epochs: int) -> float:
    """Seconds of a step, the first left out: their median, or the mean over epochs of the mean of each."""
    if epochs == 1:
        return statistics.median(seconds[1:])
    steps = len(seconds) // epochs
    return statistics.mean(
        statistics.mean(seconds[max(1, start) : start + steps]) for start in range(0, len(seconds), steps)
    )


def run_arm(arm: str, options: argparse.Namespace, dataset: Dataset, output: str) -> dict[str, float]:
    """Train `options.steps + 1` optimizer steps; the first is warm-up and counts for the peak alone."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that the next arm's memory is not what the last one left behind
    on_gpu = torch.cuda.is_available() and not options.cpu
    common = {
        "output_dir": output,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_checkpointing": options.gradient_checkpointing,
        "max_steps": options.steps + 1,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    budget, _, variant = arm.partition(" ")
    epochs = 3 if variant == "amortised" else 1
    if epochs > 1:
        common |= {"max_steps": -1, "num_train_epochs": epochs}
    if arm in ("full", "bfd", "random 12.5"):
        trainer_class, config_class, own = SFTTrainer, SFTConfig, {}
        if arm == "bfd":
            # A packed row holds as many tokens as a micro-batch of the others, padding left out.
            own = {"packing": True, "max_length": options.batch * options.length * 3 // 4, "dataset_kwargs": None}
            own["per_device_train_batch_size"] = 1
        elif arm == "random 12.5":
            kept = max(1, options.batch * options.accumulation // 8)
            own = {"per_device_train_batch_size": min(kept, options.batch)}
            own["gradient_accumulation_steps"] = -(-kept // options.batch)
            dataset = dataset.shuffle(seed=0).select(range(kept * (options.steps + 1)))
    else:
        trainer_class, config_class = QTuningSFTTrainer, QTuningSFTConfig
        own = {"token_pruning": options.token_pruning, **OPTIONS.get(variant, {})}
        own["budget"] = "50x50" if arm == "lean" else budget
        if arm == "lean":
            trainer_class = LeanSFTTrainer
    args = config_class(**{**common, **own})
    clock = StepClock()
    trainer = trainer_class(
        make_model(options.model),
        args,
        train_dataset=dataset,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    memory = None if on_gpu else PeakMemory()
    if memory is None:
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.start()
    phases: list[dict[str, float]] = []
    if isinstance(trainer, QTuningSFTTrainer):
        before: dict[str, float] = {}

        class Phases(TrainerCallback):
            def on_step_end(self, *_args, **_kwargs):
                now = dict(trainer.run_record.totals["seconds"])
                phases.append({name: now[name] - before.get(name, 0.0) for name in now})
                before.update(now)

        trainer.add_callback(Phases())
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if memory is None else memory.stop()
    row = {"step": step_seconds(clock.seconds, epochs), "peak_bytes": float(peak)}
    for name in PHASES:
        row[name] = step_seconds([part[name] for part in phases], epochs) if phases else 0.0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row; the shortest has half")
    parser.add_argument("--steps", type=int, default=1, help="timed steps an arm and round, after one to warm up")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS, metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns each arm takes")
    parser.add_argument("--token_pruning", choices=["mask", "drop"], default="drop")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    disable_progress_bars()

    dataset = make_dataset(options.batch * options.accumulation * (options.steps + 1), options.length)
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    with tempfile.TemporaryDirectory() as output:
        for _ in range(options.rounds):
            for arm in options.arms:
                rounds[arm].append(run_arm(arm, options, dataset, output))
                print(f"{arm}: {rounds[arm][-1]['step']:.3f} s", file=sys.stderr, flush=True)

    rows = []
    for arm, taken in rounds.items():
        row = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
        # Ratios within a round, since the machine's speed drifts from one round to the next.
        for base in ("full", "lean"):
            if base in rounds:
                ratios = [other["step"] / one["step"] for other, one in zip(rounds[base], taken, strict=True)]
                row[f"against_{base}"] = statistics.median(ratios)
                row[f"against_{base}_range"] = [min(ratios), max(ratios)]
        row["arithmetic_share"] = statistics.median(
            (one["selection"] + one["collation"]) / one["step"] for one in taken
        )
        rows.append({"arm": arm, **row})

    on_gpu = torch.cuda.is_available() and not options.cpu
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    checkpointing = "with" if options.gradient_checkpointing else "without"
    pool = options.batch * options.accumulation
    table = Table(title=f"{options.model}, pool of {pool}, {checkpointing} gradient checkpointing, {device}")
    headings = [
        "arm",
        "s/step",
        "x full",
        "x lean",
        "scoring",
        "selection",
        "collation",
        "training",
        "sel.+coll.",
        "peak GiB",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in rows:
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("against_full", "against_lean")]
        phases = [f"{row[name]:.4f}" if row["training"] else "-" for name in PHASES]
        table.add_row(
            row["arm"], f"{row['step']:.3f}", *ratios, *phases,
            f"{row['arithmetic_share']:.2%}", f"{row['peak_bytes'] / 2**30:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        facts = {"device": device, "versions": versions(), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
