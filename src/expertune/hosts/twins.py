"""A host's function once more, with other functions under some of the names that it calls.

The host's code runs as it is, so it goes on as the host does from release to release; and only who is given the twin
runs it, so the host's module is left as it is.
"""

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any


def twin(function: FunctionType, names: dict[str, Any], imports: dict[str, str] | None = None) -> FunctionType:
    """A copy of a function that finds `names` before those of its module.

    Args:
        function: global names of its code are looked up when it runs, in its module as it was when it was copied.
        names: what its code is to find under which global name.
        imports: of the modules that its own import statements name, those that it is to import from.
    """
    imports = imports or {}
    return _copy(function, names, imports, function.__closure__)


def twin_around(function: FunctionType, name: str, inner: Callable[..., Any]) -> FunctionType:
    """A copy of a decorator's wrapper that calls another function.

    Args:
        function: the wrapper.
        name: under which it knows the function that it was made for.
        inner: the other one.
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return _copy(function, {}, {}, tuple(CellType(inner) if each == name else cell for each, cell in cells))


def _copy(
    function: FunctionType, names: dict[str, Any], imports: dict[str, str], closure: tuple[CellType, ...] | None
) -> FunctionType:
    code, globals_ = function.__code__, function.__globals__ | names
    code = code.replace(co_names=tuple(imports.get(name, name) for name in code.co_names))
    copied = FunctionType(code, globals_, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)  # `__wrapped__`, by which a signature is told
    return copied
