"""Grouped linear with LoRA and a gate or a gate's backward, for Hopper (compute capability 9.0, bf16, fp16), in Gluon.

The same equations as `linear.py` and `gates.py`, its tested twins: `hopper_multiply.py` copies and multiplies,
`hopper_store.py` computes the gate, or its backward, from a tile of sums and writes it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from expertune.kernels.device import num_programs
from expertune.kernels.gates import GateKernel
from expertune.kernels.hopper_multiply import allocate, copy, multiply
from expertune.kernels.hopper_store import gate_backward, hand_over, store_gated
from expertune.kernels.launch import RowBlocks, ceil_div, launch
from expertune.shapes import Tiles

ROWS = 128
_DEPTH = 64
_COLUMNS, _STAGES = 128, 6  # of a tile and of the pipeline, ping-pong
_COOPERATIVE_COLUMNS, _COOPERATIVE_STAGES = 256, 4
_GROUP = 16  # row tiles that go through the columns together
_COOPERATIVE_WIDTH, _COOPERATIVE_ROWS = 1024, 2048  # at least; rows an expert on average; measured on an H100
_COOPERATIVE_GB_S = 4000  # of memory, at most: an H100 has 3,350; on an H200, with 4,900, ping-pong is 5 to 20 % faster
_PIECE, _GATE_WARPS = 16, 8  # rows at a time, and warps, of a gate's backward
_SUMMED = 1024  # parts of sums a program
_memory_gb_s = lru_cache(triton.testing.get_dram_gbps)


@gluon.jit
def _linear_kernel(
    x_desc,
    w_desc,
    mid_desc,
    b_desc,
    y_ptr,
    a_ptr,
    bias_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    ends_ptr,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    STORE: gl.constexpr,
    IS_K_CONTIGUOUS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    IS_COOPERATIVE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Persistent: each program walks every `num_programs`-th item."""
    buffers, barriers = allocate(x_desc, w_desc, IS_K_CONTIGUOUS, COLUMNS, STAGES, IS_COOPERATIVE)
    fence_async_shared()
    descriptors = (x_desc, w_desc, mid_desc, b_desc)
    tiles = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ends_ptr)
    widths = (I, O, R)
    work = ((y_ptr, a_ptr, bias_ptr), buffers, barriers, tiles, widths)
    # fmt: off
    gl.warp_specialize(
        [
            (multiply, (0, work, STORE, IS_K_CONTIGUOUS, IS_COOPERATIVE, GROUP, HAS_BIAS, IS_SPLIT, GATE, ALPHA,
                        LIMIT)),
            (multiply, (1, work, STORE, IS_K_CONTIGUOUS, IS_COOPERATIVE, GROUP, HAS_BIAS, IS_SPLIT, GATE, ALPHA,
                        LIMIT)),
            (copy, (descriptors, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS, IS_SPLIT, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )
    # fmt: on


@gluon.jit
def _gate_backward_kernel(
    dy_desc,
    w_desc,
    mid_desc,
    b_desc,
    h_ptr,
    dh_ptr,
    a_ptr,
    dweight_ptr,
    weight_ptr,
    row_slot_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    ends_ptr,
    I,  # noqa: E741
    F,
    R,
    STORE: gl.constexpr,
    IS_K_CONTIGUOUS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    IS_CONCATENATED: gl.constexpr,
    GRAD: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    PIECE: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Persistent and ping-pong; `NUM_WARPS` more warps take the tiles of `da` and compute the gate's backward."""
    buffers, barriers = allocate(dy_desc, w_desc, IS_K_CONTIGUOUS, COLUMNS, STAGES, False)
    ROWS: gl.constexpr = dy_desc.block_type.shape[0]
    by_row: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    tile = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [ROWS // PIECE, PIECE, COLUMNS], by_row)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    for group in gl.static_range(2):
        mbarrier.init(taken.index(group), count=1)
    fence_async_shared()
    descriptors = (dy_desc, w_desc, mid_desc, b_desc)
    tiles = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ends_ptr)
    widths = (I, F, R)
    handed = (tile, full, taken)
    outputs = (h_ptr, dh_ptr, a_ptr, dweight_ptr, weight_ptr, row_slot_ptr)
    work = (handed, buffers, barriers, tiles, widths)
    # fmt: off
    gl.warp_specialize(
        [
            (multiply, (0, work, STORE, IS_K_CONTIGUOUS, False, GROUP, False, False, None, 1.0, 0.0)),
            (multiply, (1, work, STORE, IS_K_CONTIGUOUS, False, GROUP, False, False, None, 1.0, 0.0)),
            (gate_backward, (handed, outputs, tiles, F, GROUP, IS_CONCATENATED, GRAD, ALPHA, LIMIT, NUM_WARPS)),
            (copy, (descriptors, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS, False, GROUP)),
        ],
        [4, NUM_WARPS, 1],
        [160, 64, 24],  # registers a thread; what the launch has beyond them, the first group gets
    )
    # fmt: on


@triton.jit(do_not_specialize=["N"])
def _sum_parts_kernel(parts_ptr, row_slot_ptr, out_ptr, N, P, ROWS: tl.constexpr, BP: tl.constexpr):
    """One program per block of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, BP)
    mask = (row < N)[:, None] & (part < P)[None, :]
    parts = tl.load(parts_ptr + row.to(tl.int64)[:, None] * P + part[None, :], mask=mask, other=0.0)
    slot = tl.load(row_slot_ptr + row, mask=row < N, other=0)
    tl.store(out_ptr + slot, tl.sum(parts, axis=1), mask=row < N)


@lru_cache(maxsize=64)
def _template(width: int, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """What descriptors of matrices of one width have in common, checked by Triton once."""
    row = torch.empty((1, width), dtype=dtype)
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return dict(vars(TensorDescriptor(row, [1, width], [width, 1], list(block), layout)))


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A two-dimensional view of a contiguous tensor, its first dimensions joined.

    Filled from a template: Triton's constructor checks for longer than a launch takes.
    """
    width = matrix.shape[-1]
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_template(width, block, matrix.dtype), base=matrix, shape=[matrix.numel() // width, width])
    return descriptor


def fuses(gate: GateKernel, w_EIO: Tensor) -> bool:
    """Whether `linear` can compute this gate of two parts: halves are copied row by row, and need weights by row."""
    return gate.has_up and (not gate.is_concatenated or w_EIO.stride(1) == 1)


def _gate_constants(gate: GateKernel | None) -> dict[str, Any]:
    if gate is None:
        return {"IS_SPLIT": False, "GATE": None, "ALPHA": 1.0, "LIMIT": 0.0}
    return {"IS_SPLIT": gate.is_concatenated, "GATE": gate.function, "ALPHA": gate.alpha, "LIMIT": gate.limit}


def _sum_parts(parts_NP: Tensor, row_slot_N: Tensor, out_TK: Tensor) -> None:
    """Every row's parts summed, at its slot."""
    num_rows, num_parts = parts_NP.shape
    blocks = RowBlocks.of(num_rows, num_parts, _SUMMED)
    launch(
        _sum_parts_kernel,
        blocks.grid,
        (parts_NP, row_slot_N, out_TK),
        (num_rows,),
        (num_parts,),
        {"ROWS": blocks.rows, "BP": blocks.columns},
        num_warps=4,
    )


class _Cut(NamedTuple):
    """How a product is cut, and what says so to a kernel."""

    descriptors: tuple[TensorDescriptor, ...]
    grid: tuple[int, int, int]
    widths: tuple[int, int, int]
    constants: dict[str, Any]
    is_cooperative: bool


def _cut(
    x_NI: Tensor,
    w_EIO: Tensor,
    tiles: Tiles,
    *,
    mid_NR: Tensor | None,
    b_ERO: Tensor | None,
    is_split: bool,
    is_cooperative: bool | None,
) -> _Cut:
    assert tiles.rows == ROWS
    num_experts, width, width_out = w_EIO.shape
    is_k_contiguous = w_EIO.stride(1) == 1
    if is_cooperative is None:
        is_large = width_out >= _COOPERATIVE_WIDTH and x_NI.shape[0] >= _COOPERATIVE_ROWS * num_experts
        is_cooperative = is_large and _memory_gb_s(x_NI.device.index) <= _COOPERATIVE_GB_S
    columns, stages = (_COOPERATIVE_COLUMNS, _COOPERATIVE_STAGES) if is_cooperative else (_COLUMNS, _STAGES)
    copied = columns // 2 if is_split else columns
    block = (copied, _DEPTH) if is_k_contiguous else (_DEPTH, copied)
    x_desc = _descriptor(x_NI, (ROWS, _DEPTH))
    w_desc = _descriptor(w_EIO.mT if is_k_contiguous else w_EIO, block)
    mid_desc, b_desc, rank = x_desc, w_desc, 0
    if mid_NR is not None and b_ERO is not None:
        assert (b_ERO.stride(1) == 1) is is_k_contiguous
        rank = mid_NR.shape[1]
        mid_desc = _descriptor(mid_NR, (ROWS, _DEPTH))
        b_desc = _descriptor(b_ERO.mT if is_k_contiguous else b_ERO, block)
    most = tiles.expert.shape[0] * ceil_div(width_out, columns)
    constants = {"COLUMNS": columns, "STAGES": stages, "GROUP": _GROUP}
    return _Cut(
        (x_desc, w_desc, mid_desc, b_desc),
        (min(most, num_programs(x_NI.device)), 1, 1),
        (width, width_out, rank),
        {"IS_K_CONTIGUOUS": is_k_contiguous} | constants,
        is_cooperative,
    )


def linear(
    x_NI: Tensor,
    w_EIO: Tensor,
    tiles: Tiles,
    *,
    mid_NR: Tensor | None = None,
    b_ERO: Tensor | None = None,
    bias_EO: Tensor | None = None,
    gate: GateKernel | None = None,
    is_cooperative: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`y_NO` and the gate's `a_NF`, in the dtype of `x_NI`, summed in float32; without a gate `a` is `y`.

    For the arguments see `linear.linear`. `tiles.rows` must be 128, and `fuses` true of the gate. The schedule is the
    one that was measured faster for such widths and rows, unless `is_cooperative` is given.
    """
    num_rows, width_out = x_NI.shape[0], w_EIO.shape[2]
    a = y_NO = x_NI.new_empty((num_rows, width_out))
    if gate is not None:
        a = x_NI.new_empty((num_rows, width_out // 2))
    if num_rows == 0:
        return y_NO, a
    gate_constants = _gate_constants(gate)
    is_split = gate_constants["IS_SPLIT"]
    cut = _cut(x_NI, w_EIO, tiles, mid_NR=mid_NR, b_ERO=b_ERO, is_split=is_split, is_cooperative=is_cooperative)
    launch(
        _linear_kernel,
        cut.grid,
        (y_NO, a, y_NO if bias_EO is None else bias_EO, tiles.expert, tiles.row, tiles.count, tiles.ends_E),
        (),
        cut.widths,
        {
            "STORE": store_gated,
            **cut.constants,
            "IS_COOPERATIVE": cut.is_cooperative,
            "HAS_BIAS": bias_EO is not None,
            **gate_constants,
        },
        descriptors=cut.descriptors,
        num_warps=4,
        maxnreg=168,
    )
    return y_NO, a


def linear_gate_backward(
    dy_NI: Tensor,
    w_EIF: Tensor,
    tiles: Tiles,
    h_NG: Tensor,
    weight_TK: Tensor,
    row_slot_N: Tensor,
    gate: GateKernel,
    *,
    mid_NR: Tensor | None = None,
    b_ERO: Tensor | None = None,
    overwrites: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gates.gate_backward` of `da_NF = linear(dy_NI, w_EIF)`, which is never written: what that gives.

    Args:
        dy_NI, w_EIF, tiles, mid_NR, b_ERO: as for `linear`.
        h_NG, weight_TK, row_slot_N, gate, overwrites: as for `gates.gate_backward`; the gate has two parts.
    """
    assert gate.has_up
    num_rows, width = h_NG.shape[0], w_EIF.shape[2]
    a_NF = dy_NI.new_empty((num_rows, width))
    dh_NG = h_NG if overwrites else torch.empty_like(h_NG)
    dweight_TK = torch.empty_like(weight_TK, dtype=torch.float32)
    if num_rows == 0:
        return a_NF, dh_NG, dweight_TK
    cut = _cut(dy_NI, w_EIF, tiles, mid_NR=mid_NR, b_ERO=b_ERO, is_split=False, is_cooperative=False)
    parts_NP = dweight_TK.new_empty((num_rows, ceil_div(width, _COLUMNS)))
    constants = {
        "IS_CONCATENATED": gate.is_concatenated,
        "GRAD": gate.grad,
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "PIECE": _PIECE,
        "NUM_WARPS": _GATE_WARPS,
    }
    launch(
        _gate_backward_kernel,
        cut.grid,
        (h_NG, dh_NG, a_NF, parts_NP, weight_TK, row_slot_N, tiles.expert, tiles.row, tiles.count, tiles.ends_E),
        (),
        cut.widths,
        {"STORE": hand_over, **cut.constants, **constants},
        descriptors=cut.descriptors,
        num_warps=4,
        maxnreg=96,
    )
    _sum_parts(parts_NP, row_slot_N, dweight_TK)
    return a_NF, dh_NG, dweight_TK
