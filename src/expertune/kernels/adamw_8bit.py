"""AdamW with moments in dynamic 8-bit numbers: all parameters of a model in one launch.

A program takes eight blocks of 256 numbers of one parameter: it reads gradient, parameter and moments once, and writes
parameter and moments once. Which parameter it works on stands in a table of addresses, so a hundred small factors cost
one launch. The code of a number is computed, not searched: the decade by six comparisons, then the step within it.
Any Triton target.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import are_aligned, ceil_div, launch

_BLOCK = 256  # numbers that share a maximum
_TILE = 8  # blocks of a program


@triton.jit
def _encode(x, bound_ptr, IS_SIGNED: tl.constexpr):
    """The codes of `x`, fractions of their block's maximum: `optim/dynamic_8bit.py` says which."""
    first: tl.constexpr = 1 if IS_SIGNED else 2  # steps of the lowest decade
    zero: tl.constexpr = 127 if IS_SIGNED else 0  # the code of zero
    magnitude = tl.abs(x)
    steps = tl.full(x.shape, first, tl.int32)
    scale = tl.full(x.shape, 1e6, tl.float32)
    for decade in tl.static_range(6):
        above = magnitude >= 1e-6 * 10**decade
        steps = tl.where(above, steps * 2, steps)
        scale = tl.where(above, 1e5 / 10**decade, scale)
    step = ((magnitude * scale - 0.1) * (steps.to(tl.float32) * (1 / 0.9))).to(tl.int32)
    number = steps - first + tl.minimum(tl.maximum(step, 0), steps - 1)  # among the values above zero
    # a step's value is its middle, so only at the edge of a decade may the value below be nearer
    number = tl.where(magnitude <= tl.load(bound_ptr + zero + number), number, number + 1)
    top: tl.constexpr = 1 - 0.225 / (64 * first)  # the middle between the highest step and one
    if IS_SIGNED:
        number = tl.where(x > top, 128, number)
        number = tl.where(x < 0, -number, number)
    else:
        number = tl.where(x > top, 255, number)
        number = tl.where((x > 0) & (number == 0), 1, number)  # see `optim/dynamic_8bit.py`
    return (number + zero).to(tl.uint8)


@triton.jit
def _to_bfloat16(x, at, count):
    """One of the two nearest numbers in bfloat16 by chance, still in float32: `optim/by_chance.py`."""
    h = at.to(tl.uint32) ^ (count.to(tl.uint32) * 0x9E3779B9)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = (h ^ (h >> 16)) >> 16
    bits = (x.to(tl.uint32, bitcast=True) + h) & 0xFFFF0000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit(do_not_specialize=["decay", "beta1", "beta2", "step_size", "root_correction", "eps", "count"])
def _adamw_8bit_kernel(
    address_ptr, tile_ptr, numel_ptr, mean_value_ptr, mean_bound_ptr, square_value_ptr, square_bound_ptr,
    decay, beta1, beta2, step_size, root_correction, eps, count,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    number = tl.load(tile_ptr + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tile_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    numel = tl.load(numel_ptr + number)
    row_ptr = address_ptr + 6 * number
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(PARAM_DTYPE))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD_DTYPE))
    mean_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.uint8))
    square_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.uint8))
    if IS_ALIGNED:  # so that numbers are read and written by the vector
        numel = tl.multiple_of(numel, 16)
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, square_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(square_ptr, 16)
    block = tile * TILE + tl.arange(0, TILE)
    at = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = at < numel
    has_numbers = block * BLOCK < numel
    mean_maximum_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32)) + block
    square_maximum_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32)) + block

    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean_value_ptr + tl.load(mean_ptr + at, mask=inside, other=127).to(tl.int32))
    m *= tl.load(mean_maximum_ptr, mask=has_numbers, other=0.0)[:, None]
    v = tl.load(square_value_ptr + tl.load(square_ptr + at, mask=inside, other=0).to(tl.int32))
    v *= tl.load(square_maximum_ptr, mask=has_numbers, other=0.0)[:, None]

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) * root_correction + eps)
    if tl.bfloat16 == PARAM_DTYPE:
        p = _to_bfloat16(p, at, count)
    tl.store(param_ptr + at, p.to(PARAM_DTYPE), mask=inside)

    mean_maximum = tl.max(tl.abs(m), axis=1)
    square_maximum = tl.max(v, axis=1)
    tl.store(mean_maximum_ptr, mean_maximum, mask=has_numbers)
    tl.store(square_maximum_ptr, square_maximum, mask=has_numbers)
    m *= (1 / tl.where(mean_maximum > 0, mean_maximum, 1.0))[:, None]
    v *= (1 / tl.where(square_maximum > 0, square_maximum, 1.0))[:, None]
    tl.store(mean_ptr + at, _encode(m, mean_bound_ptr, True), mask=inside)
    tl.store(square_ptr + at, _encode(v, square_bound_ptr, False), mask=inside)


def adamw_8bit(rows: Sequence[Sequence[Tensor]], tables: Sequence[Tensor], update: tuple[float, ...]) -> None:
    """Step, in place, parameters that share a device, a dtype and the dtype of their gradients.

    Args:
        rows: a parameter each: itself, its gradient, the codes of both moments (uint8), and the maxima of their blocks
            (float32, `⌈numel / 256⌉`). All dense, and in the same order of numbers.
        tables: values and bounds of the codes, of the signed first moment and of the second, on the device.
        update: what a parameter is first multiplied by, both betas, `lr / (1 - beta1^t)`, `(1 - beta2^t)^(-1/2)`, eps,
            and `t`.
    """
    param, grad, *_ = rows[0]
    device = param.device
    pointers = [tensor.data_ptr() for row in rows for tensor in row]
    numels = tuple(row[0].numel() for row in rows)
    addresses = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
    tiles, numel_of = _tiles(numels, device)
    launch(
        _adamw_8bit_kernel,
        (tiles.shape[0], 1, 1),
        (addresses.to(device, non_blocking=True), tiles, numel_of, *tables),
        update,
        (),
        {
            "PARAM_DTYPE": _TRITON[param.dtype],
            "GRAD_DTYPE": _TRITON[grad.dtype],
            "IS_ALIGNED": are_aligned(pointers) and are_aligned(numels),
            "TILE": _TILE,
            "BLOCK": _BLOCK,
        },
        num_warps=4,
    )


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(maxsize=64)
def _tiles(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each program the parameter and the tile within it, int32 `(tiles, 2)`; and `numels` as a tensor."""
    counts = torch.tensor([ceil_div(numel, _TILE * _BLOCK) for numel in numels])
    number = torch.arange(len(numels)).repeat_interleave(counts)
    tile = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    tiles = torch.stack((number, tile), dim=1).to(torch.int32)
    return tiles.to(device), torch.tensor(numels, dtype=torch.int64).to(device)
