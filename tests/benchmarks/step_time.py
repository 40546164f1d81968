"""
Seconds per optimizer step and peak memory: plain `SFTTrainer` beside Q-Tuning, in one run.

The arms take turns, each on the same candidates and a fresh copy of the same random model; medians over the rounds,
ratios within a round. `ARMS` says what each arm is.

    python tests/benchmarks/step_time.py --json step_time.json
    python tests/benchmarks/step_time.py --accumulation 64 --length 64   # a pool of 512
    python tests/benchmarks/step_time.py --arms full lean "12.5x50" --model smollm2-135m --no-gradient_checkpointing
    python tests/benchmarks/step_time.py --arms lean "12.5x50" "12.5x50 auto" --weights MODEL --data gsm8k.jsonl

`predicted` is what `qtuning plan` says of the ratio to `lean`. `--cpu_seconds` counts the seconds of the processor, on
a machine that others use too.

On a GPU models are in bfloat16, and `of rate` is the share of the card's matrix rate that scoring reaches:

    python tests/benchmarks/step_time.py --model smollm2-1.7b --batch 4 --accumulation 4 --length 2048 --json a.json
    python tests/benchmarks/step_time.py --model llama-3.1-8b --nf4 --batch 1 --accumulation 16 --length 2048 \\
        --cap_gib 12
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
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from predicted import Predictor
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.records.run import PHASES, StepCounts, synchronize, versions

VOCABULARY = 49152
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "smollm2-1.7b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
ARMS = {
    "full": "plain SFTTrainer as TRL ships it",
    "lean": "all candidates, without scoring, by our collation and our labelled-positions head",
    "bfd": "SFTTrainer with bfd packing, all candidates",
    "random 12.5": "SFTTrainer on a random eighth of the candidates",
    "100x100": "QTuningSFTTrainer that keeps everything",
    "12.5x50": "Q-Tuning",
    "25x50": "Q-Tuning",
    "50x70": "Q-Tuning",
    "50x50": "Q-Tuning",
    "12.5x50 mask": "Q-Tuning, pruned tokens masked instead of dropped",
    "12.5x50 small": "Q-Tuning, micro_batches: small (low peak memory)",
    "12.5x50 small rowwise": "the same, scored row by row: whether scoring sets the peak",
    **{
        f"{budget} free": "Q-Tuning, survivor_checkpointing: false" for budget in ("12.5x50", "25x50", "50x70", "50x50")
    },
    **{f"{budget} auto": "Q-Tuning, survivor_checkpointing: auto" for budget in ("12.5x50", "25x50", "50x70", "50x50")},
    "12.5x50 amortised": "Q-Tuning, score_reuse_epochs: 3, mean over three epochs",
    "12.5x50 half": "Q-Tuning, scored_share: 0.5",
}
OPTIONS = {
    "mask": {"token_pruning": "mask"},
    "small": {"micro_batches": "small"},
    "small rowwise": {"micro_batches": "small", "scoring_batch_tokens": 1},
    "free": {"survivor_checkpointing": "false"},
    "auto": {"survivor_checkpointing": "auto"},
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


def load_rows(path: Path, tokenizer: Any, rows: int, length: int) -> Dataset:
    """The first rows of questions and answers with at most `length` tokens, tokenized."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= length:
            examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        if len(examples) == rows:
            return Dataset.from_list(examples)
    raise ValueError(f"`--data` is '{path}': it has {len(examples)} rows of at most {length} tokens, not {rows}.")


def make_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of that shape with random weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "tie_word_embeddings": True, **MODELS[name]}
    config = LlamaConfig(max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=1, **shape)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype)


def save_model(name: str, folder: str, device: str) -> None:
    """A model for `--nf4`, which is quantized as it is loaded."""
    make_model(name, device, torch.bfloat16).save_pretrained(folder)


def scoring_flops(name: str, dataset: Dataset) -> int:
    """Floating point operations of a scoring forward's matrix products over all rows, attention's own left out."""
    shape = {"vocab_size": VOCABULARY, **MODELS[name]}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * hidden * hidden * (1 + shape["num_key_value_heads"] / heads)
    layers = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    tokens = sum(len(row) for row in dataset["input_ids"])
    labelled = sum(sum(label != -100 for label in row[1:]) for row in dataset["labels"])
    return int(2 * tokens * layers + 2 * labelled * hidden * shape["vocab_size"])


def matrix_rate(name: str, device: str, dtype: torch.dtype, tokens: int) -> float:
    """Floating point operations a second of the MLP's product over so many tokens: the best of five."""
    hidden, width = MODELS[name]["hidden_size"], MODELS[name]["intermediate_size"]
    x, weight = (torch.randn(size, device=device, dtype=dtype) for size in ((tokens, hidden), (width, hidden)))
    repeats, seconds = 20, []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * hidden * width * repeats / min(seconds[1:])


class LeanSFTTrainer(QTuningSFTTrainer):
    """Trains on every candidate by our collation and head, without scoring, so that only pruning differs."""

    def _prune_pool(self, groups, batch_tokens):
        return [document for group in groups for document in group], StepCounts(scored=False)


