"""Grouped linear with LoRA and a gate for Hopper (compute capability 9.0, bf16 and fp16), in Gluon.

The same equation as `linear.py` and `gates.py`, its tested twins. One warp copies tiles with the tensor memory
accelerator; two groups of four warps multiply, in one of two schedules (named as in CUTLASS):

- ping-pong: each has its own tile of 128 columns, in turns, so that one stores its tile while the other multiplies;
- cooperative: each takes half the rows of a tile of 256 columns, for which a quarter less is read from L2: faster where
  an expert has so many rows that they do not stay there and the card's memory is slow beside its matrix unit.

LoRA is one more step of the copying warp, from the descriptors of `mid` and `B`: no copies, weights untouched, almost
no time. A gate is computed on the tile before it is stored. Where gate and up lie in two halves, a tile is one half of
columns of each.
A step that reaches beyond a width reads zeros.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from expertune.kernels.device import num_programs
from expertune.kernels.gates import GateKernel
from expertune.kernels.launch import ceil_div, launch
from expertune.shapes import Tiles

ROWS = 128
_DEPTH = 64
_COLUMNS, _STAGES = 128, 6  # of a tile and of the pipeline, ping-pong
_COOPERATIVE_COLUMNS, _COOPERATIVE_STAGES = 256, 4
_GROUP = 16  # row tiles that go through the columns together
_COOPERATIVE_WIDTH, _COOPERATIVE_ROWS = 1024, 2048  # at least; rows an expert on average; measured on an H100
_COOPERATIVE_GB_S = 4000  # of memory, at most: an H100 has 3,350; on an H200, with 4,900, ping-pong is 5 to 20 % faster
_memory_gb_s = lru_cache(triton.testing.get_dram_gbps)


@gluon.jit
def _num_column_tiles(O, IS_SPLIT: gl.constexpr, COLUMNS: gl.constexpr):  # noqa: E741
    if IS_SPLIT:
        return gl.cdiv(O // 2, COLUMNS // 2)
    return gl.cdiv(O, COLUMNS)


@gluon.jit
def _locate(item, num_columns, tiles, ROWS: gl.constexpr, GROUP: gl.constexpr):
    """An item's expert, first row, end of the expert's rows, and column tile.

    Up to `GROUP` row tiles of an expert go through all columns together, rows fastest: what is in flight shares more of
    its operands in L2 than rows of columns would.
    """
    tile_expert_ptr, tile_row_ptr, _num_tiles_ptr, ends_ptr = tiles
    tile = item // num_columns  # some tile of the same expert
    expert = gl.load(tile_expert_ptr + tile)
    start = gl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = gl.load(ends_ptr + expert)
    item -= (tile - (gl.load(tile_row_ptr + tile) - start) // ROWS) * num_columns
    group = item // (GROUP * num_columns)
    item -= group * GROUP * num_columns
    num_rows = gl.minimum(gl.cdiv(end - start, ROWS) - group * GROUP, GROUP)
    return expert, start + (group * GROUP + item % num_rows) * ROWS, end, item // num_rows


@gluon.jit
def _copy(
    descriptors,
    buffers,
    barriers,
    tiles,
    widths,
    IS_K_CONTIGUOUS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The copying warp: for every item in turn its base steps, then its LoRA steps, each into the next free stage."""
    x_desc, w_desc, mid_desc, b_desc = descriptors
    x_bufs, w_bufs = buffers
    ready, empty, _turn = barriers
    _tile_expert_ptr, _tile_row_ptr, num_tiles_ptr, _ends_ptr = tiles
    I, O, R = widths  # noqa: E741
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    ROWS: gl.constexpr = x_bufs.type.shape[1]
    DEPTH: gl.constexpr = x_bufs.type.shape[2]
    COLUMNS: gl.constexpr = w_bufs.type.shape[1] if IS_K_CONTIGUOUS else w_bufs.type.shape[2]
    HALF: gl.constexpr = COLUMNS // 2
    NUM_COPIES: gl.constexpr = 2 if IS_SPLIT else 1
    num_base = gl.cdiv(I, DEPTH)
    num_steps = num_base + gl.cdiv(R, DEPTH)
    num_columns = _num_column_tiles(O, IS_SPLIT, COLUMNS)
    step = 0
    for item in range(gl.program_id(0), gl.load(num_tiles_ptr) * num_columns, gl.num_programs(0)):
        expert, row, _end, item_column = _locate(item, num_columns, tiles, ROWS, GROUP)
        column = item_column * (COLUMNS // NUM_COPIES)
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar, x_buf, w_buf = ready.index(stage), x_bufs.index(stage), w_bufs.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + NUM_COPIES * w_desc.block_type.nbytes)
            if k < num_base:
                first = k * DEPTH
                tma.async_copy_global_to_shared(x_desc, [row, first], bar, x_buf)
                if IS_SPLIT:
                    tma.async_copy_global_to_shared(w_desc, [expert * O + column, first], bar, w_buf.slice(0, HALF))
                    up = expert * O + O // 2 + column
                    tma.async_copy_global_to_shared(w_desc, [up, first], bar, w_buf.slice(HALF, HALF))
                elif IS_K_CONTIGUOUS:
                    tma.async_copy_global_to_shared(w_desc, [expert * O + column, first], bar, w_buf)
                else:
                    tma.async_copy_global_to_shared(w_desc, [expert * I + first, column], bar, w_buf)
            else:
                first = (k - num_base) * DEPTH
                tma.async_copy_global_to_shared(mid_desc, [row, first], bar, x_buf)
                if IS_SPLIT:
                    tma.async_copy_global_to_shared(b_desc, [expert * O + column, first], bar, w_buf.slice(0, HALF))
                    up = expert * O + O // 2 + column
                    tma.async_copy_global_to_shared(b_desc, [up, first], bar, w_buf.slice(HALF, HALF))
                elif IS_K_CONTIGUOUS:
                    tma.async_copy_global_to_shared(b_desc, [expert * O + column, first], bar, w_buf)
                else:
                    tma.async_copy_global_to_shared(b_desc, [expert * R + first, column], bar, w_buf)
            step += 1


