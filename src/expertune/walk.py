"""What a pass of the walk is given: the projections of the experts, what stays the same, and what is kept."""

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

from torch import Tensor

from expertune import lora
from expertune.activations import Gate
from expertune.backends.protocol import Backend
from expertune.grouped_linear import GroupedLinear
from expertune.shapes import Dispatch, ExpertsLayout, LoraFactors, RoutingShape, Tensors
from expertune.weights.dense import DenseWeights


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One of the two linears of the experts.

    Args:
        weight: `(E, O, I)`, or `(E, I, O)` where the layout is transposed.
        bias: `(E, O)` or None.
        adapters: the active LoRA adapters, in the order in which they are joined.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[LoraFactors, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertsStep:
    """What stays the same from batch to batch: how the experts lie, their gate, and the backend that multiplies.

    Compared by identity, because it is looked up in every pass. Its number in `STEPS` stands for it where only numbers
    can be passed.
    """

    layout: ExpertsLayout
    gate: Gate
    backend: Backend
    number: int = field(init=False, default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        STEPS[self.number] = self

    def __deepcopy__(self, _memo: dict[int, Any]) -> "ExpertsStep":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew where it is unpickled: another process has given its number to another step."""
        return partial(ExpertsStep, layout=self.layout, gate=self.gate, backend=self.backend), ()

    def dispatch(self, expert_TK: Tensor) -> Dispatch:
        """The rows of a batch, sorted by expert, as the backend reads them.

        Args:
            expert_TK: the experts that the router chose, integers below `E`.
        """
        return self.backend.steps().dispatch(expert_TK, self.layout.num_experts)


STEPS: "WeakValueDictionary[int, ExpertsStep]" = WeakValueDictionary()


def flatten(projections: tuple[Projection, Projection]) -> tuple[Tensors, tuple[tuple[float, ...], ...]]:
    """`w1, b1, w2, b2`, then `a, b` of each adapter of the two projections; and the adapters' scales, by projection."""
    first, second = projections
    adapters = (*first.adapters, *second.adapters)
    factors = lora.alternate([adapter.a for adapter in adapters], [adapter.b for adapter in adapters])
    scales = tuple(tuple(adapter.scale for adapter in p.adapters) for p in projections)
    return (first.weight, first.bias, second.weight, second.bias, *factors), scales


def packed_is_small(projections: tuple[Projection, Projection], routing: RoutingShape, layout: ExpertsLayout) -> bool:
    """Whether the packed factors have at most a third as many numbers as `h_NG`, which is kept for backward anyway.

    They are then kept beside it: packing them again would read all of the adapters once more.
    """
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    packed = sum(adapter.a.numel() + adapter.b.numel() for adapter in adapters)
    return 3 * packed <= routing.num_rows * layout.first_width


class Walk(NamedTuple):
    """What a pass needs beside tensors.

    Args:
        step: layout, gate and backend.
        scales: of the adapters of each projection.
        routing: the sizes of the routing.
        leaves_out: whether the output is left out.
        keeps_packed: whether the packed factors are kept from forward to backward.
        overwrites: in backward, whether what was saved may be written over.
        postpones: in backward, whether `Operands` are given in place of the factors' gradients.
        wants: in backward, which of `x, weight, w1, b1, w2, b2` and of the factors want a gradient.
    """

    step: ExpertsStep
    scales: tuple[tuple[float, ...], ...]
    routing: RoutingShape
    leaves_out: bool = False
    keeps_packed: bool = False
    overwrites: bool = False
    postpones: bool = False
    wants: tuple[bool, ...] = ()

    @property
    def num_parts(self) -> int:
        """How many tensors `w1, b1, w2, b2` and the factors are."""
        return 4 + self.num_factors

    @property
    def num_factors(self) -> int:
        """How many the factors are."""
        return 2 * sum(map(len, self.scales))

    @property
    def wants_factors(self) -> tuple[bool, bool]:
        """Whether any LoRA factor of the first and of the second projection wants a gradient."""
        factors = self.wants[6:]
        cut = 2 * len(self.scales[0])
        return any(factors[:cut]), any(factors[cut:])

    def linears(self, tensors: Tensors) -> "tuple[Dispatch, GroupedLinear, GroupedLinear]":
        """The routing and both linears, from its words, then `w1, b1, w2, b2, a, b, a, b, …`."""
        words, w1, b1, w2, b2, *factors = tensors
        routing = Dispatch(self.routing, cast(Tensor, words))
        flat = iter(factors)
        adapters = [
            tuple(LoraFactors(a=cast(Tensor, next(flat)), b=cast(Tensor, next(flat)), scale=s) for s in scales)
            for scales in self.scales
        ]
        transposed = self.step.layout.is_transposed
        steps = self.step.backend.steps()
        return (
            routing,
            GroupedLinear(steps, routing, DenseWeights(cast(Tensor, w1), transposed), b1, adapters[0]),
            GroupedLinear(steps, routing, DenseWeights(cast(Tensor, w2), transposed), b2, adapters[1]),
        )


class Made(NamedTuple):
    """What forward makes that backward reads.

    Args:
        h_NG: before the gate.
        mid1_NR, mid2_NR: of the two projections, None without adapters.
        a1_ERI, b1_EOR, a2_ERI, b2_EOR: the packed factors as `GroupedLinear.held` gives them, if they are kept.
    """

    h_NG: Tensor | None
    mid1_NR: Tensor | None
    mid2_NR: Tensor | None
    a1_ERI: Tensor | None = None
    b1_EOR: Tensor | None = None
    a2_ERI: Tensor | None = None
    b2_EOR: Tensor | None = None


NUM_MADE = len(Made._fields)


class Operands(NamedTuple):
    """What backward makes that the gradients of factors are computed from.

    Args:
        a_NF: after the gate.
        dmid2_NR: the gradient of the second mid, before the router's weight.
        dh_NG: of `h`.
        dmid1_NR: of the first mid.
    """

    a_NF: Tensor
    dmid2_NR: Tensor | None
    dh_NG: Tensor
    dmid1_NR: Tensor | None
