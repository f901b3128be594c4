"""Attention's forward for Hopper (compute capability 9.0, 16 bits), in Gluon.

For heads of 64, 128 and 256, and of 192 over values of 128. The same equations as `attention_forward.py`, its tested
twin. One warp copies; two groups of four warps have 64 of a block's 128 queries each, and the sums of their output in
half of their registers. While one group computes exponentials, the other multiplies. (The division of work is
FlashAttention-3's, arXiv 2407.08608.)
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from expertune.kernels.attention import first_key
from expertune.kernels.attention_forward import LOWEST
from expertune.kernels.attention_hopper import (
    LOG2_E,
    copy_head,
    following,
    form_scores,
    has_rest,
    head_tiles,
    rests,
    ring,
    split_head_tiles,
)
from expertune.kernels.attention_order import in_order, own_block
from expertune.kernels.attention_spans import Spans
from expertune.kernels.hopper_multiply import sums_layout
from expertune.kernels.hopper_names import copy_tile
from expertune.kernels.hopper_store import places
from expertune.kernels.launch import launch

_QUERIES = 128  # of a block
# by the width of heads: keys of a tile, and slots for tiles of keys and of values, in turn; with a rest an even number
_CUTS = {64: (128, 5), 128: (128, 5), 192: (128, 4), 256: (64, 5)}


@gluon.jit
def copy_keys(descriptors, buffers, barriers, where, strides, GROUP: gl.constexpr, HAS_REST: gl.constexpr):
    """Of the copying warp: a tile of keys and one of values for each step."""
    k_desc, v_desc, rest_desc = descriptors
    slots, k_rests = buffers
    full, empty = barriers
    first, end, head = where
    k_head, v_head = strides
    SLOTS: gl.constexpr = slots.type.shape[0]
    KEYS: gl.constexpr = slots.type.shape[1]
    k_bytes: gl.constexpr = k_desc.block_type.nbytes + HAS_REST * rest_desc.block_type.nbytes
    slot = 0
    parity = 1
    for key in range(first, end, KEYS):
        for part in gl.static_range(2):
            bar, tile = full.index(slot), slots.index(slot)
            mbarrier.wait(empty.index(slot), parity)
            if part == 0:
                mbarrier.expect(bar, k_bytes)
                k_at = [key, head // GROUP * k_head]
                copy_head((k_desc, rest_desc), k_at, bar, tile, k_rests.index(slot // 2), HAS_REST)
            else:
                mbarrier.expect(bar, v_desc.block_type.nbytes)
                copy_tile(v_desc, [key, head // GROUP * v_head], bar, tile)
            slot, parity = following(slot, parity, SLOTS)


@gluon.jit
def after(first, end, STEP: gl.constexpr):
    """Where steps from `first` on come to, of which the last begins before `end`."""
    return first + gl.cdiv(end - first, STEP) * STEP


@gluon.jit
def skip_keys(key, end, slot, parity, barriers, SLOTS: gl.constexpr, KEYS: gl.constexpr):
    """What the other group alone attends to."""
    full, empty = barriers
    for _ in range(key, end, KEYS):
        for _part in gl.static_range(2):
            mbarrier.wait(full.index(slot), parity)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, SLOTS)


@gluon.jit
def own_part(first_ptr, num_heads, T, together, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    """A program's first query, where the keys of its block begin and end, and its head."""
    block, head = own_block(gl.cdiv(T, QUERIES), num_heads, together)
    query = block * QUERIES
    return query, first_key(first_ptr, block, QUERIES, KEYS), query + QUERIES, head


@gluon.jit
def reach_back(first_ptr, query, T, i, QUERIES: gl.constexpr):
    """How many keys before a query it attends to, and the first key that all of these queries may attend to."""
    back = query + i - gl.load(first_ptr + gl.minimum(query + i, T - 1))
    return back, gl.load(first_ptr + gl.minimum(query + QUERIES, T) - 1)


@gluon.jit
def is_seen(query, key, i, j, back):
    """Which keys of a tile queries attend to."""
    distance = gl.expand_dims(query - key + i, 1) - j
    return distance.to(gl.uint32, bitcast=True) <= gl.expand_dims(back, 1).to(gl.uint32, bitcast=True)


