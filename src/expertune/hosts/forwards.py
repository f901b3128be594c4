"""The forward of one module, replaced on this instance and put back.

A hook of Accelerate, as `device_map` sets it, lies in `forward` and calls what it found there, which it keeps as
`_old_forward`. Ours lies below it, where the class's own would, whichever of both came first.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_OURS = __name__.partition(".")[0] + "."


def bind(modules: Iterable[nn.Module], forward: Callable[..., Any], *others: Any) -> list[nn.Module]:
    """Let modules run `forward(module, *others, …)`, but those with a forward of their own.

    Returns:
        those that do, for `unbind`.
    """
    ours = [module for module in modules if given(module) is None]
    for module in ours:
        give(module, partial(forward, module, *others))
    return ours


def unbind(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> None:
    """Undo `bind`, unless someone has given a module another forward since."""
    for module in modules:
        if runs(module, forward):
            take_back(module)


def runs(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a module runs this forward, with arguments bound to it."""
    bound = given(module)
    return isinstance(bound, partial) and bound.func is forward


def give(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module run another forward, which is called without the module."""
    setattr(module, _slot(module), forward)


def given(module: nn.Module) -> Any:
    """The forward that someone has given to this module alone, None if it runs its class's."""
    forward = vars(module).get(_slot(module))
    is_the_classes = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    return None if is_the_classes else forward


def is_somebody_elses(module: nn.Module) -> bool:
    """Whether a module runs a forward that is neither its class's nor ours."""
    if (forward := given(module)) is None:
        return False
    function = forward.func if isinstance(forward, partial) else forward
    of = function if isinstance(function, FunctionType | MethodType) else type(function)
    return not (of.__module__ or "").startswith(_OURS)


def take_back(module: nn.Module) -> None:
    """Let a module run its class's forward again."""
    slot = _slot(module)
    if slot == "forward":
        vars(module).pop(slot, None)
    else:
        setattr(module, slot, MethodType(type(module).forward, module))


def _slot(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in vars(module) else "forward"
