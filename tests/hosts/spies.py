"""Who was called: a function is put in the place of a module's, which notes its calls and passes them on."""

from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


def inputs_of(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[Tensor]:
    """The first argument of each call of `module.name` from now on."""
    real, seen = getattr(module, name), []

    def spy(x: Tensor, *args: Any) -> Any:
        seen.append(x)
        return real(x, *args)

    monkeypatch.setattr(module, name, spy)
    return seen
