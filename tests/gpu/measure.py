"""
Peak memory and seconds of a step of six recipes, random weights of the true shapes, beside what `qtuning plan` says.

Each run is a process of its own, with no more memory than the card that its recipe names (`--cap_gib` for another). The
table goes between two marks of a document:

    python tests/gpu/measure.py --into docs/benchmarks.md
    python tests/gpu/measure.py --recipes smollm2-135m-lora --cpu --layers 2 --hidden 64 --length 32   # does it run?
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import get_peft_config, get_quantization_config

from qtuning_trl import QTuningSFTTrainer
from qtuning_trl.plan.model import model_config
from qtuning_trl.plan.recipes import named_card
from qtuning_trl.scripts.plan import make_planner
from qtuning_trl.scripts.sft import make_parser

RECIPES = Path(__file__).parents[2] / "recipes"
SIX = (
    "smollm2-135m-lora", "smollm2-1.7b-qlora", "llama-3.2-1b-lora", "llama-3.2-3b-qlora", "llama-2-7b-qlora",
    "llama-3.1-8b-qlora",
)  # fmt: skip
START, END = "<!-- gpu: made by tests/gpu/run.sh -->", "<!-- end of gpu -->"
ARMS = {"plain": ["--budget", "100x100"], "checkpointed": ["--survivor_checkpointing", "true"], "auto": []}
GIB = 2**30


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_args, **_kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def shape(options: argparse.Namespace, model_args: Any, training_args: Any) -> Any:
    """The config of the recipe's model, smaller if the options say so."""
    config = model_config(model_args, training_args)
    if options.layers:
        config.num_hidden_layers = options.layers
    if options.hidden:
        config.hidden_size, config.intermediate_size = options.hidden, 2 * options.hidden
        config.num_attention_heads, config.num_key_value_heads = 4, 2
        config.head_dim, config.vocab_size = options.hidden // 4, 512
    return config


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train four steps of one recipe in one arm; peak bytes of the device, and seconds of the fastest step."""
    recipe = RECIPES / f"{options.recipe}.yaml"
    argv = ["--config", str(recipe), "--output_dir", tempfile.mkdtemp(), *ARMS[options.arm]]
    argv += ["--save_strategy", "no", "--logging_strategy", "no", "--max_steps", "4", "--disable_tqdm", "true"]
    _, args, model_args, _ = make_parser().parse([*argv, *(["--use_cpu", "true"] if options.cpu else [])]).dataclasses
    args.max_length, args.dataset_kwargs = None, {"skip_prepare_dataset": True}
    args.group_column = None
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * GIB / total))

    config = shape(options, model_args, args)
    torch.manual_seed(0)
    model: Any = None
    quantization: dict[str, Any] = {}
    if model_args.load_in_4bit:
        with tempfile.TemporaryDirectory() as folder:  # weights are quantized as they are loaded
            with torch.device("cpu"):
                AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            quantized = get_quantization_config(model_args)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": device}
            )
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * 4
    ids = torch.randint(3, config.vocab_size, (rows, options.length), generator=generator).tolist()
    half = options.length // 2
    data = Dataset.from_list([{"input_ids": row, "labels": [-100] * half + row[half:]} for row in ids])
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    clock = Clock()
    trainer = QTuningSFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[clock],
        **quantization,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": min(clock.seconds[1:]), "peak": peak, "free_tokens": trainer.memory.free_tokens}


def measure(options: argparse.Namespace, recipe: str, arm: str, cap: float) -> dict[str, Any]:
    """[`run`] in a process of its own; what it says, or that it ran out of memory."""
    command = [sys.executable, __file__, "--recipe", recipe, "--arm", arm, "--cap_gib", str(cap)]
    command += ["--length", str(options.length), *(["--cpu"] if options.cpu else [])]
    for name in ("layers", "hidden"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr:
        return {"out_of_memory": True}
    raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


def table(options: argparse.Namespace) -> str:
    """The table in Markdown, with the device's name and versions above it."""
    from qtuning_trl.records.run import versions

    device = "a CPU, to see that it runs" if options.cpu else torch.cuda.get_device_name()
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"{device}, {datetime.now(UTC):%Y-%m-%d}; {used}. Rows of {options.length} tokens, each run capped at the card "
        "that its recipe names. Peaks in GiB as PyTorch's allocator counts them, measured / planned; times as fast as "
        "plain SFT, measured / planned.",
        "",
        "| recipe | cap, GiB | peak, plain | peak, checkpointed | checkpointed | `auto` | tokens at a time, `auto` |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in options.recipes:
        cap = options.cap_gib or named_card(RECIPES / f"{recipe}.yaml")
        argv = ["--config", str(RECIPES / f"{recipe}.yaml"), "--dataset_name", "", "--max_length", str(options.length)]
        auto = make_planner(argv).plan(card=cap)
        kept = make_planner([*argv, *ARMS["checkpointed"]]).plan()
        taken = {arm: measure(options, recipe, arm, cap) for arm in ARMS}

        def peak(arm: str, planned: int, taken: dict[str, Any] = taken) -> str:
            if "out_of_memory" in taken[arm]:
                return f"out of memory / {planned / GIB:.2f}"
            measured = taken[arm]["peak"]
            return f"{'-' if measured is None else f'{measured / GIB:.2f}'} / {planned / GIB:.2f}"

        def speed(arm: str, planned: float, taken: dict[str, Any] = taken) -> str:
            if "out_of_memory" in taken[arm] or "out_of_memory" in taken["plain"]:
                return f"- / {1 / planned:.2f}x"
            return f"{taken['plain']['seconds'] / taken[arm]['seconds']:.2f}x / {1 / planned:.2f}x"

        lines.append(
            f"| `{recipe}` | {cap:g} | {peak('plain', auto.memory.plain_bytes)} | "
            f"{peak('checkpointed', kept.memory.bytes)} | {speed('checkpointed', kept.time['step'])} | "
            f"{speed('auto', auto.time['step'])} | {taken['auto'].get('free_tokens', '-')} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=SIX)
    parser.add_argument("--cap_gib", type=float, help="memory that each run may have; that of its card by default")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each row")
    parser.add_argument("--into", type=Path, help="the document between whose marks the table goes")
    parser.add_argument("--cpu", action="store_true", help="to see that it runs")
    parser.add_argument("--layers", type=int, help="so many layers instead of the model's")
    parser.add_argument("--hidden", type=int, help="a hidden size instead of the model's")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recipe:
        print(json.dumps(run(options)))
        return
    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu only shows that it runs")
    text = table(options)
    print(text)
    if options.into:
        document = options.into.read_text(encoding="utf-8")
        before, _, rest = document.partition(START)
        after = rest.partition(END)[2]
        options.into.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
