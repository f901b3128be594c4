"""The norm of all gradients together, and the factor that clips them: two launches.

torch computes the norm of each gradient, then that of the norms, then the factor in four operations, and spends more
time on the CPU than the gradients of a hundred factors take on the device. Here a program takes a tile of one
gradient, which a table of addresses names, and writes its norm; one more program adds up, in a fixed order.
Any Triton target.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import are_aligned, launch
from expertune.kernels.many_tensors import TRITON_DTYPES, addresses_of, on_device, tiles_of

_TILE = 8192  # numbers of a program
_TILES = 8192  # that the last program adds up at a time
_EPS = tl.constexpr(1e-6)  # torch's, in `clip_grad_norm_`


@triton.jit
def _grad_norm_kernel(
    address_ptr, tile_ptr, numel_ptr, out_ptr,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    number = tl.load(tile_ptr + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tile_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    numel = tl.load(numel_ptr + number)
    grad_ptr = tl.load(address_ptr + number).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:  # so that numbers are read by the vector
        numel = tl.multiple_of(numel, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    at = tile * TILE + tl.arange(0, TILE)
    g = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sqrt(tl.sum(g * g)))


@triton.jit(do_not_specialize=["num_tiles", "max_norm"])
def _clip_coef_kernel(norm_ptr, out_ptr, num_tiles, max_norm, TILES: tl.constexpr):
    """One program."""
    sums = tl.zeros((TILES,), tl.float32)
    for first in range(0, num_tiles, TILES):
        at = first + tl.arange(0, TILES)
        norm = tl.load(norm_ptr + at, mask=at < num_tiles, other=0.0)
        sums += norm * norm
    norm = tl.sqrt(tl.sum(sums))
    coef = max_norm / (norm + _EPS)
    tl.store(out_ptr, norm)
    tl.store(out_ptr + 1, tl.where(coef > 1, 1.0, coef))  # what is no number stays none


def norm_and_clip_coef(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all numbers of all gradients, and `min(max_norm / (norm + 1e-6), 1)`: float32 scalars on the device.

    Two runs give the same bits, and nothing waits.

    Args:
        grads: at least one; contiguous, on one device, in float32, bfloat16 or float16.
        max_norm: at most which the norm is to be.
    """
    device = grads[0].device
    by_dtype = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    tables = [(alike, *tiles_of(tuple(map(Tensor.numel, alike)), _TILE, device)) for alike in by_dtype.values()]
    norms = torch.empty(sum(len(tiles) for _, tiles, _ in tables), dtype=torch.float32, device=device)
    first = 0
    for alike, tiles, numels in tables:
        _norms_of_tiles(alike, tiles, numels, norms[first : first + len(tiles)])
        first += len(tiles)
    out = torch.empty(2, dtype=torch.float32, device=device)
    launch(_clip_coef_kernel, (1, 1, 1), (norms, out), (len(norms), max_norm), (), {"TILES": _TILES}, num_warps=16)
    norm, coef = out.unbind()
    return norm, coef


def _norms_of_tiles(grads: Sequence[Tensor], tiles: Tensor, numels: Tensor, out: Tensor) -> None:
    """Of gradients of one dtype."""
    addresses = addresses_of(grads)
    launch(
        _grad_norm_kernel,
        (len(tiles), 1, 1),
        (on_device(addresses, out.device), tiles, numels, out),
        (),
        (),
        {
            "DTYPE": TRITON_DTYPES[grads[0].dtype],
            "IS_ALIGNED": are_aligned(addresses) and are_aligned([*map(Tensor.numel, grads)]),
            "TILE": _TILE,
        },
        num_warps=8,
    )
