"""TRL's trainer around a model in shapes: without output, evaluation and reports."""

import copy
import tempfile
import warnings
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTTrainer

from ..config import QTuningSFTConfig

# What plays no part in how long rows are, nor in a step; rows are not packed, so that each is measured.
NEUTRAL: dict[str, Any] = {
    "report_to": [], "eval_strategy": "no", "packing": False, "padding_free": False, "push_to_hub": False,
    "model_init_kwargs": None, "max_steps": 1, "neftune_noise_alpha": None, "disable_tqdm": True,
    "load_best_model_at_end": False,
}  # fmt: skip
# What is about data: a step is counted on rows that are tokenized already.
TOKENIZED: dict[str, Any] = {
    "max_length": None, "assistant_only_loss": False, "completion_only_loss": None, "chat_template_path": None,
    "eos_token": None, "pad_token": None, "dataset_kwargs": {"skip_prepare_dataset": True},
}  # fmt: skip


def stand_in_trainer(
    model: Any, training_args: QTuningSFTConfig, data: Dataset | None = None, tokenizer: Any = None
) -> SFTTrainer:
    """
    `SFTTrainer` on a model of the meta device, which stays where it is.

    Args:
        model: The model.
        training_args (`QTuningSFTConfig`): What the recipe says; it is left as it is.
        data (`Dataset`, *optional*): Rows to prepare. If `None`, two tokenized rows of two tokens stand in for them.
        tokenizer (*optional*): Of the model. Goes with `data`.
    """
    args = copy.copy(training_args)
    args.output_dir = tempfile.gettempdir()
    for name, value in NEUTRAL.items() if data is not None else (NEUTRAL | TOKENIZED).items():
        setattr(args, name, value)
    if args.fp16:  # tensors of the same size, and a CPU has no autocast to float16
        args.fp16, args.bf16, args.mixed_precision = False, True, "bf16"
    if data is None:
        data = Dataset.from_list([{"input_ids": [0, 1], "labels": [0, 1]}] * 2)
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b")
    with patch.object(Trainer, "_move_model_to_device", lambda *_: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # as `Trainer.train` sets
    return trainer