@gluon.jit
def _copy(descriptors, buffers, barriers, where, strides, GROUP: gl.constexpr, HAS_REST: gl.constexpr):
    """The copying warp: the block's queries, then tiles of keys and values."""
    q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc = descriptors
    q_buf, slots, q_rest, k_rests = buffers
    resident, full, empty = barriers
    query, first, end, head = where
    q_head, k_head, v_head = strides
    mbarrier.expect(resident, q_desc.block_type.nbytes + HAS_REST * q_rest_desc.block_type.nbytes)
    copy_head((q_desc, q_rest_desc), [query, head * q_head], resident, q_buf, q_rest.index(0), HAS_REST)
    tiles = (k_desc, v_desc, k_rest_desc)
    copy_keys(tiles, (slots, k_rests), (full, empty), (first, end, head), (k_head, v_head), GROUP, HAS_REST)


@gluon.jit
def _softmax(scores, highest, total, key, rows, scale):
    """Exponentials of a tile of scores, the highest score and the sum of all so far, and how sums before are scaled."""
    query, i, j, back, seen_by_all = rows
    KEYS: gl.constexpr = scores.type.shape[1]
    if (key + KEYS > query + 1) | (key < seen_by_all):
        scores = gl.where(is_seen(query, key, i, j, back), scores, float("-inf"))
    before = highest
    highest = gl.maximum(highest, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - gl.expand_dims(highest, 1))
    fading = gl.exp2(before - highest)
    return p, highest, total * fading + gl.sum(p, 1), fading


@gluon.jit
def _with_sink(highest, total, sinks_ptr, head, HAS_SINKS: gl.constexpr):
    """The logarithm of the sum of a query's exponentials, and by what its output is multiplied in the end."""
    fading = 1.0
    if HAS_SINKS:
        sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2_E
        before = highest
        highest = gl.maximum(highest, sink)
        fading = gl.exp2(before - highest)
        total = total * fading + gl.exp2(sink - highest)
    return (highest + gl.log2(total)) / LOG2_E, fading / total


