"""Grouped linear with LoRA for Hopper (compute capability 9.0, bf16 and fp16), in Gluon.

The same equation as `linear.py`, its tested twin. One warp copies tiles with the tensor memory accelerator; two groups
of four warps multiply in turns, so that one stores its tile while the other keeps the tensor cores busy. LoRA is one
more step of the copying warp, from the descriptors of `mid` and `B`: no copies, weights untouched, almost no time.
A step that reaches beyond a width reads zeros.
"""

from functools import lru_cache

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
from expertune.kernels.launch import launch
from expertune.shapes import Tiles

ROWS = 128
_COLUMNS = 128
_DEPTH = 64
_STAGES = 6


@gluon.jit
def _copy(descriptors, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS: gl.constexpr):
    """The copying warp: for every item in turn its base steps, then its LoRA steps, each into the next free stage."""
    x_desc, w_desc, mid_desc, b_desc = descriptors
    x_bufs, w_bufs = buffers
    ready, empty, _turn = barriers
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, _ends_ptr = tiles
    I, O, R = widths  # noqa: E741
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    DEPTH: gl.constexpr = x_bufs.type.shape[2]
    COLUMNS: gl.constexpr = w_bufs.type.shape[1] if IS_K_CONTIGUOUS else w_bufs.type.shape[2]
    num_base = gl.cdiv(I, DEPTH)
    num_steps = num_base + gl.cdiv(R, DEPTH)
    num_columns = gl.cdiv(O, COLUMNS)
    step = 0
    for item in range(gl.program_id(0), gl.load(num_tiles_ptr) * num_columns, gl.num_programs(0)):
        tile = item // num_columns
        expert = gl.load(tile_expert_ptr + tile)
        row = gl.load(tile_row_ptr + tile)
        column = (item % num_columns) * COLUMNS
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar, x_buf, w_buf = ready.index(stage), x_bufs.index(stage), w_bufs.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            if k < num_base:
                tma.async_copy_global_to_shared(x_desc, [row, k * DEPTH], bar, x_buf)
                if IS_K_CONTIGUOUS:
                    tma.async_copy_global_to_shared(w_desc, [expert * O + column, k * DEPTH], bar, w_buf)
                else:
                    tma.async_copy_global_to_shared(w_desc, [expert * I + k * DEPTH, column], bar, w_buf)
            else:
                first = (k - num_base) * DEPTH
                tma.async_copy_global_to_shared(mid_desc, [row, first], bar, x_buf)
                if IS_K_CONTIGUOUS:
                    tma.async_copy_global_to_shared(b_desc, [expert * O + column, first], bar, w_buf)
                else:
                    tma.async_copy_global_to_shared(b_desc, [expert * R + first, column], bar, w_buf)
            step += 1


