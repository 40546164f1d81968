"""
What `sample_pruner: q_tuning_code` adds to a scoring forward, which gives the entropy at prompt positions too.

```bash
OMP_NUM_THREADS=1 python tests/benchmarks/sequence_entropy.py --config recipe.yaml --rows 16 --rounds 4
```
"""

import argparse
import statistics
import tempfile
import time

from qtuning_trl.scripts.sft import build_trainer, parse
from qtuning_trl.step.sample import answer_lengths, split_documents

ARMS = ("q_tuning", "q_tuning_code")


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of scoring answers alone, and prompts too, in turn.")
    parser.add_argument("--config", required=True, help="a recipe that names a model and its data")
    parser.add_argument("--rows", type=int, default=16, help="candidates")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for arm in ARMS:
            options = ["--config", arguments.config, "--sample_pruner", arm, "--output_dir", f"{folder}/{arm}"]
            trainers[arm] = build_trainer(*parse(options).dataclasses)
        rows = [trainers[ARMS[0]].train_dataset[index] for index in range(arguments.rows)]
        samples = [sample for row in rows for sample in split_documents(row)]
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(arguments.rounds):
            for arm, trainer in trainers.items():
                start = time.process_time()
                trainer.scorer.score(trainer.model, [samples], 512, trainer.state)
                seconds[arm].append(time.process_time() - start)
    print(f"{sum(map(len, samples))} tokens, {sum(answer_lengths(samples))} of them of answers")
    answers, prompts = (statistics.median(seconds[arm]) for arm in ARMS)
    print(f"answers alone {answers:.2f} s, prompts too {prompts:.2f} s: {prompts / answers:.2f} times as long")


if __name__ == "__main__":
    main()
