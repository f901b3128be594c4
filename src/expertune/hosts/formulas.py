"""Modules whose class computes a formula of ours, which is found by trying it: once for all that are alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from expertune.hosts import forwards

_Formula = TypeVar("_Formula")
_AGREES = 1e-5  # float32 rounding, relative; another formula is off by more than a tenth


class Settings(NamedTuple):
    """What a module's class reads of an instance beside its weights.

    Args:
        names: of its numbers, flags, words and functions.
        values: theirs.
        kinds: of its children that hold nothing, as activations. The others may be wrapped, and are asked themselves.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    kinds: tuple[type, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Settings":
        """As they are now."""
        named = {name: value for name, value in vars(module).items() if _is_setting(name, value)}
        return cls(tuple(named), tuple(named.values()), _kinds(module))

    def are_those_of(self, module: nn.Module) -> bool:
        """Whether nobody has changed one."""
        values = tuple(map(vars(module).get, self.names))
        return values == self.values and _kinds(module) == self.kinds


def _kinds(module: nn.Module) -> tuple[type, ...]:
    children = module._modules.values()
    return tuple(type(each) for each in children if each is not None and not each._parameters and not each._modules)


def _is_setting(name: str, value: Any) -> bool:
    kinds = (int, float, str, tuple, FunctionType, BuiltinFunctionType)
    return (value is None or isinstance(value, kinds)) and not name.startswith("_") and name != "training"


@dataclass(frozen=True)
class Found(Generic[_Formula]):
    """A formula, and the settings of the module with which it follows it."""

    formula: _Formula
    settings: Settings

    def of(self, module: nn.Module) -> _Formula | None:
        """The formula, unless a setting of the module has changed since, so that its class may compute another."""
        return self.formula if self.settings.are_those_of(module) else None


def agree(given: Tensor, mine: Tensor) -> bool:
    """Whether two formulas gave the same numbers, in float32."""
    return given.shape == mine.shape and torch.allclose(given, mine, rtol=_AGREES, atol=_AGREES)


def find(
    model: nn.Module, is_meant: Callable[[nn.Module], bool], formula_of: Callable[[nn.Module], _Formula | None]
) -> list[tuple[nn.Module, Found[_Formula]]]:
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
        beside = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        key = (type(module), repr(beside), *map(type, module.children()))
        if key not in known:
            known[key] = formula_of(module)
        if (formula := known[key]) is not None:
            found.append((module, Found(formula, Settings.of(module))))
    return found


def is_named(word: str) -> Callable[[nn.Module], bool]:
    """Whether a word is in the name of a module's class."""
    return lambda module: word in type(module).__name__


def bind(found: Iterable[tuple[nn.Module, Found[Any]]], forward: Callable[..., Any], *others: Any) -> list[nn.Module]:
    """Let modules run `forward(module, found, *others, …)`, but those with a forward of their own.

    Args:
        found: by `find`.
        forward: ours.
        others: what it takes after the formula.

    Returns:
        those that do, for `forwards.unbind`.
    """
    ours = [(module, each) for module, each in found if forwards.given(module) is None]
    for module, each in ours:
        forwards.give(module, partial(forward, module, each, *others))
    return [module for module, _ in ours]
