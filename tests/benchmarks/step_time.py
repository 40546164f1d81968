"""
Seconds per optimizer step and peak memory: plain `SFTTrainer` beside Q-Tuning at three budgets, in one run.

The arms take turns, each on the same candidates and a fresh copy of the same random model; medians over the rounds.

    python tests/benchmarks/step_time.py --json step_time.json
    python tests/benchmarks/step_time.py --accumulation 64 --length 64   # a pool of 512
"""

import argparse
import gc
import json
import os
import platform
import statistics
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
from qtuning_trl.record import synchronize, versions

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
ARMS = ["full", "12.5x50", "25x50", "50x70"]


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


def run_arm(arm: str, options: argparse.Namespace, dataset: Dataset, output: str) -> dict[str, float]:
    """Train `options.steps + 1` optimizer steps; the first is warm-up and counts for the peak alone."""
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
    if arm == "full":
        trainer_class, args = SFTTrainer, SFTConfig(**common)
    else:
        trainer_class, args = (
            QTuningSFTTrainer,
            QTuningSFTConfig(**common, budget=arm, token_pruning=options.token_pruning),
        )
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
    if arm != "full":
        before: dict[str, float] = {}

        class Phases(TrainerCallback):
            def on_step_end(self, *_args, **_kwargs):
                now = dict(trainer.run_record.totals["seconds"])
                phases.append({name: now[name] - before.get(name, 0.0) for name in now})
                before.update(now)

        trainer.add_callback(Phases())
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if memory is None else memory.stop()
    row = {"step": statistics.median(clock.seconds[1:]), "peak_bytes": float(peak)}
    for name in ("scoring", "selection", "collation", "training"):
        row[name] = statistics.median(part[name] for part in phases[1:]) if phases else 0.0
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row; the shortest has half")
    parser.add_argument("--steps", type=int, default=1, help="timed steps an arm and round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=5, help="turns each arm takes")
    parser.add_argument("--token_pruning", choices=["mask", "drop"], default="drop")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    disable_progress_bars()

    dataset = make_dataset(options.batch * options.accumulation * (options.steps + 1), options.length)
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as output:
        for _ in range(options.rounds):
            for arm in ARMS:
                rounds[arm].append(run_arm(arm, options, dataset, output))

    rows = []
    for arm, taken in rounds.items():
        row = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
        # Ratios within a round, since the machine's speed drifts from one round to the next.
        ratios = [full["step"] / one["step"] for full, one in zip(rounds["full"], taken, strict=True)]
        overhead = statistics.median((one["selection"] + one["collation"]) / one["step"] for one in taken)
        rows.append({"arm": arm, **row, "speed_up": statistics.median(ratios), "arithmetic_share": overhead})

    on_gpu = torch.cuda.is_available() and not options.cpu
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{options.model}, pool of {options.batch * options.accumulation}, {device}")
    headings = ["arm", "s/step", "speed-up", "scoring", "selection", "collation", "training", "sel.+coll.", "peak GiB"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in rows:
        seconds = [f"{row[name]:.4f}" for name in ("scoring", "selection", "collation", "training")]
        if row["arm"] == "full":
            seconds = ["-"] * 4
        table.add_row(
            row["arm"], f"{row['step']:.3f}", f"{row['speed_up']:.2f}x", *seconds,
            f"{row['arithmetic_share']:.2%}", f"{row['peak_bytes'] / 2**30:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        facts = {"device": device, "versions": versions(), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
