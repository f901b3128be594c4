"""Modules whose class computes a formula of ours, which is found by trying it: once for all that are alike."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from expertune.hosts import forwards

_Formula = TypeVar("_Formula")
_AGREES = 1e-5  # float32 rounding, relative; another formula is off by more than a tenth


def agree(given: Tensor, mine: Tensor) -> bool:
    """Whether two formulas gave the same numbers, in float32."""
    return given.shape == mine.shape and torch.allclose(given, mine, rtol=_AGREES, atol=_AGREES)


def find(
    model: nn.Module, is_meant: Callable[[nn.Module], bool], formula_of: Callable[[nn.Module], _Formula | None]
) -> list[tuple[nn.Module, _Formula]]:
    """The modules that follow a formula, and which. Changes nothing.

    Args:
        model: holds them.
        is_meant: whether a module is tried.
        formula_of: tries a module; None if it follows none.
    """
    known: dict[Any, _Formula | None] = {}
    found = []
    for module in model.modules():
        if not is_meant(module):
            continue
        settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        key = (type(module), repr(settings), *map(type, module.children()))
        if key not in known:
            known[key] = formula_of(module)
        if (formula := known[key]) is not None:
            found.append((module, formula))
    return found


def is_named(word: str) -> Callable[[nn.Module], bool]:
    """Whether a word is in the name of a module's class."""
    return lambda module: word in type(module).__name__


def bind(found: Iterable[tuple[nn.Module, Any]], forward: Callable[..., Any], *others: Any) -> list[nn.Module]:
    """Let modules run `forward(module, formula, *others, …)`, but those with a forward of their own.

    Args:
        found: by `find`.
        forward: ours.
        others: what it takes after the formula.

    Returns:
        those that do, for `forwards.unbind`.
    """
    ours = [(module, formula) for module, formula in found if forwards.given(module) is None]
    for module, formula in ours:
        forwards.give(module, partial(forward, module, formula, *others))
    return [module for module, _ in ours]
