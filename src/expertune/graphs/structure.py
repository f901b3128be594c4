"""Arguments and results of a module taken apart into tensors and the rest, which can be compared, and put together."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


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
        value: a tensor, a tuple, list or dict of such, or anything else.
        tensors: is appended to.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return Place(tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
    if isinstance(value, tuple | list):
        return (type(value), *[take_apart(each, tensors) for each in value])
    if isinstance(value, dict):
        return (dict, *[(key, take_apart(each, tensors)) for key, each in value.items()])
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
