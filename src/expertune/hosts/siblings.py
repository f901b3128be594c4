"""Linears with LoRA that read the same tokens, as those of queries, keys and values do, computed as one.

The host calls one after another, each by itself. While an attention runs, the first that is called computes what the
others will be asked for; who is asked then gives what it was, if it is asked for the same. So the host's code runs as
it is.

That is so in recordings alone (`graphs/`), where nobody looks on, and one backward passes through all. Elsewhere each
is a node of its own, as the host's are: a checkpoint may lie around one of them, gradients may be taken of one and then
of another, and what is not used wants no gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from expertune.hosts.current import Current, recording
from expertune.lora_linears import lora_linears
from expertune.split_linear import Linear

_NAMES = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")  # those of an attention that read its input


class _Made(NamedTuple):
    """What has been computed for one of them.

    Args:
        x: of what, and its version then.
        has_history: whether autograd saw it.
        out: the result.
    """

    x: Tensor
    version: int
    has_history: bool
    out: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether this is what is asked for of `x`."""
        return self.x is x and (self.version, self.has_history) == (x._version, torch.is_grad_enabled())


class _Siblings:
    """Of one call of an attention.

    Args:
        layers: those that read its input.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._made: dict[nn.Module, _Made] = {}

    def compute(
        self, layer: nn.Module, x: Tensor, linear: Linear, linear_of: Callable[[nn.Module, Tensor], Linear | None]
    ) -> Tensor:
        """See `compute`."""
        made = self._made.pop(layer, None)
        if made is not None and made.is_of(x):
            return made.out
        others: dict[nn.Module, Linear] = {}
        if layer in self._layers and not self._made:
            read = ((other, linear_of(other, x)) for other in self._layers if other is not layer)
            others = {other: its for other, its in read if its is not None}
        out, *beside = lora_linears(x, [linear, *others.values()])
        for other, y in zip(others, beside, strict=True):
            self._made[other] = _Made(x, x._version, torch.is_grad_enabled(), y)
        return out


_running: Current[_Siblings] = Current()


def together(attention: nn.Module) -> AbstractContextManager[None]:
    """Around a call of an attention, whose linears are computed together where the call is recorded."""
    if not recording.value:
        return nullcontext()
    return _running.being(_Siblings([layer for name in _NAMES if (layer := attention._modules.get(name)) is not None]))


def compute(
    layer: nn.Module, x: Tensor, linear: Linear, linear_of: Callable[[nn.Module, Tensor], Linear | None]
) -> Tensor:
    """What a linear with LoRA gives, with what its siblings will be asked for.

    Args:
        layer: that is called.
        x: `(…, I)`.
        linear: what it computes, with an adapter.
        linear_of: what another computes of `x`, if that is of the same kind and it can be computed beside; else None.
    """
    siblings = _running.value
    return lora_linears(x, [linear])[0] if siblings is None else siblings.compute(layer, x, linear, linear_of)
