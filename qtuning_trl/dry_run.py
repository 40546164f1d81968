"""`qtuning sft --dry-run`: what a run would be trained on, and what it needs, said before it starts."""

from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from .data_check import one_line, unusual
from .step.sample import IGNORE, Sample, split_documents

if TYPE_CHECKING:
    from .trainer import QTuningSFTTrainer

SAMPLES = 3
# Around what is labelled, in the samples that are shown.
MARKS = ("⟦", "⟧")


def prepared_rows(trainer: "QTuningSFTTrainer") -> int | None:
    """Rows of the prepared training set; `None` for a stream."""
    return len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else None


def describe(trainer: "QTuningSFTTrainer") -> str:
    """
    What a trainer would train on, and what that takes, as text.

    Args:
        trainer ([`QTuningSFTTrainer`]): Not trained yet; nothing of it is changed, and nothing drawn.
    """
    from .plan.beside import plan_line  # which takes its time to import, and training does without

    check, args, rows = trainer.data_check, trainer.args, prepared_rows(trainer)
    lines = [one_line(check, args, rows)]
    if len(check.answer_lengths):
        low, half, high = (int(value) for value in np.quantile(check.answer_lengths, (0.05, 0.5, 0.95)))
        lines.append(f"Answers: {low:,} to {high:,} tokens (5% to 95% of the rows), half of them {half:,} or fewer.")
    lines.append(
        f"Budget: {args.sample_ratio:.4g} of the samples, {args.token_ratio:.4g} of the tokens that are pruned."
    )
    lines.append(plan_line(trainer))
    found = unusual(check, args, rows)
    lines += [f"Unusual: {sentence}" for sentence in found] or ["Nothing unusual."]
    tokenizer = trainer._tokenizer
    dataset: Any = trainer.train_dataset
    first = list(dataset.take(SAMPLES))
    for number, row in enumerate(first, 1):
        lines += ["", f"Sample {number} (what is labelled is between {MARKS[0]} and {MARKS[1]}):"]
        lines.append(marked(split_documents(row)[0], tokenizer))
    return "\n".join([*lines, "", "Nothing was trained: leave `--dry-run` out to train."])


def marked(sample: Sample, tokenizer: Any) -> str:
    """The text of a sample, special tokens included, with marks around what is labelled."""
    labelled = sample.labels != IGNORE
    borders = np.flatnonzero(np.diff(labelled)) + 1
    text = ""
    for tokens, on in zip(np.split(sample.input_ids, borders), np.split(labelled, borders), strict=True):
        piece = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        text += f"{MARKS[0]}{piece}{MARKS[1]}" if len(on) and on[0] else piece
    return text
