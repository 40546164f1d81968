"""
Scoring alone: our pass over a pool beside naive scoring by full logits, in seconds and added peak memory.

Naive: the pool in the order it is drawn, in padded micro-batches, the logits of every position, their log-softmax and
its entropy. Each measurement is a process of its own, so that memory is told apart; the two take turns, and the ratios
are medians over the rounds.

    python tests/benchmarks/scoring.py --json scoring.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from step_time import MODELS, VOCABULARY, PeakMemory, make_model, make_tokenizer
from torch.nn.utils.rnn import pad_sequence

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer
from qtuning_trl.records.run import synchronize, versions
from qtuning_trl.step.sample import split_documents


def make_rows(rows: int, longest: int) -> Dataset:
    """Rows of ordinary length spread (log-normal, sigma 0.6), prompt and answer about equal."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(rows):
        size = int((torch.randn((), generator=generator) * 0.6).exp() * longest / 4)
        ids = torch.randint(3, VOCABULARY, (min(max(size, 8), longest),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return Dataset.from_list(examples)


@torch.no_grad()
def naive(model: torch.nn.Module, documents: list, batch: int) -> None:
    for start in range(0, len(documents), batch):
        rows = documents[start : start + batch]
        ids = pad_sequence([torch.from_numpy(row.input_ids) for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(row.input_ids)) for row in rows], batch_first=True)
        labels = pad_sequence([torch.from_numpy(row.labels) for row in rows], batch_first=True, padding_value=-100)
        ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
        log_probs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        nll = -log_probs.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        answer = labels[:, 1:] != -100
        _ = [values.masked_fill(~answer, 0).sum(1) / answer.sum(1) for values in (nll, entropy)]


def measure(arm: str, options: argparse.Namespace) -> dict[str, float]:
    disable_progress_bars()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    args = QTuningSFTConfig(
        "unused", use_cpu=not on_gpu, bf16=on_gpu, report_to="none", per_device_train_batch_size=options.batch,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    dataset = make_rows(options.pool, options.length)
    lora = LoraConfig(r=8, target_modules="all-linear")
    trainer = QTuningSFTTrainer(
        make_model(options.model, device, dtype),
        args,
        train_dataset=dataset,
        processing_class=make_tokenizer(),
        peft_config=lora,
    )
    documents = [document for row in dataset for document in split_documents(row)]
    lengths = [len(document.input_ids) for document in documents]
    tokens = trainer.scorer.batch_tokens(lengths, options.batch * max(lengths), options.pool // options.batch)
    trainer.model.eval()
    warm_up = documents[:1]
    if arm == "naive":
        naive(trainer.model, warm_up, 1)
    else:
        trainer.scorer.score(trainer.model, [warm_up], tokens, trainer.state)
    memory = None if on_gpu else PeakMemory()
    if memory is None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        memory.start()
    synchronize()
    start = time.perf_counter()
    if arm == "naive":
        naive(trainer.model, documents, options.batch)
    else:
        trainer.scorer.score(trainer.model, [documents], tokens, trainer.state)
    synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if memory is None else memory.stop()
    return {"seconds": seconds, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--pool", type=int, default=64, help="candidates")
    parser.add_argument("--batch", type=int, default=8, help="rows of a naive batch and of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row; the median has a quarter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=["naive", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options)))
        return
    taken: dict[str, list[dict[str, float]]] = {"naive": [], "ours": []}
    for _ in range(options.rounds):
        for arm, rows in taken.items():
            command = [sys.executable, __file__, "--arm", arm]
            for name in ("model", "pool", "batch", "length"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(arm, rows[-1], file=sys.stderr, flush=True)
    medians = {
        arm: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for arm, rows in taken.items()
    }
    ratios = {
        name: statistics.median(a[name] / b[name] for a, b in zip(taken["ours"], taken["naive"], strict=True))
        for name in ("seconds", "peak_bytes")
    }
    table = Table(title=f"scoring a pool of {options.pool}, {options.model}, {torch.get_num_threads()} threads")
    for heading in ("", "seconds", "added peak MiB"):
        table.add_column(heading)
    for arm, row in medians.items():
        table.add_row(arm, f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}")
    table.add_row("ours / naive", f"{ratios['seconds']:.3f}", f"{ratios['peak_bytes']:.3f}")
    Console(width=100).print(table)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        facts = {"versions": versions(), "settings": settings, "rows": taken, "ratios": ratios}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
