"""The gradient of queries for Hopper (compute capability 9.0, 16 bits, heads of 64 and 128), in Gluon: scores again.

`attention_queries.py` is its tested twin. The work is divided as in `attention_forward_hopper.py`: one warp copies, two
groups of four warps have 64 of a block's 128 queries each.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from expertune.kernels.attention import Heads
from expertune.kernels.attention_forward_hopper import (
    after,
    copy_keys,
    is_seen,
    own_part,
    reach_back,
    skip_keys,
)
from expertune.kernels.attention_hopper import LOG2_E, following, head_tiles, ring
from expertune.kernels.attention_order import in_order
from expertune.kernels.attention_spans import Spans
from expertune.kernels.hopper_multiply import sums_layout
from expertune.kernels.hopper_names import copy_tile
from expertune.kernels.hopper_store import places
from expertune.kernels.launch import launch

_QUERIES = 128  # of a block
_KEYS = 64  # of a tile
_SLOTS = 6  # for tiles of keys and of values, in turn


@gluon.jit
def _copy(descriptors, buffers, barriers, where, strides, GROUP: gl.constexpr):
    """The copying warp: the block's queries and gradients, then tiles of keys and values."""
    q_desc, dout_desc, k_desc, v_desc = descriptors
    q_buf, dout_buf, slots = buffers
    resident, full, empty = barriers
    query, first, end, head = where
    q_head, dout_head, k_head, v_head = strides
    mbarrier.expect(resident, q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
    copy_tile(q_desc, [query, head * q_head], resident, q_buf)
    copy_tile(dout_desc, [query, head * dout_head], resident, dout_buf)
    tiles = (k_desc, v_desc, k_desc)
    copy_keys(tiles, (slots, slots), (full, empty), (first, end, head), (k_head, v_head), GROUP, False)


@gluon.jit
def _multiply(ME: gl.constexpr, buffers, barriers, where, pointers, sizes, scale):
    """One of the two groups that multiply: half of the block's queries."""
    q_buf, dout_buf, slots = buffers
    resident, full, empty = barriers
    query, first, end, head = where
    first_ptr, lse_ptr, delta_ptr, dq_ptr = pointers
    T, dq_row, dq_head, lse_head, delta_head = sizes
    SLOTS: gl.constexpr = slots.type.shape[0]
    KEYS: gl.constexpr = slots.type.shape[1]
    WIDTH: gl.constexpr = slots.type.shape[2]
    QUERIES: gl.constexpr = q_buf.type.shape[0] // 2
    dtype: gl.constexpr = slots.dtype
    by_key: gl.constexpr = sums_layout(KEYS)
    by_width: gl.constexpr = sums_layout(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, by_width, 2)
    query += ME * QUERIES
    q_buf = q_buf.slice(ME * QUERIES, QUERIES)
    dout_buf = dout_buf.slice(ME * QUERIES, QUERIES)
    i = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, by_key))
    j = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(0, by_key)), 0)
    back, seen_by_all = reach_back(first_ptr, query, T, i, QUERIES)
    mask = query + i < T
    lse = gl.load(lse_ptr + head * lse_head + query + i, mask=mask, other=0.0) * LOG2_E
    delta = gl.load(delta_ptr + head * delta_head + query + i, mask=mask, other=0.0)
    nothing = gl.zeros((QUERIES, KEYS), gl.float32, by_key)
    dq = warpgroup_mma_init(gl.zeros((QUERIES, WIDTH), gl.float32, by_width))
    mbarrier.wait(resident, 0)
    slot = 0
    parity = 0
    for key in range(first, query + QUERIES, KEYS):
        mbarrier.wait(full.index(slot), parity)
        keys, k_slot = slots.index(slot), slot
        scores = warpgroup_mma(q_buf, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
        slot, parity = following(slot, parity, SLOTS)
        mbarrier.wait(full.index(slot), parity)
        dp = warpgroup_mma(dout_buf, slots.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        p = gl.exp2(scores * (scale * LOG2_E) - gl.expand_dims(lse, 1))
        if (key + KEYS > query + 1) | (key < seen_by_all):
            p = gl.where(is_seen(query, key, i, j, back), p, 0.0)
        dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, parity = following(slot, parity, SLOTS)
        dscores = (p * (dp - gl.expand_dims(delta, 1))).to(dtype)
        dq = warpgroup_mma(gl.convert_layout(dscores, left), keys, dq, is_async=True)
        dq = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=(dq,)))
        mbarrier.arrive(empty.index(k_slot), count=1)
    skip_keys(after(first, query + QUERIES, KEYS), end, slot, parity, (full, empty), SLOTS, KEYS)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,)) * scale
    at, mask = places(query, T, 0, WIDTH, dq_row, QUERIES, WIDTH, by_width)
    gl.store(dq_ptr + head * dq_head + at, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["num_heads", "T", "together"])
def _attention_queries_kernel(
    q_desc, dout_desc, k_desc, v_desc,
    first_ptr, lse_ptr, delta_ptr, dq_ptr,
    num_heads, T, together,
    q_head, dout_head, k_head, v_head, dq_row, dq_head, lse_head, delta_head, scale,
    GROUP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One program a block of queries of a head."""
    where = own_part(first_ptr, num_heads, T, together, q_desc.block_type.shape[0], k_desc.block_type.shape[0])
    q_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    dout_buf = gl.allocate_shared_memory(dout_desc.dtype, dout_desc.block_type.shape, dout_desc.layout)
    slots, barriers = ring(k_desc, SLOTS)
    descriptors = (q_desc, dout_desc, k_desc, v_desc)
    buffers = (q_buf, dout_buf, slots)
    pointers = (first_ptr, lse_ptr, delta_ptr, dq_ptr)
    sizes = (T, dq_row, dq_head, lse_head, delta_head)
    gl.warp_specialize(
        [
            (_multiply, (0, buffers, barriers, where, pointers, sizes, scale)),
            (_multiply, (1, buffers, barriers, where, pointers, sizes, scale)),
            (_copy, (descriptors, buffers, barriers, where, (q_head, dout_head, k_head, v_head), GROUP)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; what the launch has beyond them, the first group gets
    )


def queries(heads: Heads, spans: Spans, dq_THD: Tensor, scale: float) -> None:
    """As `attention_queries.queries`; rows of what attended begin at multiples of 16 bytes."""
    (_, num_heads, _), num_shared = dq_THD.shape, heads.k_TJD.shape[1]
    grid, sizes = in_order(dq_THD, num_shared, _QUERIES)
    operands = (heads.q_THD, heads.dout_THV, heads.k_TJD, heads.v_TJV)
    tiles = [head_tiles(x, rows) for x, rows in zip(operands, (_QUERIES, _QUERIES, _KEYS, _KEYS), strict=True)]
    launch(
        _attention_queries_kernel,
        grid,
        (spans.first_T, heads.lse_HT, heads.delta_HT, dq_THD),
        sizes,
        (
            *[x.stride(1) for x in operands],
            *dq_THD.stride()[:2],
            heads.lse_HT.stride(0),
            heads.delta_HT.stride(0),
            scale,
        ),
        {"GROUP": num_heads // num_shared, "SLOTS": _SLOTS},
        descriptors=tuple(tiles),
        num_warps=4,
        maxnreg=168,
    )
