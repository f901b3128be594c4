"""Ahead: the kernels of a pass compiled side by side before it first runs, not one after another as it meets them.

The pass is run once without its launches: each is only compiled, in a thread of its own, by Triton's own asynchronous
mode. At anything but an allocation or a view it stops, because the numbers are not there; what comes later is compiled
when it is met.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels import launch
from expertune.shapes import Pass, Tensors

_aten = torch.ops.aten
ALLOCATIONS = frozenset({_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default})
VIEWS = frozenset({
    _aten.view.default, _aten._unsafe_view.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default,
    _aten.slice.Tensor, _aten.detach.default, _aten.alias.default,
})  # fmt: skip
_met: set[tuple[Any, ...]] = set()


class _Stopped(Exception):  # noqa: N818  nothing failed
    """The pass needs numbers."""


class _WithoutNumbers(TorchDispatchMode):
    """Stops a pass at what is more than allocating and viewing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in ALLOCATIONS and func not in VIEWS:
            raise _Stopped
        return func(*args, **(kwargs or {}))


def compile_ahead(function: Pass, static: Any, inputs: Tensors) -> None:
    """Compile what `function(static, inputs)` will launch, once for inputs that differ in their first size alone.

    A kernel that does not compile raises when it is launched.
    """
    kind = (function, *[None if t is None else (t.device, t.dtype, t.shape[1:]) for t in inputs])
    if kind in _met:
        return
    _met.add(kind)
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        try:
            with _WithoutNumbers(), launch.compiling():
                function(static, inputs)
        except _Stopped:
            pass
