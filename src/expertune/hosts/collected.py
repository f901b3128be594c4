"""What Transformers collects on the way through a model, such as the routers' logits for a balance loss.

Its hooks append tensors to lists, past what layers return. Who runs a layer other than by a call (a recording, a
checkpoint) gives the hooks lists of its own, and hands on what they hold then.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.utils import output_capturing

from expertune.memory.checkpoint import LayerCheckpoint

_ROUTER_LOGITS = "router_logits"


def names() -> tuple[str, ...]:
    """What is collected from the model that runs now."""
    return tuple(_lists())


@contextmanager
def catching(names: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Lists in place of those that the hooks append to, by their names."""
    caught: dict[str, list[Any]] = {name: [] for name in names}
    token = output_capturing._active_collector.set(caught)
    try:
        yield caught
    finally:
        output_capturing._active_collector.reset(token)


def deliver(caught: dict[str, list[Any]]) -> None:
    """Append to the lists of the model that runs now."""
    lists = _lists()
    for name, values in caught.items():
        lists[name].extend(values)


def checkpoint_collecting(ours: LayerCheckpoint, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As our checkpoint of a layer whose forward is `returning` what is collected.

    A node of autograd carries gradient through what a layer returns, and past that none. Where anything but the
    routers' logits is collected, torch's way is taken that is not reentrant.
    """
    if torch.compiler.is_compiling() or set(names()) <= {_ROUTER_LOGITS}:
        return ours(function, *args, **kwargs)
    return ours.by_torch(function, *args, **kwargs)


def returning(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[Any], Any] | None]:
    """A layer's forward that returns the routers' logits as well, however often it runs, if they are collected.

    Returns:
        the forward, and what hands the logits on and makes of its result what the layer returns; None for nothing.
    """
    if names() != (_ROUTER_LOGITS,):
        return function, None
    return partial(_with_logits, function), _deliver_logits


def _deliver_logits(out: tuple[Any, ...]) -> Any:
    num_logits, first, *others = out
    deliver({_ROUTER_LOGITS: others[:num_logits]})
    return (first, *others[num_logits:]) if len(others) > num_logits else first


def _with_logits(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The number of a layer's routers, then what it returns, with their logits after its first output."""
    with catching((_ROUTER_LOGITS,)) as caught:
        out = function(*args, **kwargs)
    first, *others = out if isinstance(out, tuple) else (out,)
    logits = caught[_ROUTER_LOGITS]
    return len(logits), first, *logits, *others


def _lists() -> dict[str, list[Any]]:
    collected = output_capturing._active_collector.get() or {}
    return {name: values for name, values in collected.items() if isinstance(values, list)}
