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

from expertune.kernels.launch import are_aligned, launch
from expertune.kernels.many_tensors import TRITON_DTYPES, addresses_of, on_device, tiles_of

_BLOCK = 256  # numbers that share a maximum
_TILE = 4  # blocks of a program


@triton.jit
def _up(y, steps, DECADES: tl.constexpr):
    """What lies so many decades down, or more, raised by as many."""
    is_down = y < 0.1**DECADES
    return tl.where(is_down, y * 10.0**DECADES, y), tl.where(is_down, steps * 0.5**DECADES, steps)


@triton.jit
def _encode(x, IS_SIGNED: tl.constexpr):
    """The codes of `x`, fractions of their block's maximum: `optim/dynamic_8bit.py` says which.

    A step's value is its middle, so the nearest is that of the step in which a number lies; but at the lower edge of a
    decade it may be the value below. Codes are counted in float32 beyond 2²³, where a sum rounds to the nearest whole
    number and its lowest bits are the code: a conversion takes four times as long.
    """
    first: tl.constexpr = 1.0 if IS_SIGNED else 2.0  # steps of the lowest decade
    y = tl.maximum(tl.abs(x), 1.5e-7)  # less is zero to either sign
    steps = tl.full(x.shape, 64 * first, tl.float32)  # of the decade
    y, steps = _up(y, steps, 4)
    y, steps = _up(y, steps, 2)
    y, steps = _up(y, steps, 1)
    before = steps - first  # steps of the decades below
    place = (y - 0.1) * (steps * (1 / 0.9)) + 0.5  # in steps, from half a step below the decade
    # the middle between a decade's first value and that below, which for the lowest is zero
    middle = tl.minimum(before + ((0.45 - 0.1 * first) / 1.8 + 0.5), 0.7)
    number = tl.where(place > middle, (place + 8388608.0) - 8388608.0, 0.0) + before  # of the value, counted from zero
    top: tl.constexpr = 1 - 0.225 / (64 * first)  # the middle between the highest step and one
    if IS_SIGNED:
        number = tl.where(x > top, 128.0, tl.minimum(number, 127.0))  # one has a value, its negative has none
        number = tl.where(x < 0, 127.0 - number, 127.0 + number)
    else:
        number = tl.where(x > top, 255.0, number)
        number = tl.maximum(number, tl.where(x > 0, 1.0, 0.0))  # see `optim/dynamic_8bit.py`
    return (number + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)


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
def _of_each(x, BLOCK: tl.constexpr):
    """What is given of each block, of each of its numbers."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], BLOCK)), (x.shape[0] * BLOCK,))


@triton.jit(do_not_specialize=["num_params", "decay", "beta1", "beta2", "step_size", "root_correction", "eps", "count"])
def _adamw_8bit_kernel(
    address_ptr, tile_ptr, numel_ptr, clip_coef_ptr, mean_value_ptr, square_value_ptr,
    num_params, decay, beta1, beta2, step_size, root_correction, eps, count,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, IS_BY_CHANCE: tl.constexpr, IS_ALIGNED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    number = tl.load(tile_ptr + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tile_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    numel = tl.load(numel_ptr + number)
    param_ptr = tl.load(address_ptr + number).to(tl.pointer_type(PARAM_DTYPE))
    grad_ptr = tl.load(address_ptr + num_params + number).to(tl.pointer_type(GRAD_DTYPE))
    moments_ptr = address_ptr + 2 * num_params + 4 * number
    mean_ptr = tl.load(moments_ptr).to(tl.pointer_type(tl.uint8))
    square_ptr = tl.load(moments_ptr + 1).to(tl.pointer_type(tl.uint8))
    if IS_ALIGNED:  # so that numbers are read and written by the vector
        numel = tl.multiple_of(numel, 16)
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        mean_ptr, square_ptr = tl.multiple_of(mean_ptr, 16), tl.multiple_of(square_ptr, 16)
    # in one dimension, so that codes, what they stand for and numbers lie in the same threads
    block = tile * TILE + tl.arange(0, TILE)
    at = tile * (TILE * BLOCK) + tl.max_contiguous(tl.arange(0, TILE * BLOCK), 4)
    inside = at < numel
    has_numbers = block * BLOCK < numel
    mean_maximum_ptr = tl.load(moments_ptr + 2).to(tl.pointer_type(tl.float32)) + block
    square_maximum_ptr = tl.load(moments_ptr + 3).to(tl.pointer_type(tl.float32)) + block

    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(clip_coef_ptr).to(tl.float32)
    p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean_value_ptr + tl.load(mean_ptr + at, mask=inside, other=127).to(tl.int32))
    m *= _of_each(tl.load(mean_maximum_ptr, mask=has_numbers, other=0.0), BLOCK)
    v = tl.load(square_value_ptr + tl.load(square_ptr + at, mask=inside, other=0).to(tl.int32))
    v *= _of_each(tl.load(square_maximum_ptr, mask=has_numbers, other=0.0), BLOCK)

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) * root_correction + eps)
    if IS_BY_CHANCE:
        p = _to_bfloat16(p, at, count)
    tl.store(param_ptr + at, p.to(PARAM_DTYPE), mask=inside)

    mean_maximum = tl.max(tl.reshape(tl.abs(m), (TILE, BLOCK)), axis=1)
    square_maximum = tl.max(tl.reshape(v, (TILE, BLOCK)), axis=1)
    tl.store(mean_maximum_ptr, mean_maximum, mask=has_numbers)
    tl.store(square_maximum_ptr, square_maximum, mask=has_numbers)
    m *= _of_each(1 / tl.where(mean_maximum > 0, mean_maximum, 1.0), BLOCK)
    v *= _of_each(1 / tl.where(square_maximum > 0, square_maximum, 1.0), BLOCK)
    tl.store(mean_ptr + at, _encode(m, True), mask=inside)
    tl.store(square_ptr + at, _encode(v, False), mask=inside)


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
            "TILE": _TILE,
            "BLOCK": _BLOCK,
        },
        num_warps=4,
    )
