"""What `qtuning plan` predicts for an arm of `step_time.py`: how many times as fast as `lean` a step is."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig
from trl import ModelConfig

from qtuning_trl import QTuningSFTConfig
from qtuning_trl.plan.counting import Batch, CountedModel
from qtuning_trl.plan.lengths import Lengths
from qtuning_trl.plan.timing import Budget, Cost, Costs, StepShape, step_time
from qtuning_trl.step.memory import EVERYTHING


class Predictor:
    """
    Counts the model once, and tells the ratio of each arm.

    Args:
        config (`PreTrainedConfig`): Of the model.
        dataset (`Dataset`): Tokenized rows.
        args ([`QTuningSFTConfig`]): Of the runs: their micro-batches and checkpointing.
        scoring_tokens (`int`): Tokens scored at once.
    """

    def __init__(self, config: PreTrainedConfig, dataset: Dataset, args: QTuningSFTConfig, scoring_tokens: int):
        tokens = np.array([len(ids) for ids in dataset["input_ids"]])
        labelled = np.array([sum(label != -100 for label in row[1:]) for row in dataset["labels"]])
        self.lengths = Lengths(tokens, labelled, int(tokens.max()), len(tokens), "")
        self.args, self.scoring_tokens = args, scoring_tokens
        model_args = ModelConfig(dtype="float32", use_peft=True, lora_r=8, lora_target_modules="all-linear")
        counted = CountedModel(config, model_args, args)
        batch = Batch(1, int(tokens.mean()), float(labelled.sum() / tokens.sum()))
        self.costs = Costs(
            Cost.of(counted.score(batch), batch),
            Cost.of(counted.train(batch, True), batch),
            Cost.of(counted.train(batch, False), batch),
        )

    def against_lean(self, sample_ratio: float, token_ratio: float, free: bool, drop: bool) -> float:
        """The ratio; `free` survivors are trained without checkpointing."""
        shape = StepShape(
            rows=self.args.per_device_train_batch_size,
            slots=self.args.gradient_accumulation_steps,
            checkpointing=self.args.gradient_checkpointing,
            plain_rows=self.args.per_device_train_batch_size,
            plain_checkpointing=self.args.gradient_checkpointing,
            free_tokens=EVERYTHING if free else 0,
            scoring_tokens=self.scoring_tokens,
            scored_flattened=True,  # as on a CPU
            sorted_rows=True,
        )
        budget = Budget(sample_ratio, token_ratio, drop)
        return float(1 / step_time(self.lengths, shape, budget, self.costs)["step"])
