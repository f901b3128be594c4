"""Arguments and results of a module taken apart into tensors and the rest, which can be compared, and put together."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NotPlainError(RuntimeError):
    """An argument or result is of a type that is not known to hold no tensors."""


class Place(NamedTuple):
    """Stands for a tensor: all of it but its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device: Any
    requires_grad: bool


def take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """What is left of `value` once its tensors have gone to `tensors`: tuples, places and what it held beside them.

    Args:
        value: a tensor, a number, a name, or a tuple, list or dict of such.
        tensors: is appended to.

    Raises:
        NotPlainError: it holds anything else. An object may hold tensors, and a recording would read those of one call
            for ever; it may differ from call to call, and what is kept for each kind of call would keep it alive.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return Place(tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
    kind = type(value)
    if kind in (tuple, list):
        return (kind, *[take_apart(each, tensors) for each in value])
    if kind is dict:
        return (dict, *[(key, take_apart(each, tensors)) for key, each in value.items()])
    if kind not in _PLAIN:
        raise NotPlainError(f"it takes or returns a {kind.__name__}")
    return value


def put_together(rest: Any, tensors: Iterator[Tensor]) -> Any:
    """The value again, with other tensors."""
    if isinstance(rest, Place):
        return next(tensors)
    if isinstance(rest, tuple) and rest and rest[0] is dict:
        return {key: put_together(each, tensors) for key, each in rest[1:]}
    if isinstance(rest, tuple) and rest and rest[0] in (tuple, list):
        return rest[0](put_together(each, tensors) for each in rest[1:])
    return rest
