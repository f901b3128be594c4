"""The products of the Hopper linear: how tiles are dealt out, copied to shared memory and multiplied.

One warp copies tiles with the tensor memory accelerator; two groups of four warps multiply, in one of two schedules
(named as in CUTLASS):

- ping-pong: each has its own tile of 128 columns, in turns, so that one stores its tile while the other multiplies;
- cooperative: each takes half the rows of a tile of 256 columns, for which a quarter less is read from L2: faster where
  an expert has so many rows that they do not stay there and the card's memory is slow beside its matrix unit.

LoRA is one more step of the copying warp, from the descriptors of `mid` and `B`: no copies, weights untouched, almost
no time. A step that reaches beyond a width reads zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from expertune.kernels.hopper_names import copy_tile


@gluon.constexpr_function
def sums_layout(columns):
    """Of a tile so many columns wide as four warps hold the sums of its products."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _num_column_tiles(O, IS_SPLIT: gl.constexpr, COLUMNS: gl.constexpr):  # noqa: E741
    if IS_SPLIT:
        return gl.cdiv(O // 2, COLUMNS // 2)
    return gl.cdiv(O, COLUMNS)


@gluon.jit
def locate(item, num_columns, tiles, ROWS: gl.constexpr, GROUP: gl.constexpr):
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
def _copy_weights(
    desc,
    expert,
    first,
    column,
    I,  # noqa: E741
    O,  # noqa: E741
    bar,
    w_buf,
    IS_K_CONTIGUOUS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
):
    """One step of an expert's weights, or of its `B`, from row `first` and some column on."""
    if IS_SPLIT:
        HALF: gl.constexpr = w_buf.type.shape[0] // 2
        copy_tile(desc, [expert * O + column, first], bar, w_buf.slice(0, HALF))
        up = expert * O + O // 2 + column
        copy_tile(desc, [up, first], bar, w_buf.slice(HALF, HALF))
    elif IS_K_CONTIGUOUS:
        copy_tile(desc, [expert * O + column, first], bar, w_buf)
    else:
        copy_tile(desc, [expert * I + first, column], bar, w_buf)


@gluon.jit
def copy(
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
    NUM_COPIES: gl.constexpr = 2 if IS_SPLIT else 1
    num_base = gl.cdiv(I, DEPTH)
    num_steps = num_base + gl.cdiv(R, DEPTH)
    num_columns = _num_column_tiles(O, IS_SPLIT, COLUMNS)
    step = 0
    for item in range(gl.program_id(0), gl.load(num_tiles_ptr) * num_columns, gl.num_programs(0)):
        expert, row, _end, item_column = locate(item, num_columns, tiles, ROWS, GROUP)
        column = item_column * (COLUMNS // NUM_COPIES)
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar, x_buf, w_buf = ready.index(stage), x_bufs.index(stage), w_bufs.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + NUM_COPIES * w_desc.block_type.nbytes)
            if k < num_base:
                first = k * DEPTH
                copy_tile(x_desc, [row, first], bar, x_buf)
                _copy_weights(w_desc, expert, first, column, I, O, bar, w_buf, IS_K_CONTIGUOUS, IS_SPLIT)
            else:
                first = (k - num_base) * DEPTH
                copy_tile(mid_desc, [row, first], bar, x_buf)
                _copy_weights(b_desc, expert, first, column, R, O, bar, w_buf, IS_K_CONTIGUOUS, IS_SPLIT)
            step += 1


@gluon.jit
def multiply(
    ME: gl.constexpr,
    work,
    STORE: gl.constexpr,
    IS_K_CONTIGUOUS: gl.constexpr,
    IS_COOPERATIVE: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATE: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """One of the two groups that multiply: its half of every item, or all of every second.

    In ping-pong its turn comes when the other has one step yet to issue: the matrix unit waits for no tile's beginning.
    What becomes of the sums is up to `STORE`, which is given them, where they belong, and that they are the `nth` item.
    It comes from the launch like the gate: Gluon hands functions on to other warps as constants only, not in tuples.
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
    layout: gl.constexpr = sums_layout(COLUMNS)
    num_steps = gl.cdiv(I, DEPTH) + gl.cdiv(R, DEPTH)
    num_columns = _num_column_tiles(O, IS_SPLIT, COLUMNS)
    total = gl.load(num_tiles_ptr) * num_columns
    turns = 0
    step = FIRST_ITEM * num_steps
    for item in range(gl.program_id(0) + FIRST_ITEM * gl.num_programs(0), total, NUM_TURNS * gl.num_programs(0)):
        expert, row, end, item_column = locate(item, num_columns, tiles, x_bufs.type.shape[1], GROUP)
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
        nth = NUM_TURNS * turns + FIRST_ITEM
        STORE(acc, outputs, expert, row, end, item_column, nth, O, HAS_BIAS, IS_SPLIT, GATE, ALPHA, LIMIT)
        step += (NUM_TURNS - 1) * num_steps
        turns += 1


@gluon.jit
def allocate(
    x_desc,
    w_desc,
    IS_K_CONTIGUOUS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    IS_COOPERATIVE: gl.constexpr,
):
    """The pipeline's buffers and barriers, in shared memory."""
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
    return (x_bufs, w_bufs), (ready, empty, turn)
