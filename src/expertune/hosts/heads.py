"""Norms of an attention's queries and keys, rotated in the pass that computes them.

The host norms all heads, turns them about and hands them to its rotation. While an attention runs whose rotation is
ours, ours of these norms gives what the host asks for, and keeps beside it what the rotation will make of it; the
rotation then takes that, if it is asked for the same heads, as the norms gave them, by the same angles.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from expertune.attention.normed_heads import norm_and_rotate, why_not
from expertune.attention.rotary import Rotation

_NORMS = ("q_norm", "k_norm")


class _Made(NamedTuple):
    """Heads that have been normed, and these turned."""

    y_BTHD: Tensor
    turned_BTHD: Tensor

    def becomes(self, x_BHTD: Tensor) -> bool:
        """Whether heads are these norms turned about, and nothing else: neither written to nor listened to."""
        y = self.y_BTHD
        if y.is_inference() or y._version or y._backward_hooks or y.retains_grad:  # the first knows no versions
            return False
        about = y.detach().transpose(1, 2)
        if (x_BHTD.data_ptr(), x_BHTD.shape, x_BHTD.stride()) != (about.data_ptr(), about.shape, about.stride()):
            return False
        node = x_BHTD.grad_fn
        if node is None or y.grad_fn is None:
            return node is y.grad_fn
        return node.name() == "TransposeBackward0" and node.next_functions == ((y.grad_fn, y.output_nr),)


class _Heads:
    """Of one call of an attention.

    Args:
        attention: that runs.
        angles: cosines and sines that it was given.
        rotation: what it makes of them.
    """

    def __init__(self, attention: nn.Module, angles: tuple[Tensor, Tensor], rotation: Rotation) -> None:
        self._norms = [attention._modules.get(name) for name in _NORMS]
        self._angles, self._rotation = angles, rotation
        self._made: dict[nn.Module | None, _Made] = {}

    def norm(self, norm: nn.Module, x_BTHD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor | None:
        """See `normed`."""
        if not any(norm is each for each in self._norms) or norm._forward_hooks or _global_forward_hooks:
            return None  # a hook may write to norms unseen
        if why_not(x_BTHD, weight_D, *self._angles, self._rotation) is not None:
            return None
        made = _Made(*norm_and_rotate(x_BTHD, weight_D, eps, offset, *self._angles, self._rotation))
        self._made[norm] = made
        return made.y_BTHD

    def take(self, q_BHTD: Tensor, k_BHTD: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        """See `turned`."""
        of_q, of_k = (self._made.pop(norm, None) for norm in self._norms)
        are_same = all(a is b for a, b in zip(angles, self._angles, strict=True))
        if of_q is None or of_k is None or not (are_same and of_q.becomes(q_BHTD) and of_k.becomes(k_BHTD)):
            return None
        return of_q.turned_BTHD.transpose(1, 2), of_k.turned_BTHD.transpose(1, 2)


_running = threading.local()


@contextmanager
def rotated_by(rotation: Rotation | None, attention: nn.Module, angles: Any) -> Iterator[None]:
    """Around a call of an attention.

    Args:
        rotation: ours; None for none.
        attention: the module.
        angles: cosines and sines, if it was given these.
    """
    before = getattr(_running, "heads", None)
    is_given = isinstance(angles, tuple) and len(angles) == 2 and all(isinstance(each, Tensor) for each in angles)
    _running.heads = _Heads(attention, angles, rotation) if is_given and rotation is not None else None
    try:
        yield
    finally:
        _running.heads = before


def normed(norm: nn.Module, x_BTHD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor | None:
    """What a norm gives, if it is of heads that will be rotated in the call that runs; else None.

    Args:
        norm: the module.
        x_BTHD, weight_D, eps, offset: as for `rms_norm`.
    """
    heads: _Heads | None = getattr(_running, "heads", None)
    return None if heads is None else heads.norm(norm, x_BTHD, weight_D, eps, offset)


def turned(q_BHTD: Tensor, k_BHTD: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the rotation makes of queries and keys, if the norms of the call that runs have made it; else None."""
    heads: _Heads | None = getattr(_running, "heads", None)
    return None if heads is None else heads.take(q_BHTD, k_BHTD, (angles[0], angles[1]))