@gluon.jit
def _multiply(
    ME: gl.constexpr, buffers, barriers, where, pointers, sizes, scale, HAS_REST: gl.constexpr, HAS_SINKS: gl.constexpr
):
    """One of the two groups that multiply: half of the block's queries.

    A tile's scores are formed beside the product of the tile before with its values, which is under way during the
    softmax.
    """
    q_buf, slots, q_rest, k_rests = buffers
    resident, full, empty = barriers
    query, first, end, head = where
    first_ptr, out_ptr, lse_ptr, sinks_ptr = pointers
    T, out_row, out_head, lse_head = sizes
    SLOTS: gl.constexpr = slots.type.shape[0]
    KEYS: gl.constexpr = slots.type.shape[1]
    WIDTH: gl.constexpr = slots.type.shape[2]
    QUERIES: gl.constexpr = q_buf.type.shape[0] // 2
    dtype: gl.constexpr = slots.dtype
    by_key: gl.constexpr = sums_layout(KEYS)
    by_width: gl.constexpr = sums_layout(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, by_width, 2)
    of_keys: gl.constexpr = gl.SliceLayout(1, by_key)
    of_width: gl.constexpr = gl.SliceLayout(1, by_width)
    query += ME * QUERIES
    q_buf = q_buf.slice(ME * QUERIES, QUERIES)
    if HAS_REST:
        q_rest = q_rest.index(0).slice(ME * QUERIES, QUERIES)
    i = gl.arange(0, QUERIES, layout=of_keys)
    back, seen_by_all = reach_back(first_ptr, query, T, i, QUERIES)
    j = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(0, by_key)), 0)
    rows = (query, i, j, back, seen_by_all)
    nothing = gl.zeros((QUERIES, KEYS), gl.float32, by_key)
    highest = gl.full((QUERIES,), LOWEST, gl.float32, of_keys)
    total = gl.zeros((QUERIES,), gl.float32, of_keys)
    out = gl.zeros((QUERIES, WIDTH), gl.float32, by_width)
    mbarrier.wait(resident, 0)
    mbarrier.wait(full.index(0), 0)
    scores = form_scores(q_buf, q_rest, slots.index(0), k_rests.index(0), nothing, HAS_REST)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    mbarrier.arrive(empty.index(0), count=1)
    p, highest, total, _fading = _softmax(scores, highest, total, first, rows, scale)
    p = gl.convert_layout(p.to(dtype), left)
    v_slot = 1  # of the tile before
    v_parity = 0
    for key in range(first + KEYS, query + QUERIES, KEYS):
        slot, parity = following(v_slot, v_parity, SLOTS)
        mbarrier.wait(full.index(slot), parity)
        scores = form_scores(q_buf, q_rest, slots.index(slot), k_rests.index(slot // 2), nothing, HAS_REST)
        mbarrier.wait(full.index(v_slot), v_parity)
        out = warpgroup_mma(p, slots.index(v_slot), out, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        mbarrier.arrive(empty.index(slot), count=1)
        exponentials, highest, total, fading = _softmax(scores, highest, total, key, rows, scale)
        out = warpgroup_mma_wait(num_outstanding=0, deps=(out,))
        mbarrier.arrive(empty.index(v_slot), count=1)
        out = out * gl.expand_dims(gl.convert_layout(fading, of_width), 1)
        p = gl.convert_layout(exponentials.to(dtype), left)
        v_slot, v_parity = following(slot, parity, SLOTS)
    mbarrier.wait(full.index(v_slot), v_parity)
    out = warpgroup_mma(p, slots.index(v_slot), out, is_async=True)
    out = warpgroup_mma_wait(num_outstanding=0, deps=(out,))
    mbarrier.arrive(empty.index(v_slot), count=1)
    slot, parity = following(v_slot, v_parity, SLOTS)
    skip_keys(after(first, query + QUERIES, KEYS), end, slot, parity, (full, empty), SLOTS, KEYS)
    lse, share = _with_sink(highest, total, sinks_ptr, head, HAS_SINKS)
    gl.store(lse_ptr + head * lse_head + query + i, lse, mask=query + i < T)
    out = out * gl.expand_dims(gl.convert_layout(share, of_width), 1)
    at, mask = places(query, T, 0, WIDTH, out_row, QUERIES, WIDTH, by_width)
    gl.store(out_ptr + head * out_head + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["num_heads", "T", "together"])
def _attention_forward_kernel(
    q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc,
    first_ptr, out_ptr, lse_ptr, sinks_ptr,
    num_heads, T, together,
    q_head, k_head, v_head, out_row, out_head, lse_head, scale,
    GROUP: gl.constexpr, HAS_REST: gl.constexpr, HAS_SINKS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One program a block of queries of a head."""
    where = own_part(first_ptr, num_heads, T, together, q_desc.block_type.shape[0], k_desc.block_type.shape[0])
    q_buf = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    slots, barriers = ring(k_desc, SLOTS)
    # with a rest of each tile of keys, which lie in every other slot
    q_rest, k_rests = rests(slots, q_rest_desc, 1, HAS_REST), rests(slots, k_rest_desc, SLOTS // 2, HAS_REST)
    descriptors = (q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc)
    buffers = (q_buf, slots, q_rest, k_rests)
    pointers = (first_ptr, out_ptr, lse_ptr, sinks_ptr)
    sizes = (T, out_row, out_head, lse_head)
    gl.warp_specialize(
        [
            (_multiply, (0, buffers, barriers, where, pointers, sizes, scale, HAS_REST, HAS_SINKS)),
            (_multiply, (1, buffers, barriers, where, pointers, sizes, scale, HAS_REST, HAS_SINKS)),
            (_copy, (descriptors, buffers, barriers, where, (q_head, k_head, v_head), GROUP, HAS_REST)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; what the launch has beyond them, the first group gets
    )


def forward(
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJV: Tensor,
    spans: Spans,
    out_THV: Tensor,
    lse_HT: Tensor,
    scale: float,
    sinks_H: Tensor | None = None,
) -> None:
    """As `attention_forward.forward`; rows of what attends begin at multiples of 16 bytes, in any of these widths."""
    (_, num_heads, width), num_shared = q_THD.shape, k_TJD.shape[1]
    keys, num_slots = _CUTS[width]
    grid, sizes = in_order(q_THD, num_shared, _QUERIES)
    (q, q_rest), (k, k_rest) = split_head_tiles(q_THD, _QUERIES), split_head_tiles(k_TJD, keys)
    launch(
        _attention_forward_kernel,
        grid,
        (spans.first_T, out_THV, lse_HT, lse_HT if sinks_H is None else sinks_H),
        sizes,
        (
            *[x.stride(1) for x in (q_THD, k_TJD, v_TJV)],
            *out_THV.stride()[:2],
            lse_HT.stride(0),
            scale * LOG2_E.value,
        ),
        {
            "GROUP": num_heads // num_shared,
            "HAS_REST": has_rest(width),
            "HAS_SINKS": sinks_H is not None,
            "SLOTS": num_slots,
        },
        descriptors=(q, k, head_tiles(v_TJV, keys), q_rest, k_rest),
        num_warps=4,
        maxnreg=168,
    )
