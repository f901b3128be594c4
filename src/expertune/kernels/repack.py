"""Repack: LoRA factors between PEFT's layout and the kernels', every tensor of a pass in one launch.

Each is cast and scaled, and turned where it must be: PEFT keeps `lora_B` as `(O, R·E)`, expert-fastest, a matrix of
`O·R` rows and `E` columns, while grouped products read one matrix an expert, `(E, O·R)`. Any Triton target.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch

_SIDE = 64  # rows and columns of a tile
_MOST = 4  # tensors a launch


class Job(NamedTuple):
    """`out = scale · source` or, with `adds`, `out += scale · source`, rounded once to the dtype of `out`.

    With `sides`, the second and the last of four are swapped.

    Args:
        source: contiguous.
        out: contiguous; of the shape of `source`, or `(G, M, S, P)`.
        scale: multiplies every element before it is rounded.
        sides: None, or `(G, P, S, M)`, as which `source` is read. `(1, P, 1, M)` is a matrix to be transposed.
        adds: whether to what `out` holds.
    """

    source: Tensor
    out: Tensor
    scale: float = 1.0
    sides: tuple[int, int, int, int] | None = None
    adds: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        """`P, S, M`, as the kernel walks them."""
        return (1, 1, self.source.numel()) if self.sides is None else self.sides[1:]

    @property
    def num_tiles(self) -> int:
        """Programs that it takes."""
        if self.sides is None:
            return ceil_div(self.source.numel(), _SIDE * _SIDE)
        G, P, S, M = self.sides
        return G * ceil_div(P, _SIDE) * ceil_div(S * M, _SIDE)


@triton.jit
def _repack_tile(
    in_ptr, out_ptr, P, S, M, scale, tile, IS_TURNED: tl.constexpr, ADDS: tl.constexpr, SIDE: tl.constexpr
):
    """One tile of one job."""
    i, j = tl.arange(0, SIDE), tl.arange(0, SIDE)
    Q = S * M
    if IS_TURNED:
        num_columns = tl.cdiv(Q, SIDE)
        num_tiles = tl.cdiv(P, SIDE) * num_columns
        start = (tile // num_tiles).to(tl.int64) * P * Q
        p = (tile % num_tiles // num_columns) * SIDE + i
        q = (tile % num_columns) * SIDE + j
        mask = (p < P)[:, None] & (q < Q)[None, :]
        source = in_ptr + start + p.to(tl.int64)[:, None] * Q + q[None, :]
        values = tl.load(source, mask=mask, other=0.0).to(tl.float32) * scale
        row = (q % M) * S + q // M
        out = out_ptr + start + row.to(tl.int64)[:, None] * P + p[None, :]
        mask = (q < Q)[:, None] & (p < P)[None, :]
        if ADDS:
            turned = tl.trans(values) + tl.load(out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out, turned.to(out_ptr.dtype.element_ty), mask=mask)
        else:  # half as many bytes are turned
            tl.store(out, tl.trans(values.to(out_ptr.dtype.element_ty)), mask=mask)
    else:
        offset = tile.to(tl.int64) * (SIDE * SIDE) + (i * SIDE)[:, None] + j[None, :]
        values = tl.load(in_ptr + offset, mask=offset < Q, other=0.0).to(tl.float32) * scale
        if ADDS:
            values += tl.load(out_ptr + offset, mask=offset < Q, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=offset < Q)


@triton.jit(do_not_specialize=["end0", "end1", "end2"])
def _repack_kernel(
    in0_ptr,
    out0_ptr,
    in1_ptr,
    out1_ptr,
    in2_ptr,
    out2_ptr,
    in3_ptr,
    out3_ptr,
    end0,
    end1,
    end2,
    P0,
    S0,
    M0,
    P1,
    S1,
    M1,
    P2,
    S2,
    M2,
    P3,
    S3,
    M3,
    scale0,
    scale1,
    scale2,
    scale3,
    TURNED0: tl.constexpr,
    TURNED1: tl.constexpr,
    TURNED2: tl.constexpr,
    TURNED3: tl.constexpr,
    ADDS0: tl.constexpr,
    ADDS1: tl.constexpr,
    ADDS2: tl.constexpr,
    ADDS3: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One program per tile; the jobs' tiles lie one after another, and job `i` ends at tile `end_i`."""
    tile = tl.program_id(0)
    if tile < end0:
        _repack_tile(in0_ptr, out0_ptr, P0, S0, M0, scale0, tile, TURNED0, ADDS0, SIDE)
    elif tile < end1:
        _repack_tile(in1_ptr, out1_ptr, P1, S1, M1, scale1, tile - end0, TURNED1, ADDS1, SIDE)
    elif tile < end2:
        _repack_tile(in2_ptr, out2_ptr, P2, S2, M2, scale2, tile - end1, TURNED2, ADDS2, SIDE)
    else:
        _repack_tile(in3_ptr, out3_ptr, P3, S3, M3, scale3, tile - end2, TURNED3, ADDS3, SIDE)


def repack(jobs: Sequence[Job]) -> None:
    """Do up to four jobs in one launch, more in several."""
    for first in range(0, len(jobs), _MOST):
        _launch(jobs[first : first + _MOST])


def _launch(jobs: Sequence[Job]) -> None:
    ends, num_tiles = [], 0
    for job in jobs:
        num_tiles += job.num_tiles
        ends.append(num_tiles)
    filled = (*jobs, *[jobs[-1]] * (_MOST - len(jobs)))  # beyond the last end no tile is left for the copies
    ends += [num_tiles] * (_MOST - len(jobs))
    launch(
        _repack_kernel,
        (num_tiles, 1, 1),
        tuple(tensor for job in filled for tensor in (job.source, job.out)),
        tuple(ends[:3]),
        (*[side for job in filled for side in job.size], *[job.scale for job in filled]),
        {
            **{f"TURNED{i}": job.sides is not None for i, job in enumerate(filled)},
            **{f"ADDS{i}": job.adds for i, job in enumerate(filled)},
            "SIDE": _SIDE,
        },
        num_warps=4,
    )
