"""Attention's backward by blocks of keys for Hopper (compute capability 9.0, 16 bits), in Gluon.

For heads of 64, 128 and 256, and of 192 over values of 128 (latent attention). The same equations as `attention.py`,
its tested twin: of wide heads the first round, which sums `dV` and writes the gradient of scores; of narrow ones all
that keys and values get. One warp copies; two groups of four warps have 64 of a block's 128 keys each, and the sums in
half of their registers. Scores lie transposed, by key and query: so probabilities are the left operand of `dV`'s
product as they are, and the gradient of scores that of `dK`'s, without a way through shared memory. While one group
computes exponentials, the other multiplies. (The transposed scores are FlashAttention-3's, arXiv 2407.08608.)

A tile is a power of two wide, so of heads of 192 it has two parts: 128 elements, and a rest of 64.
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

from expertune.kernels.attention import Grads, Heads, Part, last_query, place
from expertune.kernels.attention_spans import Spans
from expertune.kernels.hopper_multiply import sums_layout
from expertune.kernels.hopper_names import copy_tile
from expertune.kernels.hopper_store import places
from expertune.kernels.launch import are_aligned, launch

KEYS = 128  # of a block
NARROW, WIDE = (64, 128), (192, 256)  # heads: of narrow ones, registers hold the sums of `dK` beside those of `dV`
_QUERIES = 64  # of a tile
_SPLIT, _FIRST = 192, 128  # a width that is no power of two, as tiles are, and the part that is
_SLOTS = {64: 8, 128: 6, 192: 6, 256: 3}  # for tiles of queries and of gradients, in turn
LOG2_E = gl.constexpr(1.4426950408889634)  # exponentials are powers of two


@gluon.jit
def following(slot, parity, SLOTS: gl.constexpr):
    """The slot whose turn comes next, and the parity of its barriers."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        parity ^= 1
    return slot, parity


