"""The second round of attention's backward for Hopper (compute capability 9.0, bf16, fp16), in Gluon.

The same equations as `attention_products.py`, its tested twin: products of 128 rows by a head's width, of which two
groups of four warps have half the rows each, while one warp copies.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from expertune.kernels.attention import Part, first_key, last_query, place
from expertune.kernels.attention_hopper import KEYS, copy_head, has_rest, rests, split_head_tiles, write
from expertune.kernels.attention_spans import Spans
from expertune.kernels.hopper_multiply import sums_layout
from expertune.kernels.hopper_names import copy_tile
from expertune.kernels.launch import launch

_DEPTH = 64  # of a step
_STAGES = {192: 5, 256: 4}  # by the width of heads


@gluon.jit
def _copy(
    descriptors, buffers, barriers, where, sizes, OF_QUERIES: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr,
    IS_BAND: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step both groups' tiles of `dS`, and one of keys or queries."""
    ds_desc, x_desc, rest_desc = descriptors
    ds_bufs, x_bufs, rest_bufs = buffers
    ready, empty = barriers
    block, own, first, num_steps = where
    head_rows, first_block, num_diagonal, x_head = sizes
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    DEPTH: gl.constexpr = x_bufs.type.shape[1]
    HALF: gl.constexpr = ds_desc.block_type.shape[0]
    KEYS: gl.constexpr = 2 * HALF
    x_bytes: gl.constexpr = x_desc.block_type.nbytes + HAS_REST * rest_desc.block_type.nbytes
    block_row, block_shift = place(block, first_block, num_diagonal, IS_BAND, KEYS)
    step = 0
    for head in range(own * HEADS, (own + 1) * HEADS):
        for at in range(first, first + num_steps * DEPTH, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar, x_buf = ready.index(stage), x_bufs.index(stage)
            mbarrier.expect(bar, 2 * ds_desc.block_type.nbytes + x_bytes)
            if OF_QUERIES:
                row, shift = place(at // KEYS, first_block, num_diagonal, IS_BAND, KEYS)
                row += head * head_rows + at % KEYS
                for half in gl.static_range(2):
                    column = block * KEYS + half * HALF + shift
                    copy_tile(ds_desc, [row, column], bar, ds_bufs.index(2 * stage + half))
            else:
                for half in gl.static_range(2):
                    row = head * head_rows + block_row + half * HALF
                    copy_tile(ds_desc, [row, at + block_shift], bar, ds_bufs.index(2 * stage + half))
            x_at = [at, head // GROUP * x_head]
            copy_head((x_desc, rest_desc), x_at, bar, x_buf, rest_bufs.index(stage), HAS_REST)
            step += 1


@gluon.jit
def _multiply(
    ME: gl.constexpr, buffers, barriers, where, pointers, sizes, strides, scale, OF_QUERIES: gl.constexpr,
    HEADS: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply: half of the block's rows."""
    ds_bufs, x_bufs, rest_bufs = buffers
    ready, empty = barriers
    block, own, _first, num_steps = where
    T, has_before = sizes
    STAGES: gl.constexpr = x_bufs.type.shape[0]
    WIDTH: gl.constexpr = x_bufs.type.shape[2]
    ROWS: gl.constexpr = 64
    layout: gl.constexpr = sums_layout(WIDTH)
    total = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, layout))
    if HAS_REST:
        REST: gl.constexpr = rest_bufs.type.shape[2]
        of_rest: gl.constexpr = sums_layout(REST)
        rest = warpgroup_mma_init(gl.zeros((ROWS, REST), gl.float32, of_rest))
    for step in range(num_steps * HEADS):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        ds_buf = ds_bufs.index(2 * stage + ME)
        if OF_QUERIES:
            ds_buf = ds_buf.permute((1, 0))
        total = warpgroup_mma(ds_buf, x_bufs.index(stage), total, is_async=True)
        if HAS_REST:
            rest = warpgroup_mma(ds_buf, rest_bufs.index(stage), rest, is_async=True)
            total, rest = warpgroup_mma_wait(num_outstanding=2, deps=(total, rest))
            rest = warpgroup_mma_init(rest)
            total = warpgroup_mma_init(total)
        else:
            total = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(total,)))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,)) * scale
    row = block * 2 * ROWS + ME * ROWS
    write(total, row, own, T, has_before, pointers, strides)
    if HAS_REST:
        rest = warpgroup_mma_wait(num_outstanding=0, deps=(rest,)) * scale
        sum_ptr, out_ptr = pointers
        write(rest, row, own, T, has_before, (sum_ptr + WIDTH, out_ptr + WIDTH), strides)


