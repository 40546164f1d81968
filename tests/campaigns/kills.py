"""
Kills a training run again and again, resumes it, and compares its end with that of a run that nobody interrupted.

```bash
python tests/campaigns/kills.py --runs 20 --seed 0
```

A run is killed by SIGKILL at a random file that it opens, renames or removes in its output directory (`at a file`), or
after a random time (`at a time`: in a step, or in the middle of a file); then it is started again with
`resume_from_checkpoint: true`, or anew if there is no checkpoint yet, until it ends. Compared are the weights bit for
bit, the summary without its seconds, and the record: each step and sample once.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
OPTIONS = {
    "budget": "50x50", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "score_reuse_epochs": 2,
    "num_train_epochs": 2, "max_steps": 5, "group_column": "source",
}  # fmt: skip
START = "start"  # an empty file that the run makes when it begins to train


def train(folder: str, tokenizer_dir: str, kill_at: int | None, events: "multiprocessing.Queue[int]") -> None:
    """What the process of a run does, until it ends or touches the `kill_at`-th file."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    from conftest import prompt_completion_rows
    from datasets import Dataset
    from test_trainer import make_trainer
    from transformers import PreTrainedTokenizerFast

    touched = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal touched
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder + os.sep):
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    dataset = Dataset.from_list(prompt_completion_rows(40))
    trainer = make_trainer(folder, tokenizer, dataset, dropout=0.1, **OPTIONS)
    Path(f"{folder}.{START}").touch()
    sys.addaudithook(count)
    trainer.train(resume_from_checkpoint=checkpoint(folder))
    trainer.save_model(folder)
    events.put(touched)


def checkpoint(folder: str) -> bool | None:
    """Whether there is one to resume from, as a script that restarts runs would ask."""
    from qtuning_trl.host.checkpoints import is_whole, list_checkpoints

    return any(map(is_whole, list_checkpoints(folder))) or None


def outcome(folder: str) -> dict:
    """All that must be the same, however often the run was killed."""
    from qtuning_trl import load_record
    from qtuning_trl.records.run import SUMMARY_NAME
    from qtuning_trl.records.samples import RecordReader

    summary = json.loads(Path(folder, SUMMARY_NAME).read_text())
    for name in ("seconds", "peak_memory", "config"):
        del summary[name]
    record = load_record(folder, as_frame=True).drop(columns="seconds")
    reader = RecordReader(folder)
    texts = reader.texts(record["sample_id"])
    names = sorted(path.name for path in Path(folder).iterdir())
    return {
        "weights": Path(folder, "adapter_model.safetensors").read_bytes(),
        "summary": summary,
        "record": record.sort_values(["step", "sample_id"]).to_json(),
        "missing steps": reader.missing_steps(),
        "texts": {sample: [ids.tolist(), answer.tolist()] for sample, (ids, answer) in texts.items()},
        "files": [name for name in names if not name.startswith("checkpoint-")],
        "hidden": [str(path) for path in Path(folder).rglob(".*")],
        "last checkpoint": checkpoint(folder) and max(names, key=lambda name: (name.startswith("checkpoint-"), name)),
    }


class Campaign:
    """
    An uninterrupted run, and others that are compared with it.

    Args:
        folder (`str`): Where they go.
        method (`str`): How their processes start. Those that a server forks, which has imported everything, start fast.
    """

    def __init__(self, folder: str, method: str = "forkserver"):
        from conftest import save_tokenizer

        self.folder = folder
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["qtuning_trl.trainer", "conftest", "test_trainer"])
        self.tokenizer_dir = str(Path(folder, "tokenizer"))
        save_tokenizer(self.tokenizer_dir)
        self.seconds = 0.0
        self.files = self._start("whole", None, None)  # touched by a run that nobody interrupts
        self.expected = outcome(str(Path(folder, "whole")))

    def _start(self, name: str, kill_at: int | None, kill_after: float | None) -> int | None:
        """Start a run or go on with it; how many files it has touched, or `None` if it was killed."""
        folder, events = str(Path(self.folder, name)), self.context.Queue()
        begun = Path(f"{folder}.{START}")
        begun.unlink(missing_ok=True)
        process = self.context.Process(target=train, args=(folder, self.tokenizer_dir, kill_at, events))
        process.start()
        while not begun.exists() and process.is_alive():
            time.sleep(0.01)
        since = time.monotonic()
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            self.seconds = max(self.seconds, time.monotonic() - since)
            return events.get()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"A run failed: see {folder}.log\n{Path(f'{folder}.log').read_text()[-3000:]}")
        return None

    def run(self, name: str, draw: random.Random, kills: int, moments: tuple[str, ...]) -> int:
        """
        A run that is killed until it ends, `kills` times at most.

        Returns:
            `int`: How often it was killed.

        Raises:
            `AssertionError`: If it ends otherwise than the uninterrupted one.
        """
        killed = 0
        while True:
            kill_at = kill_after = None
            if killed < kills and draw.choice(moments) == "at a file":
                kill_at = draw.randrange(1, self.files + 1)
            elif killed < kills:
                kill_after = draw.random() * self.seconds
            if self._start(name, kill_at, kill_after) is not None:
                break
            killed += 1
        found = outcome(str(Path(self.folder, name)))
        differing = [key for key, value in self.expected.items() if found[key] != value]
        assert not differing, f"{name} ended otherwise after {killed} kills: {', '.join(differing)}; see {self.folder}"
        return killed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="runs, each killed until it ends")
    parser.add_argument("--kills", type=int, default=6, help="most kills of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="kills-")
    campaign, kills, wrong = Campaign(folder), 0, 0
    for number in range(arguments.runs):
        draw = random.Random(f"{arguments.seed} {number}")
        try:
            killed = campaign.run(f"run-{number}", draw, arguments.kills, ("at a file", "at a time"))
        except AssertionError as error:
            print(error, flush=True)
            wrong += 1
            continue
        kills += killed
        print(f"run {number}: {killed} kills, ended as the uninterrupted one", flush=True)
    print(f"{arguments.runs} runs, {kills} kills, {wrong} ended otherwise; each touches {campaign.files} files.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