@gluon.jit
def ring(desc, SLOTS: gl.constexpr):
    """Slots for tiles, and barriers: of what stays for a whole program, of full slots, of those both groups left."""
    slots = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    resident = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(resident, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    return slots, (resident, full, empty)


@gluon.jit
def rests(slots, desc, number: gl.constexpr, HAS_REST: gl.constexpr):
    """Slots for the rests of tiles; where there are none, `slots`, which are not read as such."""
    if HAS_REST:  # noqa: SIM108
        found = gl.allocate_shared_memory(desc.dtype, [number] + desc.block_type.shape, desc.layout)
    else:
        found = slots
    return found


@gluon.jit
def copy_head(descs, at, bar, tile, rest, HAS_REST: gl.constexpr):
    """The copy of a tile of a head, and of its rest."""
    desc, rest_desc = descs
    copy_tile(desc, at, bar, tile)
    if HAS_REST:
        copy_tile(rest_desc, at, bar, rest)


@gluon.jit
def form_scores(left, left_rest, right, right_rest, nothing, HAS_REST: gl.constexpr):
    """Begin the products of two tiles of heads, row by row."""
    scores = warpgroup_mma(left, right.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if HAS_REST:
        scores = warpgroup_mma(left_rest, right_rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _copy(
    descriptors, buffers, barriers, where, end, strides, GROUP: gl.constexpr, HEADS: gl.constexpr,
    HAS_REST: gl.constexpr,
):  # fmt: skip
    """The copying warp: the block's keys and values, then a tile of queries and one of gradients for each step."""
    q_desc, k_desc, v_desc, dout_desc, q_rest_desc, k_rest_desc, lse_desc, delta_desc, reach_desc = descriptors
    k_buf, v_buf, slots, k_rest, q_rests, rows, reaches = buffers
    resident, full, empty = barriers
    key, first, first_head = where
    q_head, k_head, v_head, dout_head = strides
    SLOTS: gl.constexpr = slots.type.shape[0]
    QUERIES: gl.constexpr = slots.type.shape[1]
    TURNS: gl.constexpr = rows.type.shape[0] // 2
    k_bytes: gl.constexpr = k_desc.block_type.nbytes + HAS_REST * k_rest_desc.block_type.nbytes
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + HAS_REST * q_rest_desc.block_type.nbytes
    mbarrier.expect(resident, k_bytes + v_desc.block_type.nbytes + reach_desc.block_type.nbytes)
    copy_tile(reach_desc, [0, key], resident, reaches)
    k_at = [key, first_head // GROUP * k_head]
    copy_head((k_desc, k_rest_desc), k_at, resident, k_buf, k_rest.index(0), HAS_REST)
    copy_tile(v_desc, [key, first_head // GROUP * v_head], resident, v_buf)
    slot = 0
    parity = 1
    turn = 0
    for head in range(first_head, first_head + HEADS):
        for query in range(first, end, QUERIES):
            for part in gl.static_range(2):
                bar, tile, row = full.index(slot), slots.index(slot), rows.index(2 * turn + part)
                mbarrier.wait(empty.index(slot), parity)
                if part == 0:
                    mbarrier.expect(bar, q_bytes + lse_desc.block_type.nbytes)
                    copy_tile(lse_desc, [head, query], bar, row)
                    q_at = [query, head * q_head]
                    copy_head((q_desc, q_rest_desc), q_at, bar, tile, q_rests.index(turn), HAS_REST)
                else:
                    mbarrier.expect(bar, dout_desc.block_type.nbytes + delta_desc.block_type.nbytes)
                    copy_tile(delta_desc, [head, query], bar, row)
                    copy_tile(dout_desc, [query, head * dout_head], bar, tile)
                slot, parity = following(slot, parity, SLOTS)
            turn = (turn + 1) % TURNS


@gluon.jit
def _store(dscores, ds_ptr, at):
    """Write a tile of `dS`, 16 bytes a thread.

    Two exchanges between lanes, of one bit of their number each, because those Triton does in registers. For more at
    once it would go through shared memory, of which nothing is left.
    """
    SHAPE: gl.constexpr = dscores.type.shape
    row_lanes: gl.constexpr = [[1, 0], [2, 0], [4, 0]]
    warps: gl.constexpr = [[16, 0], [32, 0]]
    half_way: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]], [[0, 8], [0, 4]] + row_lanes, warps, [], SHAPE
    )
    stored: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]], [[0, 8], [0, 16]] + row_lanes, warps, [], SHAPE
    )
    row, pitch, column = at
    i = row + gl.arange(0, SHAPE[0], layout=gl.SliceLayout(1, stored))
    j = column + gl.arange(0, SHAPE[1], layout=gl.SliceLayout(0, stored))
    pointers = ds_ptr + (gl.expand_dims(i.to(gl.int64) * pitch, 1) + gl.expand_dims(j, 0))
    gl.store(pointers, gl.convert_layout(gl.convert_layout(dscores, half_way), stored))