@gluon.jit(
    do_not_specialize=["first_block", "end", "key_blocks", "num_heads", "T", "_pitch_blocks", "rows_blocks", "adds"]
)
def _attention_products_kernel(
    ds_desc, x_desc, rest_desc,
    row_ptr, sum_ptr, out_ptr,
    first_block, end, key_blocks, num_heads, T, _pitch_blocks, rows_blocks, adds,
    x_head, sum_row, sum_head, out_row, out_head, scale,
    OF_QUERIES: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, IS_BAND: gl.constexpr, HAS_REST: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One program a block of rows of a sum; those of whole samples with most to sum first."""
    DEPTH: gl.constexpr = x_desc.block_type.shape[0]
    KEYS: gl.constexpr = 2 * ds_desc.block_type.shape[0]
    num_blocks = gl.cdiv(end, KEYS)
    num_sums = num_heads // HEADS
    block, own = gl.program_id(0) // num_sums, gl.program_id(0) % num_sums
    if OF_QUERIES:
        block = num_blocks - 1 - block
        first = first_key(row_ptr, block, KEYS, KEYS)
        num_steps = (gl.minimum(block + 1, key_blocks) * KEYS - first) // DEPTH
        has_before = key_blocks <= block
    else:
        first = gl.maximum(block, first_block) * KEYS
        num_steps = gl.cdiv(last_query(row_ptr, block, end, T, KEYS) - first, DEPTH)
        has_before = (block < first_block) | (adds > 0)
    ds_bufs = gl.allocate_shared_memory(ds_desc.dtype, [2 * STAGES] + ds_desc.block_type.shape, ds_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    descriptors = (ds_desc, x_desc, rest_desc)
    buffers = (ds_bufs, x_bufs, rests(x_bufs, rest_desc, STAGES, HAS_REST))
    barriers = (ready, empty)
    where = (block, own, first, num_steps)
    pointers = (sum_ptr, out_ptr)
    strides = (sum_row, sum_head, out_row, out_head)
    copied = (rows_blocks * KEYS, first_block, num_blocks - first_block, x_head)
    written = (T, has_before)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, buffers, barriers, where, pointers, written, strides, scale, OF_QUERIES, HEADS, HAS_REST)),
            (_multiply, (1, buffers, barriers, where, pointers, written, strides, scale, OF_QUERIES, HEADS, HAS_REST)),
            (_copy, (descriptors, buffers, barriers, where, copied, OF_QUERIES, GROUP, HEADS, IS_BAND, HAS_REST)),
        ],
        [4, 1],
        [232, 40],
    )
    # fmt: on


def products(
    part: Part, x_TXD: Tensor, spans: Spans, sum_TSD: Tensor | None, out_TSD: Tensor, scale: float, *, of_queries: bool
) -> None:
    """As `attention_products.products`; rows of `x` begin at multiples of 16 bytes."""
    assert part.keys == KEYS
    length, num_sums, _ = out_TSD.shape
    num_heads = (out_TSD if of_queries else x_TXD).shape[1]
    total = out_TSD if sum_TSD is None else sum_TSD
    row_T = spans.first_T if of_queries else spans.reach_T
    half = KEYS // 2
    layout = gl.NVMMASharedLayout.get_default_for([half, _DEPTH], gl.bfloat16)
    ds_tiles = TensorDescriptor(part.ds, list(part.ds.shape), list(part.ds.stride()), [half, _DEPTH], layout)
    launch(
        _attention_products_kernel,
        (part.num_programs(num_sums, of_queries=of_queries), 1, 1),
        (row_T, total, out_TSD),
        part.sizes(num_heads, length),
        (x_TXD.stride(1), *total.stride()[:2], *out_TSD.stride()[:2], scale),
        {
            "OF_QUERIES": of_queries,
            "GROUP": num_heads // x_TXD.shape[1],
            "HEADS": num_heads // num_sums,
            "IS_BAND": part.is_band,
            "HAS_REST": has_rest(x_TXD.shape[2]),
            "STAGES": _STAGES[x_TXD.shape[2]],
        },
        descriptors=(ds_tiles, *split_head_tiles(x_TXD, _DEPTH)),
        num_warps=4,
        maxnreg=168,
    )
