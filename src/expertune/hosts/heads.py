"""Norms of an attention's queries and keys, rotated in the pass that computes them.

The host norms all heads, turns them about and hands them to its rotation. While an attention runs whose rotation is
ours, ours of these norms gives what the host asks for, and keeps beside it what the rotation will make of it; the
rotation then takes that, if it is asked for the same heads, as the norms gave them, by the same angles.

In recordings alone, as siblings (`siblings.py`) and for the same reasons.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from expertune.attention.normed_heads import norm_and_rotate, why_not
from expertune.attention.rotary import Rotation
from expertune.hosts.current import Current, recording

_NORMS = ("q_norm", "k_norm")


class _Made(NamedTuple):
    """Heads that have been normed, and these turned."""

    y_BTHD: Tensor
    turned_BTHD: Tensor

    def becomes(self, x_BHTD: Tensor) -> bool:
        """Whether heads are these norms turned about, which nobody has written to, and have their history."""
        y, node = self.y_BTHD, x_BHTD.grad_fn
        about = y.detach().transpose(1, 2)
        return (
            y._version == 0
            and self.turned_BTHD.grad_fn is y.grad_fn
            and (x_BHTD.shape, x_BHTD.stride()) == (about.shape, about.stride())
            and node is not None
            and node.name() == "TransposeBackward0"
            and node.next_functions == ((y.grad_fn, y.output_nr),)
        )


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
        if not any(norm is each for each in self._norms):
            return None
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


_running: Current[_Heads] = Current()


def rotated_by(rotation: Rotation | None, attention: nn.Module, angles: Any) -> AbstractContextManager[None]:
    """Around a call of an attention, whose norms are rotated so where the call is recorded.

    Args:
        rotation: ours; None for none.
        attention: the module.
        angles: cosines and sines, if it was given these.
    """
    if not recording.value or rotation is None:
        return nullcontext()
    are_given = isinstance(angles, tuple) and len(angles) == 2 and all(isinstance(each, Tensor) for each in angles)
    return _running.being(_Heads(attention, angles, rotation)) if are_given else nullcontext()


def normed(norm: nn.Module, x_BTHD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor | None:
    """What a norm gives, if it is of heads that will be rotated in the call that runs; else None.

    Args:
        norm: the module.
        x_BTHD, weight_D, eps, offset: as for `rms_norm`.
    """
    heads = _running.value
    return None if heads is None else heads.norm(norm, x_BTHD, weight_D, eps, offset)


def turned(q_BHTD: Tensor, k_BHTD: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the rotation makes of queries and keys, if the norms of the call that runs have made it; else None."""
    heads = _running.value
    return None if heads is None else heads.take(q_BHTD, k_BHTD, (angles[0], angles[1]))
