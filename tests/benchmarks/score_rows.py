"""
`qtuning score` on data sets of growing size: rows a second, and the peak memory of the process.

A tiny model (that of tests/conftest.py), short rows, one process, one thread. Memory is told apart by Linux: anonymous
memory is what the process has asked for; pages of mapped files are the kernel's to take back.

    python tests/benchmarks/score_rows.py --rows 10000 100000 1000000 --json score_rows.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from qtuning_trl.records.run import versions

PHASES = ("preparing", "scoring", "writing")


def make_model(folder: Path) -> None:
    from conftest import save_tokenizer, tiny_llama

    save_tokenizer(folder)
    tiny_llama().save_pretrained(folder)


def make_rows(file: Path, rows: int) -> None:
    """Rows as those of the tests, written in blocks: prompts of 2 to 7 tokens, answers of 4 to 16."""
    from conftest import prompt_completion_rows

    with file.open("w") as out:
        for block in range(0, rows, 10_000):
            for row in prompt_completion_rows(min(10_000, rows - block), seed=block):
                out.write(json.dumps(row) + "\n")


def memory(pid: int) -> dict[str, int]:
    """Anonymous memory and mapped files of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Run `qtuning score` on so many rows: seconds of each phase, and the peaks of memory in bytes."""
    work = folder / f"{rows}"
    work.mkdir()
    make_rows(work / "data.jsonl", rows)
    output, partial = work / "scored.parquet", work / "scored.parquet.partial"
    command = [
        sys.executable, "-m", "qtuning_trl.scripts.score", "--model", str(folder / "model"), "--dataset",
        str(work / "data.jsonl"), "--budget", "25x50", "--output", str(output), "--use_cpu", "--bf16", "false",
        "--disable_tqdm", "true",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(work / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    start, marks = time.perf_counter(), {"preparing": 0.0}
    peaks: dict[str, dict[str, int]] = {}
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            for name, phase in (("settings.json", "scoring"), ("rows.arrow", "writing")):
                if phase not in marks and (partial / name).exists():
                    marks[phase] = time.perf_counter() - start
            peak = peaks.setdefault(list(marks)[-1], {"RssAnon": 0, "RssFile": 0})
            try:
                peak |= {name: max(peak[name], value) for name, value in memory(process.pid).items()}
            except OSError:
                break
            time.sleep(0.05)
        if process.wait() != 0:
            raise RuntimeError((work / "log.txt").read_text()[-3000:])
    ends = [*list(marks.values())[1:], time.perf_counter() - start]
    size = output.stat().st_size
    shutil.rmtree(work)
    return {
        "rows": rows,
        **{f"seconds {phase}": end - marks[phase] for phase, end in zip(PHASES, ends, strict=True)},
        **{f"peak anonymous bytes {phase}": peaks[phase]["RssAnon"] for phase in PHASES},
        "peak mapped bytes": max(peak["RssFile"] for peak in peaks.values()),
        "result bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        results = []
        for rows in arguments.rows:
            results.append(measure(Path(folder), rows))
            print(results[-1], flush=True)
    table = Table("rows", *PHASES, "rows/s scoring", *(f"memory {phase}" for phase in PHASES), "mapped")
    for result in results:
        table.add_row(
            f"{result['rows']:,}",
            *(f"{result[f'seconds {phase}']:.0f} s" for phase in PHASES),
            f"{result['rows'] / result['seconds scoring']:,.0f}",
            *(f"{result[f'peak anonymous bytes {phase}'] / 2**20:,.0f} MiB" for phase in PHASES),
            f"{result['peak mapped bytes'] / 2**20:,.0f} MiB",
        )
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"results": results, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
