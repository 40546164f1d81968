"""Two machines: the two commands that start them, here both on this one, make the run of two processes on one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from test_cli import recipe  # noqa: F401 (a fixture)

from qtuning_trl import load_record


def train(config: str, output: Path, machines: int) -> None:
    """Run `qtuning sft` with two processes: once, or on each of two machines that share the folder `output`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "qtuning_trl", "sft", "--config", config, "--output_dir", str(output),
        "--multi_gpu", "--num_processes", "2", "--num_machines", str(machines), "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port), "--machine_rank",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([*command, str(rank)], env=environment, **pipes) for rank in range(machines)]
    try:
        for process in running:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()


def test_two_machines_train_as_two_processes_on_one(recipe, tmp_path):  # noqa: F811
    config = recipe(selection_scope="all_processes")
    runs = {machines: tmp_path / f"{machines}" for machines in (1, 2)}
    for machines, output in runs.items():
        train(config, output, machines)
    one, two = (load_record(output, as_frame=True).drop(columns="seconds") for output in runs.values())
    assert set(two.process) == {0, 1}
    assert (len(two), two.kept.sum()) == (24, 6)  # 16 + 8 candidates, a quarter of each
    assert one.equals(two)
    first, second = (load_file(output / "adapter_model.safetensors") for output in runs.values())
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []
