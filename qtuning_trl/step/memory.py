"""How much memory a batch needs, counted on the model itself, and what that leaves to scoring and to the survivors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch.random import fork_rng

from ..config import QTuningSFTConfig
from ..host.ledger import Ledger
from .sample import Sample

# Tokens of the two rows that are counted: enough for a straight line, and less than any card is short of.
PROBED = (32, 64)
# Share of the memory that is free which survivors may take: on a card the rest is fragmentation's, on a CPU other
# programs use it too.
SHARE_OF_FREE = {"cpu": 0.5}
SHARE_OF_FREE_ON_ACCELERATORS = 0.9
# More tokens at once do not make scoring faster: a GPU is busy with these.
MOST_SCORED = 16_384
EVERYTHING = 2**62


@dataclass(frozen=True)
class Line:
    """Bytes that a batch needs beyond what is there before it: so many, and so many more for each token."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> "Line":
        """The line through two points `(tokens, bytes)`."""
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, first[1] - slope * first[0]), slope)

    def bytes(self, tokens: float) -> float:
        """What a batch of so many tokens needs."""
        return self.fixed + self.per_token * tokens

    def tokens(self, size: float) -> int:
        """The most tokens of a batch that needs no more than `size` bytes."""
        return max(0, int((size - self.fixed) / max(self.per_token, 1e-9)))


@dataclass(frozen=True)
class Needs:
    """What scoring needs, training as the run does it, and training without gradient checkpointing, if it may."""

    scoring: Line
    training: Line
    free: Line | None = None

    def scoring_tokens(self, trained_tokens: float) -> int:
        """
        Tokens to score at once, so that scoring needs no more than a micro-batch of `trained_tokens` tokens.

        What does not grow with the tokens is taken to be no less in scoring: 4-bit weights are unpacked for many
        tokens, and not for the few that are counted.
        """
        ratio = self.training.per_token / max(self.scoring.per_token, 1e-9)
        return min(MOST_SCORED, int(ratio * trained_tokens))


@dataclass(eq=False)
class MemoryBudget:
    """
    Tokens at a time that survivors go without gradient checkpointing.

    Args:
        args ([`QTuningSFTConfig`]): The run's.
        sharded (`bool`): Whether parameters are gathered by all processes together: nothing is counted then.
        needs ([`Needs`], *optional*): What batches need, once it is counted.
        free_tokens (`int`): Tokens, padding included, of a micro-batch without checkpointing; 0 for none.
    """

    args: QTuningSFTConfig
    sharded: bool = False
    needs: Needs | None = None
    free_tokens: int = 0
    _measured: bool = False

    def __post_init__(self) -> None:
        if self.args.survivor_checkpointing == "false":
            self.free_tokens = EVERYTHING
        elif self.args.survivor_checkpointing == "auto":
            self.free_tokens = self.args.survivor_batch_tokens or 0

    @property
    def follows_memory(self) -> bool:
        """Whether the survivors' tokens at a time are as many as the memory that is there allows."""
        auto = self.args.survivor_checkpointing == "auto" and self.args.survivor_batch_tokens is None
        return auto and bool(self.args.gradient_checkpointing) and not self.sharded

    @property
    def counts(self) -> bool:
        """Whether batches must be counted: on a CPU scoring is bounded by its caches, not by memory."""
        scores = "scores" in (*self.args.sample_needs, *self.args.token_needs)
        sized = scores and self.args.scoring_batch_tokens is None and self.args.device.type != "cpu"
        return self.follows_memory or (sized and not self.sharded and not self.args.torch_compile)

    def begin_step(self, count: Callable[[], Needs]) -> None:
        """Count what batches need, once, and look at the memory: on a CPU at once, on a GPU after the first step."""
        first = self.needs is None
        if first and self.counts:
            try:
                self.needs = count()
            except torch.OutOfMemoryError:  # a card that full has no room for more than the recipe's own settings
                self.needs = Needs(Line(0, 1), Line(0, 1))
        # With its first step the optimizer makes its states, which take their share of a card.
        late_enough = self.args.device.type == "cpu" or not first
        if self.needs is not None and self.needs.free is not None and late_enough and not self._measured:
            self.allow(self.needs.free, free_memory(self.args.device))

    def allow(self, free: Line, size: float) -> None:
        """Let survivors go without checkpointing, which needs `free`, as far as `size` bytes of memory allow."""
        self._measured = True
        share = SHARE_OF_FREE.get(self.args.device.type, SHARE_OF_FREE_ON_ACCELERATORS)
        self.free_tokens = free.tokens(share * size)

    def shrink(self, tokens: int) -> None:
        """After a micro-batch of so many tokens was too large: half of them are tried from now on."""
        self.free_tokens = min(self.free_tokens, tokens // 2)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take: on a GPU what is free and what its allocator holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def count_needs(
    model: Any,
    device: torch.device,
    collate: Callable[[list[Sample]], dict[str, Any]],
    score: Callable[[list[Sample]], Any],
    free: Callable[[], Any] | None,
    autocast: Callable[[], Any],
    longest: int,
) -> Needs:
    """
    What batches of the model need, counted on two short rows; generators and gradients are left as they were.

    Args:
        model: The model that is trained, with TRL's fused head, and no gradients yet.
        device (`torch.device`): Where it is.
        collate (`Callable`): Makes the model's arguments, on its device, of samples.
        score (`Callable`): Scores samples.
        free (`Callable`, *optional*): A context in which the model keeps its activations, if it is to be counted.
        autocast (`Callable`): The context in which it is trained.
        longest (`int`): The most tokens that the model takes.
    """

    def train(samples: list[Sample]) -> None:
        with autocast():
            outputs = model(**collate(samples), use_cache=False, fused_lm_head=True)
        (-outputs.log_probs.sum()).backward()

    def train_free(samples: list[Sample]) -> None:
        assert free is not None
        with free():
            train(samples)

    was_training, before = model.training, {name: p.grad for name, p in model.named_parameters()}
    model.train()
    lengths = [min(tokens, longest) for tokens in PROBED]
    lengths[0] = min(lengths[0], lengths[1] // 2)
    lines = []
    with fork_rng(devices=[device] if device.type == "cuda" else []):
        for work in (score, train, train_free)[: 2 if free is None else 3]:
            points = []
            for length in lengths:
                points.append((length, _bytes_of(model, device, partial(work, [_sample(length)]))))
                for name, parameter in model.named_parameters():
                    parameter.grad = before[name]
            lines.append(Line.through(*points))
    model.train(was_training)
    return Needs(*lines)


def _sample(tokens: int) -> Sample:
    ids = np.arange(tokens, dtype=np.int64) % 8
    return Sample(ids, np.where(ids % 2 == 0, ids, -100), sample_id=-1)


def _bytes_of(model: Any, device: torch.device, work: Callable[[], Any]) -> int:
    """The most bytes alive on the device during `work`, beyond the model's own."""
    ledger = Ledger(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.track(tensor)
    own = ledger.bytes
    ledger.start_peak()
    with ledger:
        work()
    return ledger.peak.bytes - own
