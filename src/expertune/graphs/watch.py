"""What recordings of modules stand on beside their inputs: parameters, submodules, settings, hooks.

That is asked in every step, of thousands of dictionaries: so they are walked without a line of Python for each.
"""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version

_SCALARS = (int, float, str, bool, type(None))
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks") and "state_dict" not in name)
_address, _wants_gradient = Tensor.data_ptr, attrgetter("requires_grad")


class Watch:
    """Modules as they were.

    Args:
        modules: are compared with what they were when this was made.
    """

    def __init__(self, *modules: nn.Module) -> None:
        parts = [list(module.modules()) for module in modules]
        each = list(dict.fromkeys(chain.from_iterable(parts)))
        dicts: list[dict[str, Any]] = [held for m in each for held in (m._modules, m._parameters, m._buffers)]
        self._dicts, self._empty = [held for held in dicts if held], [held for held in dicts if not held]
        self._versions = self._read_versions()
        self._held = self._read_items()
        self._alive = [*chain.from_iterable(map(dict.values, self._dicts))]  # so that no other gets the same id
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self._places = self._read_places()
        plain = [(vars(m), _plain(m)) for m in each if _may_change(m)]
        reads = [(now, was, itemgetter(*was)) for now, was in plain if was]
        self._settings = [(now, read, read(was)) for now, was, read in reads]
        inside = dict.fromkeys(chain.from_iterable(part[1:] for part in parts))
        self._hooks = [getattr(m, name) for m in inside for name in _HOOKS]
        self._hooked = self._numbers()

    def hooks(self) -> list[Callable[..., Any]]:
        """By which others look into the modules while they run."""
        return [hook for hooks in self._hooks for hook in hooks.values()]

    def is_same(self) -> bool:
        """Whether the modules compute what they computed then, on the same memory."""
        return (
            not any(self._empty)
            and self._has_items()
            and self._read_places() == self._places
            and self._numbers() == self._hooked
            and self._has_settings()
        )

    def _has_items(self) -> bool:
        versions = self._read_versions()
        if versions != self._versions:
            if self._read_items() != self._held:
                return False
            self._versions = versions  # written to, but to the same end
        return True

    def _read_versions(self) -> list[int]:
        """Of the dictionaries, new ones wherever an item was set. Reading all items would fetch them from memory."""
        return [*map(dict_version, self._dicts)]

    def _read_items(self) -> tuple[list[str], list[int]]:
        """Which submodules, parameters and buffers there are under which names."""
        return [*chain.from_iterable(self._dicts)], [*map(id, chain.from_iterable(map(dict.values, self._dicts)))]

    def _read_places(self) -> tuple[list[int], list[bool]]:
        """Where parameters lie, and whether they want a gradient."""
        return [*map(_address, self._parameters)], [*map(_wants_gradient, self._parameters)]

    def _has_settings(self) -> bool:
        try:
            return all(read(now) == was for now, read, was in self._settings)
        except KeyError:  # one is gone
            return False

    def _numbers(self) -> list[tuple[int, ...]]:
        """Of the hooks, as torch counts them."""
        return [*map(tuple, filter(None, self._hooks))]


def _may_change(module: nn.Module) -> bool:
    """Whether settings of a module may change: those of torch's own stay, but for dropout's."""
    return isinstance(module, nn.Dropout) or not type(module).__module__.startswith("torch.nn.")


def _plain(module: nn.Module) -> dict[str, Any]:
    """The settings of a module: numbers and names, and containers of such."""
    return {name: _copy(value) for name, value in vars(module).items() if name not in _INTERNAL and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(each, _SCALARS) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(isinstance(each, _SCALARS) for each in value)
    return isinstance(value, _SCALARS)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value
