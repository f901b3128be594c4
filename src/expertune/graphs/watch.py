"""What a recording of a module stands on beside its inputs: parameters, submodules, settings, hooks."""

from collections.abc import Callable
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
        dicts = [held for m in modules for held in (m._modules, m._parameters, m._buffers) if held]
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = [(held, dict(held)) for held in dicts]
        self._parameters = [(p, p.data_ptr(), p.requires_grad) for p in module.parameters()]
        self._settings = [(vars(m), _plain(m)) for m in modules if not type(m).__module__.startswith("torch.nn.")]
        self._hooks = [getattr(m, name) for m in modules[1:] for name in _HOOKS]
        self._hooked = self._numbers()

    def hooks(self) -> list[Callable[..., Any]]:
        """By which others look into the module while it runs."""
        return [hook for hooks in self._hooks for hook in hooks.values()]

    def is_same(self) -> bool:
        """Whether the module computes what it computed then, on the same memory."""
        return (
            self._numbers() == self._hooked
            and all(
                len(held) == len(was) and all(held.get(name) is each for name, each in was.items())
                for held, was in self._held
            )
            and all(p.data_ptr() == pointer and p.requires_grad == wants for p, pointer, wants in self._parameters)
            and all(now.get(name) == value for now, was in self._settings for name, value in was.items())
        )

    def _numbers(self) -> list[tuple[int, ...]]:
        """Of the hooks, as torch counts them."""
        return [tuple(hooks) for hooks in self._hooks if hooks]


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