def uses_gpu(options: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and not options.cpu


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
    on_gpu = uses_gpu(options)
    if on_gpu:
        torch.cuda.empty_cache()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that the next arm's memory is not what the last one left behind
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
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    quantization = {}
    if options.nf4:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    trainer = trainer_class(
        f"{output}/base"
        if options.nf4
        else AutoModelForCausalLM.from_pretrained(options.weights, dtype=dtype, device_map=device)
        if options.weights
        else make_model(options.model, device, dtype),
        args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(options.weights) if options.weights else make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
        callbacks=[clock],
        **quantization,
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
    parser.add_argument("--nf4", action="store_true", help="a 4-bit base (QLoRA)")
    parser.add_argument("--cap_gib", type=float, help="let the GPU have only so much memory; what does not fit says so")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    parser.add_argument("--weights", help="folder of a real model, in place of random weights of the shape of --model")
    parser.add_argument("--data", type=Path, help="JSON lines of questions and answers, with --weights")
    parser.add_argument("--cpu_seconds", action="store_true", help="measure the processor's seconds, not the clock's")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    disable_progress_bars()

    on_gpu = uses_gpu(options)
    if options.cap_gib is not None:
        if not on_gpu:
            parser.error("--cap_gib needs a GPU")
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(options.cap_gib / total)
    if options.cpu_seconds:
        time.perf_counter = time.process_time  # the record's phases are measured by it, too
    size = options.batch * options.accumulation * (options.steps + 1)
    if options.data is None:
        dataset = make_dataset(size, options.length)
    else:
        dataset = load_rows(options.data, AutoTokenizer.from_pretrained(options.weights), size, options.length)
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    too_large = []
    with tempfile.TemporaryDirectory() as output:
        if options.nf4:
            save_model(options.model, f"{output}/base", "cuda" if on_gpu else "cpu")
        for _ in range(options.rounds):
            for arm in options.arms:
                if arm in too_large:
                    continue
                try:
                    rounds[arm].append(run_arm(arm, options, dataset, output))
                except torch.OutOfMemoryError:
                    too_large.append(arm)
                    print(f"{arm}: out of memory", file=sys.stderr, flush=True)
                else:
                    print(f"{arm}: {rounds[arm][-1]['step']:.3f} s", file=sys.stderr, flush=True)

    computes_in = torch.bfloat16 if on_gpu else torch.float32
    tokens = min(sum(map(len, dataset["input_ids"])), 8192 if on_gpu else 512)
    rate = matrix_rate(options.model, "cuda" if on_gpu else "cpu", computes_in, tokens)
    flops = scoring_flops(options.model, dataset) / (options.steps + 1)
    predict = None
    if "lean" in rounds and not options.nf4:
        config = AutoConfig.from_pretrained(options.weights) if options.weights else make_model(options.model).config
        args = QTuningSFTConfig(
            "predicted",
            use_cpu=True,
            bf16=on_gpu,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        predict = Predictor(config, dataset, args, scoring_tokens=options.batch * options.length)
    rows = []
    for arm, taken in rounds.items():
        if arm in too_large:
            rows.append({"arm": arm, "out_of_memory": True})
            continue
        row = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
        # Ratios within a round, since the machine's speed drifts from one round to the next.
        for base in ("full", "lean"):
            if base in rounds and base not in too_large:
                ratios = [other["step"] / one["step"] for other, one in zip(rounds[base], taken, strict=True)]
                row[f"against_{base}"] = statistics.median(ratios)
                row[f"against_{base}_range"] = [min(ratios), max(ratios)]
        row["arithmetic_share"] = statistics.median(
            (one["selection"] + one["collation"]) / one["step"] for one in taken
        )
        if predict and arm.partition(" ")[2] in ("", "free", "auto") and "x" in arm:
            sample_ratio, token_ratio = (float(part) / 100 for part in arm.partition(" ")[0].split("x"))
            drop = options.token_pruning == "drop"
            row["predicted_against_lean"] = predict.against_lean(sample_ratio, token_ratio, " " in arm, drop)
        if row["scoring"] > 0 and arm.partition(" ")[2] not in ("amortised", "half"):
            row["share_of_matrix_rate"] = flops / row["scoring"] / rate
        rows.append({"arm": arm, **row})

    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    checkpointing = "with" if options.gradient_checkpointing else "without"
    pool = options.batch * options.accumulation
    table = Table(title=f"{options.model}, pool of {pool}, {checkpointing} gradient checkpointing, {device}")
    headings = [
        "arm",
        "s/step",
        "x full",
        "x lean",
        "predicted",
        "scoring",
        "selection",
        "collation",
        "training",
        "sel.+coll.",
        "of rate",
        "peak GiB",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in rows:
        if "out_of_memory" in row:
            table.add_row(row["arm"], "out of memory")
            continue
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("against_full", "against_lean")]
        ratios.append(f"{row['predicted_against_lean']:.2f}" if "predicted_against_lean" in row else "-")
        phases = [f"{row[name]:.4f}" if row["training"] else "-" for name in PHASES]
        table.add_row(
            row["arm"], f"{row['step']:.3f}", *ratios, *phases,
            f"{row['arithmetic_share']:.2%}",
            f"{row['share_of_matrix_rate']:.0%}" if "share_of_matrix_rate" in row else "-",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings["matrix_rate_flops_per_second"] = rate
        facts = {"device": device, "versions": versions(), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
