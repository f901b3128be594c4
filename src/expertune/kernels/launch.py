"""Launch: a compiled kernel found by a short key of our own.

Triton inspects every argument of every call to find the compiled kernel that fits: 30 to 100 µs a launch on the machine
measured, which at 1,000 tokens is longer than most of our kernels run. Our kernels' arguments are few in kind, so their
dtypes and widths say which one fits. Tensors that do not start at multiples of 16 bytes go through Triton's own way.
"""

from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # what Triton specialises pointers on
_HOOKS = (None, None, None)  # of Triton's own profiler
_compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


def ceil_div(a: int, b: int) -> int:
    """`⌈a / b⌉`. (Triton's own are device functions too, and 2 µs a call.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
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
        sizes: whole numbers that change from batch to batch; the kernel names them in `do_not_specialize`.
        numbers: what a layer keeps: widths, strides, scales.
        constants: the kernel's `constexpr` parameters, in their order.
        descriptors: tensor-memory descriptors, all of the dtype of the first tensor.
        options: `num_warps`, `num_stages`, `maxnreg`.
    """
    arguments = (*descriptors, *tensors, *sizes, *numbers)
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **options)
        return
    starts = 0
    for tensor in tensors:
        starts |= tensor.data_ptr()
    if device.type != "cuda" or starts % _ALIGNMENT:
        kernel[grid](*arguments, **constants, **options)
        return
    values = tuple(constants.values())
    key = (id(kernel), device.index, *[t.dtype for t in tensors], *numbers, *values, *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
        return
    run, function, metadata = found
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    run(*grid, stream, function, metadata, *_HOOKS, *arguments, *values)
