"""A ledger of tensors: bytes that are alive, their peak by part, and floating-point operations."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# CUDA's allocator hands out multiples of this many bytes.
BLOCK = 512
HEAD = "head"


@dataclass
class Peak:
    """
    The most bytes that were alive at once.

    Args:
        bytes (`int`): All of them together.
        by_part (`Counter`): The same by the part that had made them.
        most (`Counter`): The most that each part had alive, at whatever moment.
    """

    bytes: int = 0
    by_part: Counter = field(default_factory=Counter)
    most: Counter = field(default_factory=Counter)


class Ledger(TorchDispatchMode):
    """
    Counts, while it is open, the bytes of every storage that an operation makes or hands on, and the operations.

    A storage counts from the first operation that returns a tensor of it until it is freed, rounded up as CUDA's
    allocator does. Memory that a kernel takes and gives back by itself is not seen.

    Args:
        stand_in (`Callable`, *optional*):
            Takes an operation's `func, args, kwargs` and returns what it would return, or `NotImplemented`: for
            operations that fake tensors have no answer to.
        device (`torch.device`, *optional*): Count the storages of this device only.
    """

    def __init__(self, stand_in: Callable[..., Any] | None = None, device: torch.device | None = None):
        super().__init__()
        self.device = device
        self.stand_in = stand_in
        self.part_name = "other"
        self.alive: dict[int, tuple[Any, int, str]] = {}  # storage -> (weak reference, bytes, part)
        self.bytes = 0
        self.by_part: Counter = Counter()
        self.peak = Peak()
        self.flops: Counter = Counter()  # by part: "attention", "head", and "layers" for the rest

    def start_peak(self) -> None:
        """Forget the peak so far; the next one starts from what is alive."""
        self.peak = Peak(self.bytes, Counter(self.by_part), Counter(self.by_part))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """While it is open, storages that are made count as those of `name`."""
        own, self.part_name = self.part_name, name
        try:
            yield
        finally:
            self.part_name = own

    def track(self, tensor: Tensor) -> None:
        """Count the tensor's storage, if it is not counted yet."""
        if self.device is not None and tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self.alive.get(key)
        if (known is not None and known[0]() is storage) or storage.nbytes() == 0:
            return
        size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
        part = self.part_name

        def gone(reference: Any) -> None:
            entry = self.alive.get(key)
            if entry is not None and entry[0] is reference:
                del self.alive[key]
            self.bytes -= size
            self.by_part[part] -= size

        self.alive[key] = (weakref.ref(storage, gone), size, part)
        self.bytes += size
        self.by_part[part] += size
        self.peak.most[part] = max(self.peak.most[part], self.by_part[part])
        if self.bytes > self.peak.bytes:
            self.peak.bytes, self.peak.by_part = self.bytes, Counter(self.by_part)

    def add_flops(self, flops: int, attention: bool = False) -> None:
        """Count floating-point operations, two for a multiplication with an addition."""
        part = HEAD if self.part_name == HEAD else "attention" if attention else "layers"
        self.flops[part] += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = NotImplemented if self.stand_in is None else self.stand_in(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.add_flops(flop_registry[packet](*args, **kwargs, out_val=out), "attention" in str(packet))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return out
