"""What Transformers collects on the way through a model, such as the routers' logits for a balance loss.

Its hooks append tensors to lists, past what layers return. Who runs a layer other than by a call (a recording, a
checkpoint) gives the hooks lists of its own, and hands on what they hold then.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import output_capturing

from expertune.memory.checkpoint import checkpoint_layer

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


def checkpoint_collecting(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `checkpoint_layer`, where what is collected keeps its gradient.

    torch's reentrant checkpoint carries none past what a layer returns. So the layer returns the routers' logits too.
    Where anything else is collected, it takes the other way.
    """
    collected = () if torch.compiler.is_compiling() else names()
    if not collected:
        return checkpoint_layer(function, *args, **kwargs)
    bound = partial(function, **kwargs)
    if collected != (_ROUTER_LOGITS,):
        return checkpoint(bound, *args, use_reentrant=False)
    function = partial(_with_logits, bound.func, *bound.args, **bound.keywords)
    num_logits, out, *logits = checkpoint_layer(function, *args)
    deliver({_ROUTER_LOGITS: logits[:num_logits]})
    return (out, *logits[num_logits:]) if len(logits) > num_logits else out


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
