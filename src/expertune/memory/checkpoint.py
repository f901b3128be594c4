"""Gradient checkpointing of one layer: keep its input, compute the rest again in backward.

torch has two ways. The reentrant one runs the first forward without autograd and saves through no hook, which costs the
CPU far less; but it carries gradient through positional tensors alone, and none where no such tensor requires it, and
it hides a layer's parameters from DDP, which looks for those that a loss does not reach (Transformers' trainer asks it
to for a PEFT model). The other is right everywhere, and the one that `torch.compile` knows. A layer takes the first
where it is right.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layer(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function(*args, **kwargs)` and keep nothing but its inputs until backward.

    Args:
        function: the layer's forward; keywords bound to it by `functools.partial` count as keywords.
        args: its positional inputs, tensors or not.
        kwargs: its keyword inputs.
    """
    keywords = kwargs | (function.keywords if isinstance(function, partial) else {})
    is_right = _any_requires_grad(args) and not _any_requires_grad(keywords.values())
    use_reentrant = is_right and not torch.compiler.is_compiling() and not _is_one_of_many()
    return checkpoint(partial(function, **kwargs), *args, use_reentrant=use_reentrant)


def _is_one_of_many() -> bool:
    """Whether other processes may wait for gradients of this one."""
    return distributed.is_available() and distributed.is_initialized()


def _any_requires_grad(values: Iterable[Any], depth: int = 5) -> bool:
    """Whether a tensor that requires a gradient is among the values, or in what they hold: items or attributes.

    A cache of keys and values, for instance, holds layers that hold tensors.
    """
    for value in values:
        held: Iterable[Any] = ()
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, dict):
            held = value.values()
        elif isinstance(value, tuple | list):
            held = value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            held = vars(value).values()
        if held and depth and _any_requires_grad(held, depth - 1):
            return True
    return False
