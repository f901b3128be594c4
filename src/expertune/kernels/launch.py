"""Launch: a compiled kernel found by a short key of our own.

Triton inspects every argument of every call to find the compiled kernel that fits: 30 to 100 µs a launch on the machine
measured, which at 1,000 tokens is longer than most of our kernels run. Our kernels' arguments are few in kind, so their
dtypes and widths say which one fits. Tensors that do not start at multiples of 16 bytes go through Triton's own way.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from expertune.shapes import ALIGNMENT

_HOOKS = (None, None, None)  # of Triton's own profiler
_compiled: dict[tuple[Any, ...], Any] = {}


def ceil_div(a: int, b: int) -> int:
    """`⌈a / b⌉`. (Triton's own are device functions too, and 2 µs a call.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


class RowBlocks(NamedTuple):
    """How rows are cut for a kernel of which a program holds a few whole ones.

    Args:
        grid: programs.
        rows: of a program.
        columns: the width, to the next power of two.
    """

    grid: tuple[int, int, int]
    rows: int
    columns: int

    @classmethod
    def of(cls, num_rows: int, width: int, elements: int) -> "RowBlocks":
        """For so many rows, where a program holds so many elements, but at least a row."""
        columns = next_power_of_2(width)
        rows = max(1, elements // columns)
        return cls((ceil_div(num_rows, rows), 1, 1), rows, columns)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int | float, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    *,
    descriptors: tuple[Any, ...] = (),
    **options: int,
) -> None:
    """Run `kernel(*descriptors, *tensors, *sizes, *numbers, **constants)` on the current stream of its device.

    Args:
        kernel: a Triton or Gluon `jit` function with its parameters in that order.
        grid: programs along each axis.
        tensors: passed as pointers.
        sizes: numbers that change from batch to batch; the kernel names them in `do_not_specialize`.
        numbers: what a layer keeps: widths, strides, scales.
        constants: the kernel's `constexpr` parameters, in their order.
        descriptors: tensor-memory descriptors.
        options: `num_warps`, `num_stages`, `maxnreg`.
    """
    if _watcher.prepare is not None:
        _watcher.prepare(kernel, (*descriptors, *tensors, *sizes, *numbers), constants | options)
        return
    device = tensors[0].device
    pointers = [tensor.data_ptr() for tensor in tensors]
    values = (*sizes, *numbers, *constants.values())
    found = None
    if device.type == "cuda" and are_aligned(pointers) and device.index == torch.cuda.current_device():
        tiles = [each for d in descriptors for each in (d.base.dtype, *d.block_shape)]
        dtypes = [tensor.dtype for tensor in tensors]
        key = (id(kernel), device.index, *tiles, *dtypes, *numbers, *constants.values(), *options.values())
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = kernel[grid](*descriptors, *tensors, *sizes, *numbers, **constants, **options)
        else:
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            arguments = (*descriptors, *pointers, *values)
            found.run(*grid, stream, found.function, found.packed_metadata, *_HOOKS, *arguments)
    else:
        # the interpreter computes with tensors itself, which is nobody's business
        with torch.cuda.device(device) if device.type == "cuda" else watched(None):
            kernel[grid](*descriptors, *tensors, *sizes, *numbers, **constants, **options)
    if _watcher.note is not None:
        shapes = tuple(Descriptor(tuple(d.shape), tuple(d.strides)) for d in descriptors)
        made = Launch(kernel, grid, shapes, values, options, found)
        _watcher.note(made, [*[d.base for d in descriptors], *tensors])


def are_aligned(pointers: Sequence[int]) -> bool:
    """Whether every address is one that compiled kernels were made for."""
    return reduce(or_, pointers, 0) % ALIGNMENT == 0  # on which Triton specialises pointers


class Descriptor(NamedTuple):
    """A tensor-memory descriptor without the address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launch(NamedTuple):
    """A launch that was made, to be made again with other pointers.

    Args:
        kernel, grid, options: as for `launch`.
        descriptors: the kernel's first arguments.
        values: sizes, numbers and constants.
        compiled: the compiled kernel, or None where Triton's own way was taken.
    """

    kernel: Any
    grid: tuple[int, int, int]
    descriptors: tuple[Descriptor, ...]
    values: tuple[Any, ...]
    options: dict[str, int]
    compiled: Any

    def interpret(self, tensors: Sequence[Tensor]) -> None:
        """Run it again in the interpreter."""
        self.kernel[self.grid](*tensors, *self.values, **self.options)


Note: TypeAlias = Callable[[Launch, Sequence[Tensor]], None]
Prepare: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]  # kernel, arguments, constants and options


class _Watcher(threading.local):
    """Who is told of this thread's launches, and who is handed them instead of the device."""

    note: Note | None = None
    prepare: Prepare | None = None


_watcher = _Watcher()


def is_watched() -> bool:
    """Whether anyone is told of this thread's launches."""
    return _watcher.note is not None


@contextmanager
def watched(note: Note | None) -> Iterator[None]:
    """Tell `note` of every launch of this thread, with the tensors that its pointers point to; None tells nobody."""
    outer, _watcher.note = _watcher.note, note
    try:
        yield
    finally:
        _watcher.note = outer


@contextmanager
def prepared(prepare: Prepare) -> Iterator[None]:
    """Hand the launches of this thread to `prepare`, and make none."""
    outer, _watcher.prepare = _watcher.prepare, prepare
    try:
        yield
    finally:
        _watcher.prepare = outer
