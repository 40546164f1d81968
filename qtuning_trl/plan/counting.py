"""Peaks and operations of a training step, a scoring forward and the optimizer's step, counted on fake tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from trl import ModelConfig

from ..config import QTuningSFTConfig
from ..host.head import head_without_top1, per_token_values
from ..host.ledger import Peak
from ..host.loop import without_checkpointing
from ..host.modes import scoring_mode
from .cuda import Answers, as_on_cuda, make_ledger
from .model import build, materialize
from .trainer import stand_in_trainer

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "adapters", "gradients", "optimizer"
ACTIVATIONS = "activations"


@dataclass
class Counted:
    """
    What one piece of work takes.

    Args:
        peak (`Peak`): The most bytes alive during it, all that was there before included.
        flops (`Counter`): Floating-point operations in `layers`, `attention` and `head`.
    """

    peak: Peak = field(default_factory=Peak)
    flops: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Batch:
    """
    A batch of rows of one length.

    Args:
        rows (`int`): Rows.
        length (`int`): Tokens of each.
        labelled (`float`): Share of the tokens that are labelled.
        flattened (`bool`): Whether the rows go without padding and attention mask (`padding_free`, flash attention).
    """

    rows: int
    length: int
    labelled: float
    flattened: bool = False


class FakeRun:
    """
    A run of TRL's trainer on a model of fake tensors, as it would be after its first optimizer step.

    Args:
        config (`PreTrainedConfig`): Of the model.
        model_args (`ModelConfig`), training_args (`QTuningSFTConfig`): What the recipe says.
        layers (`int`, *optional*): Layers that the model has here; all of them if `None`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        model_args: ModelConfig,
        training_args: QTuningSFTConfig,
        layers: int | None = None,
    ):
        self.answers = Answers()
        self.ledger = make_ledger(self.answers)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = build(config, model_args, layers)
        self.trainer = cast(Any, stand_in_trainer(model, training_args))
        self.model = self.trainer.model
        self.vocabulary = config.vocab_size
        with self._open(WEIGHTS):
            materialize(self.model)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # As `Trainer.train` does; each count says whether it goes without
        self.model.gradient_checkpointing_enable(training_args.gradient_checkpointing_kwargs)
        if isinstance(self.model, PeftModel):
            self.model.enable_input_require_grads()
        self.wrapped = self.trainer.accelerator.prepare_model(self.model, device_placement=False)
        self.of_optimizer = self._first_optimizer_step()

    @contextmanager
    def _open(self, part: str) -> Iterator[None]:
        with self.mode, self.ledger, as_on_cuda(self.ledger), self.ledger.part(part):
            yield

    def _first_optimizer_step(self) -> Counted:
        with self._open(OPTIMIZER):
            self.trainer.create_optimizer()
            self._make_gradients()
            self.ledger.start_peak()
            if self.trainer.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.trainable, self.trainer.args.max_grad_norm)
            self.trainer.optimizer.step()
            self._drop_gradients()
        return self._counted(Counter())

    def _make_gradients(self) -> None:
        with self.ledger.part(GRADIENTS):
            for parameter in self.trainable:
                parameter.grad = torch.empty_like(parameter)

    def _drop_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None

    def _collated(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows, length = (1, batch.rows * batch.length) if batch.flattened else (batch.rows, batch.length)
        self.answers.labelled = int(batch.rows * (batch.length - 1) * batch.labelled)
        self.answers.padded = rows > 1
        ids = np.zeros(length, dtype=np.int64)
        return self.trainer.data_collator([{"input_ids": ids, "labels": ids}] * rows)

    def train(self, batch: Batch, checkpointing: bool) -> Counted:
        """One micro-batch of those that accumulate, forward and backward, by `SFTTrainer.training_step`."""
        with self._open(ACTIVATIONS):
            self._make_gradients()
            inputs = self._collated(batch)
            self.ledger.start_peak()
            before = Counter(self.ledger.flops)
            if checkpointing:
                self.trainer.training_step(self.wrapped, inputs, 100)
            else:
                with without_checkpointing(self.model):
                    self.trainer.training_step(self.wrapped, inputs, 100)
            self._drop_gradients()
        return self._counted(before)

    def score(self, batch: Batch) -> Counted:
        """One batch of the scoring forward."""
        with self._open(ACTIVATIONS), scoring_mode(self.model), head_without_top1():
            inputs = self._collated(batch)
            self.ledger.start_peak()
            before = Counter(self.ledger.flops)
            with self.trainer.accelerator.autocast():
                per_token_values(self.model, inputs)
        return self._counted(before)

    def _counted(self, before: Counter) -> Counted:
        taken = self.ledger.peak
        peak = Peak(taken.bytes, Counter(taken.by_part), Counter(taken.most))
        if isinstance(self.model, PeftModel):
            adapters = sum(parameter.numel() * parameter.element_size() for parameter in self.trainable)
            peak.by_part[WEIGHTS] -= adapters
            peak.by_part[ADAPTERS] += adapters
        return Counted(peak, self.ledger.flops - before)


class CountedModel:
    """
    Counts for a model of all its layers, from those of two and of three: memory and operations are linear in them.

    Args:
        config, model_args, training_args: As [`FakeRun`] takes them.
        whole (`bool`): Count all layers instead, for models whose layers differ in kind.
    """

    def __init__(
        self, config: PreTrainedConfig, model_args: ModelConfig, training_args: QTuningSFTConfig, whole: bool = False
    ):
        self.layers = config.num_hidden_layers
        numbers = [None] if whole or self.layers <= 3 else [2, 3]
        self.runs = [FakeRun(config, model_args, training_args, number) for number in numbers]
        self.memo: dict[Any, Counted] = {}

    def optimizer_step(self) -> Counted:
        """The first step of the optimizer, which makes its states."""
        return self._extrapolated([run.of_optimizer for run in self.runs])

    def train(self, batch: Batch, checkpointing: bool) -> Counted:
        """As [`FakeRun.train`]."""
        key = ("train", batch, checkpointing)
        if key not in self.memo:
            self.memo[key] = self._extrapolated([run.train(batch, checkpointing) for run in self.runs])
        return self.memo[key]

    def score(self, batch: Batch) -> Counted:
        """As [`FakeRun.score`]."""
        key = ("score", batch)
        if key not in self.memo:
            self.memo[key] = self._extrapolated([run.score(batch) for run in self.runs])
        return self.memo[key]

    def _extrapolated(self, counts: list[Counted]) -> Counted:
        if len(counts) == 1:
            return counts[0]
        two, three = counts

        def line(at_two: int, at_three: int) -> int:
            return at_two + (at_three - at_two) * (self.layers - 2)

        def lines(at_two: Counter, at_three: Counter) -> Counter:
            return Counter({name: line(at_two[name], at_three[name]) for name in at_two | at_three})

        peak = Peak(
            line(two.peak.bytes, three.peak.bytes),
            lines(two.peak.by_part, three.peak.by_part),
            lines(two.peak.most, three.peak.most),
        )
        return Counted(peak, lines(two.flops, three.flops))
