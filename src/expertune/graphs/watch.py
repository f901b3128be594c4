"""What a recording of a module stands on beside its inputs: parameters, submodules, settings, hooks."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import nn

_SCALARS = (int, float, str, bool, type(None))
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks") and "state_dict" not in name)


class Watch:
    """A module as it was.

    Args:
        module: is compared with what it was when this was made.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._dicts = [held for m in modules for held in (m._modules, m._parameters, m._buffers) if held]
        self._held = self._read_items()
        self._alive = [each for held in self._dicts for each in held.values()]  # so that no other gets the same id
        self._parameters = list(module.parameters())
        self._places = self._read_places()
        plain = [(vars(m), _plain(m)) for m in modules if _may_change(m)]
        reads = [(now, was, itemgetter(*was)) for now, was in plain if was]
        self._settings = [(now, read, read(was)) for now, was, read in reads]
        self._hooks = [getattr(m, name) for m in modules[1:] for name in _HOOKS]
        self._hooked = self._numbers()

    def hooks(self) -> list[Callable[..., Any]]:
        """By which others look into the module while it runs."""
        return [hook for hooks in self._hooks for hook in hooks.values()]

    def is_same(self) -> bool:
        """Whether the module computes what it computed then, on the same memory."""
        return (
            self._read_items() == self._held
            and self._read_places() == self._places
            and self._numbers() == self._hooked
            and self._has_settings()
        )

    def _read_items(self) -> list[tuple[str, int]]:
        """Which submodules, parameters and buffers there are under which names."""
        return [(name, id(each)) for held in self._dicts for name, each in held.items()]

    def _read_places(self) -> list[tuple[int, bool]]:
        """Where parameters lie, and whether they want a gradient."""
        return [(p.data_ptr(), p.requires_grad) for p in self._parameters]

    def _has_settings(self) -> bool:
        try:
            return all(read(now) == was for now, read, was in self._settings)
        except KeyError:  # one is gone
            return False

    def _numbers(self) -> list[tuple[int, ...]]:
        """Of the hooks, as torch counts them."""
        return [tuple(hooks) for hooks in self._hooks if hooks]


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
