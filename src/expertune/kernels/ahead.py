"""Ahead: all kernels of a pass built side by side before it first runs, not one after another as it meets them.

A kernel takes Triton 0.1 to 1 s on one core, and its launcher 0.2 s more; most of that is LLVM, `ptxas` and the C
compiler, which leave Python's lock alone. So the pass is run once without numbers: it allocates and views, its launches
are handed to Triton's asynchronous compilation, and any other operation yields an empty tensor of the right shape.
Where a shape depends on numbers, or the host asks for them, it ends, and the rest is built when it is launched.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from expertune.kernels import launch
from expertune.shapes import Pass, Tensors


class _Ended(Exception):  # noqa: N818  nothing failed
    """The pass needs numbers."""


def compile_ahead(function: Pass, static: Any, inputs: Tensors, device: torch.device) -> None:
    """Build what `function(static, inputs)` launches and what is not built yet; it writes to nothing.

    Args:
        function: pure.
        static, inputs: its arguments.
        device: of the inputs; a CUDA device is the current one.

    Raises:
        RuntimeError: a kernel could not be built; its name is in the message.
    """
    # CUDA's current device is each thread's own
    start: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (device,)}
    with ThreadPoolExecutor(**start if device.type == "cuda" else {}) as pool:
        crew = _Crew(pool)
        # Triton 3.6 stays in this mode if it raises on leaving
        with triton.AsyncCompileMode(crew, ignore_errors=True):
            run_without_numbers(function, static, inputs, crew.prepare)
    crew.check()


def run_without_numbers(function: Pass, static: Any, inputs: Tensors, prepare: launch.Prepare) -> None:
    """Hand what `function(static, inputs)` launches to `prepare`, and compute nothing."""
    with _WithoutNumbers(), launch.prepared(prepare), suppress(_Ended):
        function(static, inputs)


class _WithoutNumbers(TorchDispatchMode):
    """Every operation on tensors yields empty ones, but for views."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # what is made of no tensor may be kept for later passes
        if func.is_view or not tensors:
            return func(*args, **kwargs)
        # numbers on the host, as factors, stand beside tensors of the device
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
        if (kwargs.get("device") or device).type != device.type:
            raise _Ended
        return _empty_results(func, args, kwargs, device)


def _empty_results(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """What an operation returns, as to shapes: its own arguments where it writes to them, else empty tensors."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # twins by `id`, kept so that no other object takes it

    def twin(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("meta")
        if not isinstance(x, Tensor):
            return x
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        known[id(made)] = (made, x)
        return made

    def untwin(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:
            return known[id(x)][1]
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    try:
        results = func(*tree_map(twin, args), **tree_map(twin, kwargs))
    except RuntimeError as error:  # torch's, of an operation that has no result without numbers
        raise _Ended from error
    return tree_map(untwin, results)


class _Crew:
    """The threads that build kernels, as the executor of Triton's asynchronous compilation.

    Args:
        pool: of threads.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._name = ""
        self._built: list[tuple[str, Future[Any]]] = []

    def prepare(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """A launch would be made: Triton calls `submit` if its kernel is not known."""
        self._name = kernel.__name__
        kernel.warmup(*arguments, grid=(1, 1, 1), **constants)

    def submit(self, compile_kernel: Callable[[], Any]) -> "Future[Any]":
        """Build a kernel in another thread."""
        future = self._pool.submit(_build, compile_kernel)
        self._built.append((self._name, future))
        return future

    def check(self) -> None:
        """Say which kernel could not be built, when all are done."""
        for name, future in self._built:
            if (error := future.exception()) is not None:
                raise RuntimeError(f"the kernel {name} could not be built: {error}") from error


def _build(compile_kernel: Callable[[], Any]) -> Any:
    built = compile_kernel()
    _ = built.run  # a property: Triton builds the launcher and loads the kernel when it is first read
    return built
