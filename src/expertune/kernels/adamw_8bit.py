"""AdamW with moments in dynamic 8-bit numbers: all parameters of a model in one launch.

A program takes four blocks of 256 numbers of one parameter: it reads gradient, parameter and moments once, and writes
parameter and moments once. Which parameter it works on stands in a table of addresses, so a hundred small factors cost
one launch. The code of a number is computed, not searched: the decade by three comparisons, then the step within it;
a search in a table would take as long as memory does (H200).
Any Triton target.
"""

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from expertune.kernels.launch import are_aligned, launch
from expertune.kernels.many_tensors import TRITON_DTYPES, addresses_of, on_device, tiles_of

_BLOCK = 256  # numbers that share a maximum
_TILE = 4  # blocks of a program, which is one warp: more of them wait for memory at once


@triton.jit
def _up(y, steps, DECADES: tl.constexpr):
    """What lies so many decades down, or more, raised by as many."""
    is_down = y < 0.1**DECADES
    return tl.where(is_down, y * 10.0**DECADES, y), tl.where(is_down, steps * 0.5**DECADES, steps)


@triton.jit
def _encode(x, IS_SIGNED: tl.constexpr):
    """The codes of `x`, fractions of their block's maximum: `optim/dynamic_8bit.py` says which.

    A value is the middle of its step, so the nearest is that of the step in which a number lies; but at the lower edge
    of a decade it may be the value below, and near one it is one. Codes are counted in float32 beyond 2²³, where a sum
    rounds to the nearest whole number and its lowest bits are the code: a conversion takes four times as long.
    """
    first: tl.constexpr = 1.0 if IS_SIGNED else 2.0  # steps of the lowest decade
    # Half of the lowest value is the middle between it and zero. If it is not signed, nothing becomes zero.
    least: tl.constexpr = 0.275e-6 if IS_SIGNED else 0.0
    y = tl.maximum(tl.abs(x), 0.281e-6 if IS_SIGNED else 0.2e-6)  # whose code is the lowest
    steps = tl.full(x.shape, 64 * first, tl.float32)  # of the decade
    y, steps = _up(y, steps, 4)
    y, steps = _up(y, steps, 2)
    y, steps = _up(y, steps, 1)
    # In steps from zero: (y - 0.1) / 0.9 of the decade's, after the `steps - first` of those below. What is rounded is
    # half a step more, so that a step's middle is whole.
    number = steps * (y * (1 / 0.9) + 8 / 9) + (0.5 - first)
    # The value below a decade's first is 0.6 steps away, not 1: their middle lies 0.2 above the edge, and is bent to it
    number = tl.minimum(number, 2.5 * number - (1.5 * steps + (1.25 - 1.5 * first)))
    # and one is 0.5 steps from the highest: their middle, 0.25 below one, is bent to the edge there
    top: tl.constexpr = 127 * first + 0.25
    number = tl.maximum(number, 3 * number - (2 * top - 0.25))
    if IS_SIGNED:
        bits = x.to(tl.int32, bitcast=True) & -2147483648 | 0x3F800000
        sign = tl.where(tl.abs(x) > least, bits.to(tl.float32, bitcast=True), 0.0)
        number = tl.maximum(sign * number + (127 + 8388608.0), 8388608.0)  # one has a value, its negative has none
    else:
        number = tl.where(x > least, number + 8388608.0, 8388608.0)
    return number.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _to_bfloat16(x, at, count):
    """One of the two nearest numbers in bfloat16 by chance, still in float32: `optim/by_chance.py`."""
    h = at.to(tl.uint32) ^ (count.to(tl.uint32) * 0x9E3779B9)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = (h ^ (h >> 16)) >> 16
    bits = (x.to(tl.uint32, bitcast=True) + h) & 0xFFFF0000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _decode(code, value_ptr, maximum):
    return tl.load(value_ptr + code.to(tl.int32)) * maximum


@triton.jit
def _fractions(x, maximum):
    return x * (1 / tl.where(maximum > 0, maximum, 1.0))


