"""With which adapters a layer computes, and how: noted when it runs, so that it can run again as it ran.

Between a forward and its backward a program may choose another adapter, disable them or scale them otherwise: two
losses of two adapters that are summed, or one that is computed without them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from expertune.memory.checkpoint import As

_Adapted: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper  # with factors, or with a copy that is trained whole
_SETTINGS = ("_active_adapter", "_disable_adapters", "scaling")


def note(modules: Iterable[nn.Module]) -> As:
    """What puts the adapters of a layer's modules as they are now, around whatever runs within."""
    adapted = [module for module in modules if isinstance(module, _Adapted)]
    return partial(_as_noted, adapted, [_read(each) for each in adapted])


@contextmanager
def _as_noted(adapted: list[_Adapted], noted: list[dict[str, Any]]) -> Iterator[None]:
    """The adapters as they were noted.

    Raises:
        RuntimeError: some have been merged into the weights since, or taken out of them.
    """
    changed = [(each, was, now) for each, was in zip(adapted, noted, strict=True) if (now := _read(each)) != was]
    if any(was["merged_adapters"] != now["merged_adapters"] for _, was, now in changed):
        raise RuntimeError(
            "adapters were merged into the weights, or taken out of them, between a forward and its backward, in which "
            "the layer runs again. Call backward first, or use memory='fast'."
        )
    try:
        for each, was, _ in changed:
            _write(each, was)
        yield
    finally:
        for each, _, now in changed:
            _write(each, now)


def _read(adapted: _Adapted) -> dict[str, Any]:
    read = {name: getattr(adapted, name, None) for name in (*_SETTINGS, "merged_adapters")}
    return {name: value.copy() if isinstance(value, dict | list) else value for name, value in read.items()}


def _write(adapted: _Adapted, values: dict[str, Any]) -> None:
    for name in _SETTINGS:
        if values[name] is not None:
            setattr(adapted, name, values[name])