@gluon.jit
def write(total, row, head, T, has_before, pointers, strides):
    """Some rows of a head, with what earlier parts summed."""
    sum_ptr, out_ptr = pointers
    sum_row, sum_head, out_row, out_head = strides
    ROWS: gl.constexpr = total.type.shape[0]
    COLUMNS: gl.constexpr = total.type.shape[1]
    layout: gl.constexpr = total.type.layout
    at, mask = places(row, T, 0, COLUMNS, out_row, ROWS, COLUMNS, layout)
    if has_before:
        sum_at, _mask = places(row, T, 0, COLUMNS, sum_row, ROWS, COLUMNS, layout)
        total += gl.load(sum_ptr + head * sum_head + sum_at, mask=mask, other=0.0)
    gl.store(out_ptr + head * out_head + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    ME: gl.constexpr, reach, buffers, barriers, where, pointers, sizes, strides, scale, HEADS: gl.constexpr,
    SUMS_KEYS: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply: half of the block's keys. With `SUMS_KEYS` as in `attention.py`."""
    k_buf, v_buf, slots, k_rest, q_rests, rows, reaches = buffers
    resident, full, empty = barriers
    key, first, head = where
    ds_ptr, sum_ptr, dv_ptr, dk_ptr = pointers
    end, T, pitch, ds_head, ds_row, ds_shift, has_before = sizes
    SLOTS: gl.constexpr = slots.type.shape[0]
    QUERIES: gl.constexpr = slots.type.shape[1]
    WIDTH: gl.constexpr = slots.type.shape[2]
    KEYS: gl.constexpr = k_buf.type.shape[0] // 2
    TURNS: gl.constexpr = rows.type.shape[0] // 2
    dtype: gl.constexpr = slots.dtype
    by_query: gl.constexpr = sums_layout(QUERIES)
    by_width: gl.constexpr = sums_layout(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, by_width, 2)
    key += ME * KEYS
    ds_row += ME * KEYS
    ds_column = key + ds_shift
    k_buf = k_buf.slice(ME * KEYS, KEYS)
    v_buf = v_buf.slice(ME * KEYS, KEYS)
    if HAS_REST:
        k_rest = k_rest.index(0).slice(ME * KEYS, KEYS)
    reaches = reaches.slice(ME * KEYS, KEYS, 1).permute((1, 0))
    i = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, by_query)), 1)
    j = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, by_query)), 0)
    nothing = gl.zeros((KEYS, QUERIES), gl.float32, by_query)
    dv = warpgroup_mma_init(gl.zeros((KEYS, WIDTH), gl.float32, by_width))
    if SUMS_KEYS:
        dk = warpgroup_mma_init(gl.zeros((KEYS, WIDTH), gl.float32, by_width))
    reached_by_all = reach - QUERIES  # tiles that begin no further behind the first key, the diagonal aside, are whole
    mbarrier.wait(resident, 0)
    slot = 0
    parity = 0
    turn = 0
    for _head in range(HEADS):
        for behind in range(first - key, end - key, QUERIES):  # of a tile's first query to the first key
            mbarrier.wait(full.index(slot), parity)
            q = slots.index(slot)
            scores = form_scores(k_buf, k_rest, q, q_rests.index(turn), nothing, HAS_REST)
            q_slot = slot
            slot, parity = following(slot, parity, SLOTS)
            mbarrier.wait(full.index(slot), parity)
            dout = slots.index(slot)
            dp = warpgroup_mma(v_buf, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
            if not SUMS_KEYS:
                mbarrier.arrive(empty.index(q_slot), count=1)
            p = gl.exp2(scores * (scale * LOG2_E) - rows.index(2 * turn).load(by_query) * LOG2_E)
            if (behind < KEYS) | (behind > reached_by_all):
                distance = (behind + j - i).to(gl.uint32, bitcast=True)  # large for a query before the key
                p = gl.where(distance < reaches.load(by_query).to(gl.uint32, bitcast=True), p, 0.0)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))
            dscores = (p * (dp - rows.index(2 * turn + 1).load(by_query))).to(dtype)
            if SUMS_KEYS:
                dk = warpgroup_mma(gl.convert_layout(dscores, left), q, dk, is_async=True)
                dv, dk = warpgroup_mma_wait(num_outstanding=0, deps=(dv, dk))
                dk = warpgroup_mma_init(dk)
                dv = warpgroup_mma_init(dv)
                mbarrier.arrive(empty.index(q_slot), count=1)
            else:
                _store(dscores, ds_ptr, (ds_row, pitch, behind + ds_column))
                dv = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=(dv,)))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, SLOTS)
            turn = (turn + 1) % TURNS
        ds_ptr += ds_head
    dv = warpgroup_mma_wait(num_outstanding=0, deps=(dv,))
    write(dv, key, head // HEADS, T, has_before, (sum_ptr, dv_ptr), strides)
    if SUMS_KEYS:
        dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk,)) * scale
        write(dk, key, head // HEADS, T, has_before, (dk_ptr, dk_ptr), strides)


@gluon.jit(
    do_not_specialize=["first_block", "end", "_key_blocks", "num_heads", "T", "pitch_blocks", "rows_blocks", "adds"]
)
def _attention_keys_kernel(
    q_desc, k_desc, v_desc, dout_desc, q_rest_desc, k_rest_desc, lse_desc, delta_desc, reach_desc,
    reach_ptr, ds_ptr, sum_ptr, dv_ptr, dk_ptr,
    first_block, end, _key_blocks, num_heads, T, pitch_blocks, rows_blocks, adds,
    q_head, k_head, v_head, dout_head, sum_row, sum_head, out_row, out_head, scale,
    GROUP: gl.constexpr, HEADS: gl.constexpr, IS_BAND: gl.constexpr, SUMS_KEYS: gl.constexpr, HAS_REST: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """One program a block of keys of `HEADS` heads; those of whole samples with most queries first."""
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    num_sums = num_heads // HEADS
    block, head = gl.program_id(0) // num_sums, gl.program_id(0) % num_sums * HEADS
    first = gl.maximum(block, first_block) * KEYS
    ds_row, ds_shift = place(block, first_block, gl.cdiv(end, KEYS) - first_block, IS_BAND, KEYS)
    end = last_query(reach_ptr, block, end, T, KEYS)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, v_desc.block_type.shape, v_desc.layout)
    # of steps, each with a row of both: a slot of queries may be let go, and copied to, before their rows are read
    turns: gl.constexpr = SLOTS // 2 + 1
    rows = gl.allocate_shared_memory(gl.float32, [2 * turns] + lse_desc.block_type.shape, lse_desc.layout)
    reaches = gl.allocate_shared_memory(gl.int32, reach_desc.block_type.shape, reach_desc.layout)
    slots, barriers = ring(q_desc, SLOTS)
    k_rest, q_rests = rests(slots, k_rest_desc, 1, HAS_REST), rests(slots, q_rest_desc, turns, HAS_REST)
    descriptors = (q_desc, k_desc, v_desc, dout_desc, q_rest_desc, k_rest_desc, lse_desc, delta_desc, reach_desc)
    buffers = (k_buf, v_buf, slots, k_rest, q_rests, rows, reaches)
    where = (block * KEYS, first, head)
    pitch = pitch_blocks * KEYS
    ds_head = (rows_blocks * KEYS).to(gl.int64) * pitch
    pointers = (ds_ptr + head * ds_head, sum_ptr, dv_ptr, dk_ptr)
    sizes = (end, T, pitch, ds_head, ds_row, ds_shift, (block < first_block) | (adds > 0))
    strides = (sum_row, sum_head, out_row, out_head)
    # of each group's first key, which is the first to end
    reach_0 = gl.load(reach_ptr + block * KEYS)
    reach_1 = gl.load(reach_ptr + gl.minimum(block * KEYS + KEYS // 2, T - 1))
    copied = (q_head, k_head, v_head, dout_head)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, reach_0, buffers, barriers, where, pointers, sizes, strides, scale, HEADS, SUMS_KEYS,
                         HAS_REST)),
            (_multiply, (1, reach_1, buffers, barriers, where, pointers, sizes, strides, scale, HEADS, SUMS_KEYS,
                         HAS_REST)),
            (_copy, (descriptors, buffers, barriers, where, end, copied, GROUP, HEADS, HAS_REST)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; what the launch has beyond them, the first group gets
    )
    # fmt: on


def readable(x_BTHD: Tensor) -> Tensor:
    """As `head_tiles` wants it: rows that begin at multiples of 16 bytes, heads within 2³¹ of one."""
    strides = [stride * x_BTHD.element_size() for stride in x_BTHD.stride()[:-1]]
    is_aligned = x_BTHD.stride(-1) == 1 and are_aligned([x_BTHD.data_ptr(), *strides])
    return x_BTHD if is_aligned and x_BTHD.stride(2) * x_BTHD.shape[2] < 2**31 else x_BTHD.contiguous()


def head_tiles(x_THD: Tensor, rows: int) -> TensorDescriptor:
    """Of a sample's heads, tiles of some rows of one, which is found by its column; what is beyond the rows is zero.

    Heads may lie in any way: the hardware does not ask whether rows overlap.
    """
    length, num_heads, width = x_THD.shape
    row, head, _ = x_THD.stride()
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)
    return TensorDescriptor(x_THD, [length, (num_heads - 1) * head + width], [row, 1], [rows, width], layout)