@gluon.jit
def _store(acc, y_ptr, bias_ptr, expert, row, end, column, O, HAS_BIAS: gl.constexpr):  # noqa: E741
    """Write one tile, half of its columns at a time: the whole at once would not fit the registers."""
    ROWS: gl.constexpr = acc.type.shape[0]
    COLUMNS: gl.constexpr = acc.type.shape[1]
    HALF: gl.constexpr = COLUMNS // 2
    if HAS_BIAS:
        along: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
        j = column + gl.arange(0, COLUMNS, layout=along)
        bias = gl.load(bias_ptr + expert.to(gl.int64) * O + j, mask=j < O, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offset = gl.expand_dims(i.to(gl.int64) * O, 1)
    in_expert = gl.expand_dims(i < end, 1)
    halves = acc.to(y_ptr.dtype.element_ty).reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
    for half in gl.static_range(2):
        j = column + half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
        mask = in_expert & gl.expand_dims(j < O, 0)
        gl.store(y_ptr + offset + gl.expand_dims(j, 0), gl.convert_layout(halves[half], layout), mask=mask)


@gluon.jit
def _multiply(
    ME: gl.constexpr,
    y_ptr,
    bias_ptr,
    buffers,
    barriers,
    tiles,
    widths,
    IS_K_CONTIGUOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One of the two groups that multiply: every second item. Its turn comes when the other has issued its own."""
    x_bufs, w_bufs = buffers
    ready, empty, turn = barriers
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ends_ptr = tiles
    I, O, R = widths  # noqa: E741
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    ROWS: gl.constexpr = x_bufs.type.shape[1]
    DEPTH: gl.constexpr = x_bufs.type.shape[2]
    COLUMNS: gl.constexpr = w_bufs.type.shape[1] if IS_K_CONTIGUOUS else w_bufs.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    num_steps = gl.cdiv(I, DEPTH) + gl.cdiv(R, DEPTH)
    num_columns = gl.cdiv(O, COLUMNS)
    total = gl.load(num_tiles_ptr) * num_columns
    turns = 0
    step = ME * num_steps
    for item in range(gl.program_id(0) + ME * gl.num_programs(0), total, 2 * gl.num_programs(0)):
        tile = item // num_columns
        expert = gl.load(tile_expert_ptr + tile)
        row = gl.load(tile_row_ptr + tile)
        end = gl.load(ends_ptr + expert)
        # A group that waited for its stages out of turn could take an older fill of the same parity for its own.
        mbarrier.wait(turn.index(ME), (turns & 1) ^ (1 - ME))
        acc = warpgroup_mma_init(gl.zeros((ROWS, COLUMNS), gl.float32, layout))
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            w_buf = w_bufs.index(stage).permute((1, 0)) if IS_K_CONTIGUOUS else w_bufs.index(stage)
            acc = warpgroup_mma(x_bufs.index(stage), w_buf, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - ME), count=1)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        _store(acc, y_ptr, bias_ptr, expert, row, end, column=(item % num_columns) * COLUMNS, O=O, HAS_BIAS=HAS_BIAS)
        step += num_steps
        turns += 1


@gluon.jit
def _linear_kernel(
    x_desc,
    w_desc,
    mid_desc,
    b_desc,
    bias_ptr,
    y_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    ends_ptr,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    IS_K_CONTIGUOUS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Persistent: each program walks every `num_programs`-th item, tile by tile of rows, columns fastest."""
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turn.index(group), count=1)
    fence_async_shared()
    buffers = (x_bufs, w_bufs)
    barriers = (ready, empty, turn)
    tiles = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr, ends_ptr)
    widths = (I, O, R)
    gl.warp_specialize(
        [
            (_multiply, (0, y_ptr, bias_ptr, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS, HAS_BIAS)),
            (_multiply, (1, y_ptr, bias_ptr, buffers, barriers, tiles, widths, IS_K_CONTIGUOUS, HAS_BIAS)),
            (_copy, ((x_desc, w_desc, mid_desc, b_desc), buffers, barriers, tiles, widths, IS_K_CONTIGUOUS)),
        ],
        [4, 1],
        [232, 40],
    )


@lru_cache(maxsize=32)
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A two-dimensional view of a contiguous tensor, its first dimensions joined."""
    width = matrix.shape[-1]
    return TensorDescriptor(matrix, [matrix.numel() // width, width], [width, 1], list(block), _layout(*block))


def linear(
    x_NI: Tensor,
    w_EIO: Tensor,
    tiles: Tiles,
    *,
    mid_NR: Tensor | None = None,
    b_ERO: Tensor | None = None,
    bias_EO: Tensor | None = None,
) -> Tensor:
    """`y_NO`, in the dtype of `x_NI`, summed in float32. See `linear.linear`; `tiles.rows` must be 128."""
    num_rows, width = x_NI.shape
    width_out = w_EIO.shape[2]
    y_NO = x_NI.new_empty((num_rows, width_out))
    if num_rows == 0:
        return y_NO
    assert tiles.rows == ROWS
    is_k_contiguous = w_EIO.stride(1) == 1
    block = (_COLUMNS, _DEPTH) if is_k_contiguous else (_DEPTH, _COLUMNS)
    x_desc = _descriptor(x_NI, (ROWS, _DEPTH))
    w_desc = _descriptor(w_EIO.mT if is_k_contiguous else w_EIO, block)
    mid_desc, b_desc, rank = x_desc, w_desc, 0
    if mid_NR is not None and b_ERO is not None:
        assert (b_ERO.stride(1) == 1) is is_k_contiguous
        rank = mid_NR.shape[1]
        mid_desc = _descriptor(mid_NR, (ROWS, _DEPTH))
        b_desc = _descriptor(b_ERO.mT if is_k_contiguous else b_ERO, block)
    most = tiles.expert.shape[0] * triton.cdiv(width_out, _COLUMNS)
    launch(
        _linear_kernel,
        (min(most, num_programs(x_NI.device)), 1, 1),
        (
            bias_EO if bias_EO is not None else y_NO,
            y_NO,
            tiles.expert,
            tiles.row,
            tiles.count,
            tiles.ends_E,
        ),
        (),
        (width, width_out, rank),
        {"IS_K_CONTIGUOUS": is_k_contiguous, "HAS_BIAS": bias_EO is not None, "STAGES": _STAGES},
        descriptors=(x_desc, w_desc, mid_desc, b_desc),
        num_warps=4,
        maxnreg=168,
    )
    return y_NO
