"""In which way each layer of a step spares memory: none, where the card has room for what its backward needs.

The first step checkpoints every layer. As each runs again, the planner notes what it allocates; from the peak of the
step it knows what everything else takes. From then on the last layers keep, as many as fit: backward frees them first,
so they are gone by the time the gradients of the others have come. A layer that is replayed (`graphs/`) has memory for
what it keeps, so it keeps wherever the rest of the step fits. A batch with more tokens than any before is planned like
the first one. A step for which the card is too small even so is a lean one, as a whole: nothing is kept or noted, and
what it took says whether the next one of its length need be. Whatever is kept, the numbers are the same.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from expertune.memory.meter import Meter, meter_of
from expertune.memory.need import Need
from expertune.whole import OfAModel


class Way(Enum):
    """What a layer does in one step, from its forward to its backward."""

    KEEP = "it keeps what its backward needs"
    RUN_AGAIN = "it keeps its input and runs again"
    LEAN = "its input moves to the host, and it runs again with its experts in tiles, where its batch is long enough"


class _Layer(NamedTuple):
    """What `Planner.layer` is told."""

    module: nn.Module
    width: int
    holds: Callable[[int], bool]


def _no(_tokens: int) -> bool:
    return False


class Planner(OfAModel):
    """The plan of one model, a part a device. Layers are numbered in the order in which a step runs them.

    Args:
        meter_of: the meter of a device.
        lean_from: tokens from which the lean way spares anything.
    """

    def __init__(self, meter_of: Callable[[torch.device], Meter | None] = meter_of, lean_from: int = 0) -> None:
        self._meter_of = meter_of
        self._lean_from = lean_from
        self._layers: dict[int, _Layer] = {}
        self._parts: dict[torch.device, _Part | None] = {}

    def layer(self, number: int, layer: nn.Module, width: int, holds: Callable[[int], bool] = _no) -> "LayerPlan":
        """The plan of one layer, in place of what was said of it before.

        Args:
            number: of the layer.
            layer: the module.
            width: numbers a token that its second run and its backward hold at once, by an estimate.
            holds: whether what it keeps of so many tokens has its memory already.
        """
        self._layers[number] = _Layer(layer, width, holds)
        return LayerPlan(self, number, layer)

    def way(self, number: int, x: Tensor, device: torch.device) -> Way:
        """Of a layer that runs on `x`, `(…, tokens, D)`, on a device. Asked once a step and layer, in forward."""
        part = self._part(device)
        if part is None:
            return Way.RUN_AGAIN
        if part.begins_with(number):
            tokens = _tokens(x)
            may_be_lean = tokens >= self._lean_from
            part.begin(tokens, partial(self._estimate, x, device), self._holds, may_be_lean=may_be_lean)
        return part.way(number)

    def rest(self, device: torch.device) -> float:
        """The most bytes that a step has taken on a device with every layer checkpointed; in a lean step, all."""
        part = self._part(device)
        return 0 if part is None else part.rest

    @contextmanager
    def running_again(self, number: int, x: Tensor, device: torch.device) -> Iterator[None]:
        """Around the second run of a layer whose way that is."""
        part = self._part(device)
        before = 0 if part is None else part.meter.allocated()
        try:
            yield
        finally:  # the checkpoint that is not reentrant leaves by an exception once it has what it needs
            if part is not None:
                part.note(number, part.meter.allocated() - before, _tokens(x))

    def _estimate(self, x: Tensor, device: torch.device) -> int:
        """The bytes of all inputs on a device, and of one layer's second run: what a lean step spares, at most."""
        widths = [each.width for each in self._layers.values() if _device(each.module, x) == device]
        return x.nbytes * len(widths) + _tokens(x) * max(widths, default=0) * x.itemsize

    def _holds(self, number: int, tokens: int) -> bool:
        return self._layers[number].holds(tokens)

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

    def way(self, x: Tensor) -> Way:
        """See `Planner.way`."""
        return self.planner.way(self.number, x, _device(self.layer, x))

    def running_again(self, x: Tensor) -> AbstractContextManager[None]:
        """See `Planner.running_again`."""
        return self.planner.running_again(self.number, x, _device(self.layer, x))