def has_rest(width: int) -> bool:
    """Whether tiles of heads of that width have a second part."""
    return width == _SPLIT


def split_head_tiles(x_THD: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of the first 128 elements of heads of 192, and of the rest; of heads of other widths twice the same, of all."""
    if not has_rest(x_THD.shape[-1]):
        return (head_tiles(x_THD, rows),) * 2
    return head_tiles(x_THD[..., :_FIRST], rows), head_tiles(x_THD[..., _FIRST:], rows)


def _row_tiles(x_HT: Tensor, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x_HT, list(x_HT.shape), list(x_HT.stride()), [1, columns], layout)


def values(part: Part, heads: Heads, spans: Spans, sums: Grads | None, grads: Grads, scale: float) -> None:
    """As `attention.values`; rows of what attended begin at multiples of 16 bytes, heads are `WIDE`."""
    assert part.keys == KEYS and heads.q_THD.shape[-1] in WIDE
    _walk(part, heads, spans, (grads if sums is None else sums).dv, grads, scale)


def keys_and_values(heads: Heads, spans: Spans, grads: Grads, scale: float) -> None:
    """As `attention.keys_and_values`; rows of what attended begin at multiples of 16 bytes, heads are `NARROW`."""
    assert heads.q_THD.shape[-1] in NARROW
    _walk(Part.whole(heads, KEYS), heads, spans, grads.dv, grads, scale)


def _walk(part: Part, heads: Heads, spans: Spans, dv_sum: Tensor, grads: Grads, scale: float) -> None:
    length, num_heads, width = heads.q_THD.shape
    operands = (heads.q_THD, heads.k_TJD, heads.v_TJV, heads.dout_THV)
    (q, q_rest), (k, k_rest) = split_head_tiles(heads.q_THD, _QUERIES), split_head_tiles(heads.k_TJD, KEYS)
    tiles = (q, k, head_tiles(heads.v_TJV, KEYS), head_tiles(heads.dout_THV, _QUERIES), q_rest, k_rest)
    delta, reach = heads.delta_HT, spans.reach_T
    of_rows = [(heads.lse_HT, _QUERIES), (delta, _QUERIES), (reach.as_strided((1, length), delta.stride()), KEYS)]
    num_sums = grads.dv.shape[1]
    launch(
        _attention_keys_kernel,
        (part.num_programs(num_sums, of_queries=False), 1, 1),
        (reach, part.ds, dv_sum, grads.dv, grads.dk),
        part.sizes(num_heads, length),
        (*[x.stride(1) for x in operands], *dv_sum.stride()[:2], *grads.dv.stride()[:2], scale),
        {
            "GROUP": num_heads // heads.k_TJD.shape[1],
            "HEADS": num_heads // num_sums,
            "IS_BAND": part.is_band,
            "SUMS_KEYS": width in NARROW,
            "HAS_REST": has_rest(width),
            "SLOTS": _SLOTS[width],
        },
        descriptors=(*tiles, *[_row_tiles(x, columns) for x, columns in of_rows]),
        num_warps=4,
        maxnreg=168,
    )
