"""Which layers of a step keep what backward needs, and which compute it again: as many keep as the card has room for.

The first step checkpoints every layer. As each runs again, the planner notes what it allocates; from the peak of the
step it knows what everything else takes. From then on the last layers keep, as many as fit: backward frees them first,
so they are gone by the time the gradients of the others have come. A batch with more tokens than any before is planned
like the first one. Whatever is kept, the numbers are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_RESERVE = 1 / 16  # of a card's memory: what the allocator cannot use, and what other libraries take


class Meter(Protocol):
    """The memory of a device, in bytes."""

    def allocated(self) -> int:
        """By tensors, now."""
        ...

    def peak(self) -> int:
        """By tensors, at most so far."""
        ...

    def free(self) -> int:
        """What more tensors could take now, less a reserve."""
        ...


class CudaMeter:
    """The memory of a CUDA device as torch's allocator and the driver see it. Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """By tensors, now."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """By tensors, at most since someone last reset it."""
        return torch.cuda.max_memory_allocated(self._device)

    def room(self) -> int:
        """What the driver and the allocator have left: more cannot be had while others hold the rest."""
        return self._room_and_total()[0]

    def free(self) -> int:
        """`room`, less a reserve."""
        room, total = self._room_and_total()
        return room - int(total * _RESERVE)

    def _room_and_total(self) -> tuple[int, int]:
        unused = torch.cuda.memory_reserved(self._device) - self.allocated()
        free, total = torch.cuda.mem_get_info(self._device)
        return free + unused, total


def meter_of(device: torch.device) -> Meter | None:
    """None for a device whose memory is not counted: every layer is checkpointed there."""
    return CudaMeter(device) if device.type == "cuda" else None


def room_of(device: torch.device) -> int | None:
    """Bytes that tensors could still take on a device at most; None where memory is not counted."""
    return CudaMeter(device).room() if device.type == "cuda" else None


class Planner:
    """The plan of one model, a part a device. Layers are numbered in the order in which a step runs them.

    Args:
        meter_of: the meter of a device.
    """

    def __init__(self, meter_of: Callable[[torch.device], Meter | None] = meter_of) -> None:
        self._meter_of = meter_of
        self._parts: dict[torch.device, _Part | None] = {}

    def keeps(self, layer: int, tokens: int, device: torch.device) -> bool:
        """Whether a layer that runs on so many tokens on a device keeps what its backward needs."""
        part = self._part(device)
        return part is not None and part.keeps(layer, tokens)

    @contextmanager
    def running_again(self, layer: int, tokens: int, device: torch.device) -> Iterator[None]:
        """Around the second run of a checkpointed layer."""
        part = self._part(device)
        before = 0 if part is None else part.meter.allocated()
        try:
            yield
        finally:  # the checkpoint that is not reentrant leaves by an exception once it has what it needs
            if part is not None:
                part.note(layer, part.meter.allocated() - before, tokens)

    def _part(self, device: torch.device) -> "_Part | None":
        if device not in self._parts:
            meter = self._meter_of(device)
            self._parts[device] = None if meter is None else _Part(meter)
        return self._parts[device]


class LayerPlan(NamedTuple):
    """The plan of one layer, which runs on `x`, `(…, tokens, D)`.

    Args:
        planner: of its model.
        number: of the layer.
        layer: the module.
    """

    planner: Planner
    number: int
    layer: nn.Module

    def keeps(self, x: Tensor) -> bool:
        """See `Planner.keeps`."""
        return self.planner.keeps(self.number, _tokens(x), self._device(x))

    def running_again(self, x: Tensor) -> AbstractContextManager[None]:
        """See `Planner.running_again`."""
        return self.planner.running_again(self.number, _tokens(x), self._device(x))

    def _device(self, x: Tensor) -> torch.device:
        """Where it computes: `x` may lie where the layer before did, and be moved by a hook of Accelerate."""
        weight = next(self.layer.parameters(), None)
        return x.device if weight is None or weight.is_meta else weight.device  # meta: loaded when it runs


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


class _Part:
    """The plan of the layers on one device."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._bytes: dict[int, float] = {}  # a layer keeps for a token
        self._rise = 0  # the most that a fully checkpointed step took beyond what lay there at its start
        self._most_tokens = 0  # of a fully checkpointed step
        self._started: int | None = None  # with how many bytes one started, while it runs
        self._kept: frozenset[int] = frozenset()
        self._last = -1

    def keeps(self, layer: int, tokens: int) -> bool:
        if layer <= self._last or self._last < 0:
            self._begin(tokens)
        self._last = layer
        return layer in self._kept

    def note(self, layer: int, num_bytes: int, tokens: int) -> None:
        self._bytes[layer] = max(num_bytes / tokens, self._bytes.get(layer, 0.0))

    def _begin(self, tokens: int) -> None:
        if self._started is not None:
            self._rise = max(self._rise, self.meter.peak() - self._started)
            self._started = None
        if tokens > self._most_tokens or not self._bytes:
            self._most_tokens = max(tokens, self._most_tokens)
            self._started = self.meter.allocated()
            self._kept = frozenset()
        else:
            self._kept = frozenset(self._fitting(tokens, self.meter.free() - self._rise))

    def _fitting(self, tokens: int, room: float) -> Iterator[int]:
        """The last layers whose bytes for so many tokens fit into `room`."""
        for layer in sorted(self._bytes, reverse=True):
            room -= self._bytes[layer] * tokens
            if room < 0:
                return
            yield layer
