"""What batches of a model need of memory, counted on the model itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.random import fork_rng

from ..host.head import lean_lm_head
from ..host.ledger import Ledger
from ..host.loop import without_checkpointing
from .memory import Line, Needs
from .micro_batches import Batcher, Row
from .sample import Sample
from .scoring import Scorer

# Tokens of the two rows that are counted: enough for a straight line, and less than any card is short of.
PROBED = (32, 64)


def count_needs(model: Any, scorer: Scorer, batcher: Batcher, with_free: bool) -> Needs:
    """
    Count on two short rows what batches need; generators and gradients are left as they were.

    Args:
        model: The model that is trained, with TRL's fused head, and no gradients yet.
        scorer ([`Scorer`]): Scores, perhaps by another model.
        batcher ([`Batcher`]): Collates.
        with_free (`bool`): Whether training without gradient checkpointing is counted, too.
    """
    args, device = batcher.args, batcher.args.device

    def score(sample: Sample) -> None:
        scorer.forward_all(scorer.scoring_model(model), [sample], [0], 1)

    def train(sample: Sample) -> None:
        batch = send_to_device(batcher.collator([Row([sample], packed=args.packing).as_example()]), device)
        with batcher.accelerator.autocast():
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
        (-outputs.log_probs.sum()).backward()

    def train_free(sample: Sample) -> None:
        with without_checkpointing(model):
            train(sample)

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBED[1]
    most = min(PROBED[1], longest)
    lengths = (min(PROBED[0], most // 2), most)
    was_training, before = model.training, {name: p.grad for name, p in model.named_parameters()}
    model.train()
    lines = []
    with fork_rng(devices=[device] if device.type == "cuda" else []), lean_lm_head(device):
        for work in (score, train, train_free) if with_free else (score, train):
            points = []
            for length in lengths:
                points.append((length, bytes_of(model, device, partial(work, _sample(length)))))
                for name, parameter in model.named_parameters():
                    parameter.grad = before[name]
            lines.append(Line.through(*points))
    model.train(was_training)
    return Needs(*lines)


def _sample(tokens: int) -> Sample:
    ids = np.arange(tokens, dtype=np.int64) % 8
    return Sample(ids, np.where(ids % 2 == 0, ids, -100), sample_id=-1)


def bytes_of(model: Any, device: torch.device, work: Callable[[], Any]) -> int:
    """The most bytes alive on the device during `work`, beyond the model's own."""
    ledger = Ledger(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.track(tensor)
    own = ledger.bytes
    ledger.start_peak()
    with ledger:
        work()
    return ledger.peak.bytes - own