@triton.jit(do_not_specialize=["num_params", "decay", "beta1", "beta2", "step_size", "root_correction", "eps", "count"])
def _adamw_8bit_kernel(
    address_ptr, tile_ptr, numel_ptr, clip_coef_ptr, mean_value_ptr, square_value_ptr,
    num_params, decay, beta1, beta2, step_size, root_correction, eps, count,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, IS_BY_CHANCE: tl.constexpr, IS_ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile, a block at a time."""
    number = tl.load(tile_ptr + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tile_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    numel = tl.load(numel_ptr + number)
    param_ptr = tl.load(address_ptr + number).to(tl.pointer_type(PARAM_DTYPE))
    grad_ptr = tl.load(address_ptr + num_params + number).to(tl.pointer_type(GRAD_DTYPE))
    moments_ptr = address_ptr + 2 * num_params + 4 * number
    mean_ptr = tl.load(moments_ptr).to(tl.pointer_type(tl.uint8))
    square_ptr = tl.load(moments_ptr + 1).to(tl.pointer_type(tl.uint8))
    mean_maximum_ptr = tl.load(moments_ptr + 2).to(tl.pointer_type(tl.float32))
    square_maximum_ptr = tl.load(moments_ptr + 3).to(tl.pointer_type(tl.float32))
    clip_coef = tl.load(clip_coef_ptr).to(tl.float32)
    if IS_ALIGNED:  # so that numbers are read and written by the vector
        numel = tl.multiple_of(numel, 16)
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, square_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(square_ptr, 16)
    for block in range(tile * BLOCKS, tl.minimum((tile + 1) * BLOCKS, tl.cdiv(numel, BLOCK))):
        # four together in a thread, so that codes, what they stand for and numbers lie in the same ones
        at = block * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), 4)
        inside = at < numel
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * clip_coef
        p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean_code = tl.load(mean_ptr + at, mask=inside, other=127)
        square_code = tl.load(square_ptr + at, mask=inside, other=0)

        m = _decode(mean_code, mean_value_ptr, beta1 * tl.load(mean_maximum_ptr + block)) + (1 - beta1) * g
        v = _decode(square_code, square_value_ptr, beta2 * tl.load(square_maximum_ptr + block)) + (1 - beta2) * g * g
        root = tl.rsqrt(tl.sqrt(v) * root_correction + eps)  # a division takes five times as long
        p = p * decay - step_size * m * root * root
        if IS_BY_CHANCE:
            p = _to_bfloat16(p, at, count)
        tl.store(param_ptr + at, p.to(PARAM_DTYPE), mask=inside)

        mean_maximum, square_maximum = tl.max(tl.abs(m)), tl.max(v)
        tl.store(mean_maximum_ptr + block, mean_maximum)
        tl.store(square_maximum_ptr + block, square_maximum)
        tl.store(mean_ptr + at, _encode(_fractions(m, mean_maximum), True), mask=inside)
        tl.store(square_ptr + at, _encode(_fractions(v, square_maximum), False), mask=inside)


class Stepped:
    """Parameters that are stepped together, and their moments, whose addresses are looked up once.

    Args:
        params: share a device and a dtype; dense.
        moments: of each the codes of both (uint8), and the maxima of their blocks (float32, `⌈numel / 256⌉`), dense and
            in the order of the parameter's numbers.
        is_by_chance: whether parameters in bfloat16 are rounded by chance, or to the nearest.
    """

    def __init__(
        self, params: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], *, is_by_chance: bool = True
    ) -> None:
        self.params = params
        self.is_by_chance = is_by_chance and params[0].dtype == torch.bfloat16
        self.numels = tuple(param.numel() for param in params)
        self._moments = [*chain.from_iterable(moments)]
        self._moment_addresses = addresses_of(self._moments)

    def addresses(self, grads: Sequence[Tensor]) -> array:  # type: ignore[type-arg]
        """Of the parameters, of their gradients, and of the moments of each."""
        return addresses_of(self.params) + addresses_of(grads) + self._moment_addresses


def adamw_8bit(
    stepped: Stepped, grads: Sequence[Tensor], clip_coef: Tensor, tables: Sequence[Tensor], update: tuple[float, ...]
) -> None:
    """Step parameters in place.

    Args:
        stepped: the parameters.
        grads: of one dtype, each in the order of the parameter's numbers.
        clip_coef: a number that multiplies all of them.
        tables: the values of the codes, of the signed first moment and of the second, on the device.
        update: what a parameter is first multiplied by, both betas, `lr / (1 - beta1^t)`, `(1 - beta2^t)^(-1/2)`, eps,
            and `t`.
    """
    device = grads[0].device
    pointers = stepped.addresses(grads)
    tiles, numel_of = tiles_of(stepped.numels, _TILE * _BLOCK, device)
    launch(
        _adamw_8bit_kernel,
        (tiles.shape[0], 1, 1),
        (on_device(pointers, device), tiles, numel_of, clip_coef, *tables),
        (len(stepped.numels), *update),
        (),
        {
            "PARAM_DTYPE": TRITON_DTYPES[stepped.params[0].dtype],
            "GRAD_DTYPE": TRITON_DTYPES[grads[0].dtype],
            "IS_BY_CHANCE": stepped.is_by_chance,
            "IS_ALIGNED": are_aligned(pointers) and are_aligned(stepped.numels),
            "BLOCKS": _TILE,
            "BLOCK": _BLOCK,
        },
        num_warps=1,
    )
    increment_version(stepped.params)  # of a kernel's writing autograd knows nothing
