"""Amortised scoring: scores that are used again in later steps, kept by sample id, saved with each checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

FILE_NAME = "qtuning_scores.npz"


@dataclass(frozen=True, slots=True)
class Score:
    """
    Per-token values of one sample, and when they were computed.

    Args:
        nll (`np.ndarray` of shape `(answer tokens,)`, float32): Negative log-likelihood, in nats.
        entropy (`np.ndarray` of shape `(answer tokens,)`, float32): Predictive entropy, in nats.
        step (`int`): Optimizer steps done at that time.
        epoch (`int`): Epochs done at that time.
    """

    nll: np.ndarray
    entropy: np.ndarray
    step: int
    epoch: int


class ScoreCache:
    """
    The latest score of each sample; about 350 bytes each, and 8 for each answer token (docs/benchmarks.md).

    Every process holds those of all processes, since a sample may turn up on another one in the next epoch.

    Args:
        reuse_epochs (`int`, *optional*): Epochs for which a score is used.
        reuse_steps (`int`, *optional*): Optimizer steps for which a score is used.
    """

    def __init__(self, reuse_epochs: int | None, reuse_steps: int | None):
        self.reuse_epochs, self.reuse_steps = reuse_epochs, reuse_steps
        self.epoch = 0  # epochs done
        self.scores: dict[int, Score] = {}
        self.news: dict[int, Score] = {}  # of this process and step, not yet known to the others

    def is_expired(self, score: Score, step: int) -> bool:
        """Whether a score has been used for as long as it may be."""
        if self.reuse_epochs is not None:
            return self.epoch - score.epoch >= self.reuse_epochs
        return self.reuse_steps is not None and step - score.step >= self.reuse_steps

    def plan(
        self, samples: list[tuple[int, int]], order: list[int], most: int, step: int
    ) -> tuple[list[int], dict[int, Score]]:
        """
        Which candidates to score now, and which scores to use again.

        Args:
            samples (`list[tuple[int, int]]`): Id and answer tokens of each candidate. A score for another number of
                tokens is none.
            order (`list[int]`): Indices of the candidates; decides among those that are equally old.
            most (`int`): How many to score at most: those without a score first, then those whose scores are oldest.
            step (`int`): Optimizer steps done.

        Returns:
            `tuple`: Indices of the candidates to score now, and scores by index. Beyond `most` an expired score is
            used again; a candidate that has none is in neither.
        """
        latest = {index: self.scores.get(samples[index][0]) for index in order}
        usable = {i: score for i, score in latest.items() if score is not None and len(score.nll) == samples[i][1]}
        expired = [i for i in order if i not in usable or self.is_expired(usable[i], step)]
        expired.sort(key=lambda i: usable[i].step if i in usable else -1)
        now = expired[:most]
        for index in now:
            usable.pop(index, None)
        return now, usable

    def add(self, sample_id: int, score: Score) -> None:
        """Keep a score in place of the one before."""
        self.scores[sample_id] = self.news[sample_id] = score

    def take_in(self, everyones_news: list[dict[int, Score]]) -> None:
        """Take in what all processes scored in this step."""
        for news in everyones_news:
            self.scores.update(news)
        self.news.clear()

    def save(self, folder: str | Path) -> None:
        """Write `qtuning_scores.npz` into a checkpoint: the whole file or none."""
        ids = list(self.scores)
        scores = list(self.scores.values())
        empty = np.zeros(0, dtype=np.float32)
        path = Path(folder, FILE_NAME)
        temporary = path.with_name(f".{FILE_NAME}")
        np.savez(
            temporary,
            sample_id=np.array(ids, dtype=np.int64),
            step=np.array([score.step for score in scores], dtype=np.int64),
            epoch=np.array([score.epoch for score in scores], dtype=np.int64),
            tokens=np.array([len(score.nll) for score in scores], dtype=np.int64),
            nll=np.concatenate([empty, *(score.nll for score in scores)]),
            entropy=np.concatenate([empty, *(score.entropy for score in scores)]),
        )
        temporary.replace(path)

    def resume(self, checkpoint: str | None) -> bool:
        """Begin anew, or go on from a checkpoint; `False` if that has no scores. Raises as `load` does."""
        self.scores.clear()
        self.news.clear()
        return checkpoint is None or self.load(checkpoint)

    def load(self, folder: str | Path) -> bool:
        """
        Go on from a checkpoint; whether it has scores. Without them the samples are scored anew.

        Raises:
            `ValueError`: If the file is damaged.
        """
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            return False
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in ("sample_id", "step", "epoch", "tokens", "nll", "entropy")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"'{path}' is damaged ({type(error).__name__}): resume from an earlier checkpoint, or remove this file "
                "to score every sample anew."
            ) from error
        nll, entropy = arrays["nll"], arrays["entropy"]
        columns = [arrays[name].tolist() for name in ("sample_id", "step", "epoch")]
        ends = np.cumsum(arrays["tokens"])
        spans = zip((ends - arrays["tokens"]).tolist(), ends.tolist(), strict=True)
        self.scores = {
            sample_id: Score(nll[start:end], entropy[start:end], step, epoch)
            for sample_id, step, epoch, (start, end) in zip(*columns, spans, strict=True)
        }
        return True


class ScoreKeeper(TrainerCallback):
    """Counts the epochs, and tells all processes what each has scored."""

    def __init__(self, cache: ScoreCache):
        self.cache = cache

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cache.epoch = math.floor((state.epoch or 0.0) + 1e-9) - 1
        if state.global_step == 0:  # `auto_find_batch_size` starts again after steps that did not fit
            self.cache.resume(None)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted here: of a stream, whose length is unknown, `state.epoch` tells a new epoch after its first step only.
        self.cache.epoch += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cache.take_in(gather_object([self.cache.news]) if args.world_size > 1 else [])