def _device(layer: nn.Module, x: Tensor) -> torch.device:
    """Where a layer computes: `x` may lie where the layer before did, and be moved by a hook of Accelerate."""
    weight = _first_parameter(layer)
    return x.device if weight is None or weight.is_meta else weight.device  # meta: loaded when it runs


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """`next(module.parameters(), None)` without the names and sets that torch makes on the way: asked in each call."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


class _Step(NamedTuple):
    """A step that is measured, as it began.

    Args:
        is_lean: whether its layers are.
        tokens: of its batch.
        estimate: of what a lean step spares at most, in bytes.
        allocated: the bytes that lay there.
        peak: the most so far.
    """

    is_lean: bool
    tokens: int
    estimate: int
    allocated: int
    peak: int


class _Part:
    """The plan of the layers on one device."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._bytes: dict[int, float] = {}  # a layer keeps for a token
        self.rise = 0  # the most that a fully checkpointed step took beyond what lay there at its start
        self._most_tokens = 0  # of a fully checkpointed step
        self._need = Need()
        self._step: _Step | None = None
        self._is_lean = False
        self._kept: frozenset[int] = frozenset()
        self._last = -1

    def begins_with(self, layer: int) -> bool:
        """Whether a layer is the first of a step."""
        return layer <= self._last or self._last < 0

    def begin(
        self, tokens: int, estimate: Callable[[], int], holds: Callable[[int, int], bool], *, may_be_lean: bool
    ) -> None:
        """Plan a step.

        Args:
            tokens: of its batch.
            estimate: of the bytes that a lean step spares at most.
            holds: whether what a layer keeps of so many tokens has its memory already.
            may_be_lean: whether the step is long enough for that.
        """
        self._end()
        free, need = self.meter.free(), self._need.of(tokens)
        self._is_lean = may_be_lean and (estimate() if need is None else need) > free
        is_new = tokens > self._most_tokens or not self._bytes
        self._kept = frozenset()
        if self._is_lean or is_new:
            self._step = _Step(self._is_lean, tokens, estimate(), self.meter.allocated(), self.meter.peak())
        else:
            self._kept = frozenset(self._fitting(tokens, free - self.rise, holds))
        if not self._is_lean:
            self._most_tokens = max(tokens, self._most_tokens)

    def way(self, layer: int) -> Way:
        """Of a layer of the step that runs."""
        self._last = layer
        if self._is_lean:
            return Way.LEAN
        return Way.KEEP if layer in self._kept else Way.RUN_AGAIN

    @property
    def rest(self) -> float:
        """See `Planner.rest`."""
        return math.inf if self._is_lean else self.rise

    def note(self, layer: int, num_bytes: int, tokens: int) -> None:
        """What the second run of a layer has allocated."""
        self._bytes[layer] = max(num_bytes / tokens, self._bytes.get(layer, 0.0))

    def _end(self) -> None:
        """Learn from the step before, if it was measured."""
        if (step := self._step) is None:
            return
        self._step = None
        peak = self.meter.peak()
        rise = peak - step.allocated
        if not step.is_lean:
            self.rise = max(self.rise, rise)
        # where an earlier step took more, this one's own peak is not known
        least = 0 if peak == step.peak else rise
        self._need.learn(step.tokens, least, rise + (step.estimate if step.is_lean else 0))

    def _fitting(self, tokens: int, room: float, holds: Callable[[int, int], bool]) -> Iterator[int]:
        """The layers that hold memory already, and the last whose bytes for so many tokens fit into `room`."""
        if room < 0:
            return
        for layer in sorted(self._bytes, reverse=True):
            if not holds(layer, tokens):
                room -= self._bytes[layer] * tokens
                if room < 0:
                    continue
            yield layer