@gluon.jit
def _store_half(half, y_ptr, row, end, column, width, stride):
    """Write half a tile: the whole at once would not fit the registers."""
    ROWS: gl.constexpr = half.type.shape[0]
    COLUMNS: gl.constexpr = half.type.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    j = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    offset = gl.expand_dims(i.to(gl.int64) * stride, 1) + gl.expand_dims(j, 0)
    mask = gl.expand_dims(i < end, 1) & gl.expand_dims(j < width, 0)
    gl.store(y_ptr + offset, gl.convert_layout(half, layout), mask=mask)


@gluon.jit
def _store(
    acc,
    outputs,
    expert,
    row,
    end,
    item_column,
    O,  # noqa: E741
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Write one tile of `y`, and with a gate also of `a`, computed from `y` as it is stored."""
    y_ptr, a_ptr, bias_ptr = outputs
    ROWS: gl.constexpr = acc.type.shape[0]
    COLUMNS: gl.constexpr = acc.type.shape[1]
    HALF: gl.constexpr = COLUMNS // 2
    if IS_SPLIT:
        first, width = item_column * HALF, O // 2
        second = width + first
    else:
        first, width = item_column * COLUMNS, O
        second = first + HALF
    if HAS_BIAS:
        at = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
        j = gl.where(at < HALF, first + at, second - HALF + at)
        bias = gl.load(bias_ptr + expert.to(gl.int64) * O + j, mask=j < O, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    y = acc.to(y_ptr.dtype.element_ty)
    left, right = y.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
    _store_half(left, y_ptr, row, end, first, width, O)
    _store_half(right, y_ptr, row, end, second, O, O)
    if GATE is not None:
        if not IS_SPLIT:
            left, right = y.reshape([ROWS, HALF, 2]).split()
        a = GATE(left.to(gl.float32), right.to(gl.float32), ALPHA, LIMIT).to(y_ptr.dtype.element_ty)
        _store_half(a, a_ptr, row, end, item_column * HALF, O // 2, O // 2)


@gluon.jit
def _multiply(
    ME: gl.constexpr,
    work,
    IS_K_CONTIGUOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    IS_COOPERATIVE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One of the two groups that multiply: its half of every item, or all of every second.

    In ping-pong its turn comes when the other has one step yet to issue: the matrix unit waits for no tile's beginning.
    """
    outputs, buffers, barriers, tiles, widths = work
    x_bufs, w_bufs = buffers
    ready, empty, turn = barriers
    _tile_expert_ptr, _tile_row_ptr, num_tiles_ptr, _ends_ptr = tiles
    I, O, R = widths  # noqa: E741
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    ROWS: gl.constexpr = x_bufs.type.shape[1] // 2 if IS_COOPERATIVE else x_bufs.type.shape[1]
    FIRST_ROW: gl.constexpr = ME * ROWS if IS_COOPERATIVE else 0
    FIRST_ITEM: gl.constexpr = 0 if IS_COOPERATIVE else ME
    NUM_TURNS: gl.constexpr = 1 if IS_COOPERATIVE else 2
    DEPTH: gl.constexpr = x_bufs.type.shape[2]
    COLUMNS: gl.constexpr = w_bufs.type.shape[1] if IS_K_CONTIGUOUS else w_bufs.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    num_steps = gl.cdiv(I, DEPTH) + gl.cdiv(R, DEPTH)
    num_columns = _num_column_tiles(O, IS_SPLIT, COLUMNS)
    total = gl.load(num_tiles_ptr) * num_columns
    turns = 0
    step = FIRST_ITEM * num_steps
    for item in range(gl.program_id(0) + FIRST_ITEM * gl.num_programs(0), total, NUM_TURNS * gl.num_programs(0)):
        expert, row, end, item_column = _locate(item, num_columns, tiles, x_bufs.type.shape[1], GROUP)
        row += FIRST_ROW
        # A group that waited for its stages out of turn could take an older fill of the same parity for its own.
        if not IS_COOPERATIVE:
            mbarrier.wait(turn.index(ME), (turns & 1) ^ (1 - ME))
        acc = warpgroup_mma_init(gl.zeros((ROWS, COLUMNS), gl.float32, layout))
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            w_buf = w_bufs.index(stage).permute((1, 0)) if IS_K_CONTIGUOUS else w_bufs.index(stage)
            x_buf = x_bufs.index(stage).slice(FIRST_ROW, ROWS)
            acc = warpgroup_mma(x_buf, w_buf, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            if not IS_COOPERATIVE:
                mbarrier.arrive(turn.index(1 - ME), count=1, pred=k == gl.maximum(num_steps - 2, 0))
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        _store(acc, outputs, expert, row, end, item_column, O, HAS_BIAS, IS_SPLIT, GATE, ALPHA, LIMIT)
        step += (NUM_TURNS - 1) * num_steps
        turns += 1


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
    IS_K_CONTIGUOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    IS_COOPERATIVE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Persistent: each program walks every `num_programs`-th item."""
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    w_shape: gl.constexpr = [COLUMNS, DEPTH] if IS_K_CONTIGUOUS else [DEPTH, COLUMNS]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_shape, w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2 if IS_COOPERATIVE else 1)
    turn = empty
    if not IS_COOPERATIVE:  # a barrier that nobody waits for is no barrier to Triton: it puts other data there
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for group in gl.static_range(2):
            mbarrier.init(turn.index(group), count=1)
    fence_async_shared()
    descriptors = (x_desc, w_desc, mid_desc, b_desc)
    outputs = (y_ptr, a_ptr, bias_ptr)
    buffers = (x_bufs, w_bufs)
    barriers = (ready, empty, turn)
    tiles = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ends_ptr)
    widths = (I, O, R)
    work = (outputs, buffers, barriers, tiles, widths)
    gl.warp_specialize(
        [
            (_multiply, (0, work, IS_K_CONTIGUOUS, HAS_BIAS, IS_SPLIT, GATE, ALPHA, LIMIT, IS_COOPERATIVE, GROUP)),
            (_multiply, (1, work, IS_K_CONTIGUOUS, HAS_BIAS, IS_SPLIT, GATE, ALPHA, LIMIT, IS_COOPERATIVE, GROUP)),
            (_copy, (descriptors, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS, IS_SPLIT, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )


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
    num_rows, width = x_NI.shape
    width_out = w_EIO.shape[2]
    a = y_NO = x_NI.new_empty((num_rows, width_out))
    if gate is not None:
        a = x_NI.new_empty((num_rows, width_out // 2))
    if num_rows == 0:
        return y_NO, a
    assert tiles.rows == ROWS
    is_k_contiguous = w_EIO.stride(1) == 1
    if is_cooperative is None:
        is_large = width_out >= _COOPERATIVE_WIDTH and num_rows >= _COOPERATIVE_ROWS * w_EIO.shape[0]
        is_cooperative = is_large and _memory_gb_s(x_NI.device.index) <= _COOPERATIVE_GB_S
    columns, stages = (_COOPERATIVE_COLUMNS, _COOPERATIVE_STAGES) if is_cooperative else (_COLUMNS, _STAGES)
    copied = columns // 2 if gate is not None and gate.is_concatenated else columns
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
    launch(
        _linear_kernel,
        (min(most, num_programs(x_NI.device)), 1, 1),
        (y_NO, a, y_NO if bias_EO is None else bias_EO, tiles.expert, tiles.row, tiles.count, tiles.ends_E),
        (),
        (width, width_out, rank),
        {
            "IS_K_CONTIGUOUS": is_k_contiguous,
            "HAS_BIAS": bias_EO is not None,
            **_gate_constants(gate),
            "COLUMNS": columns,
            "STAGES": stages,
            "IS_COOPERATIVE": is_cooperative,
            "GROUP": _GROUP,
        },
        descriptors=(x_desc, w_desc, mid_desc, b_desc),
        num_warps=4,
        maxnreg=168,
    )
    return y_NO, a
