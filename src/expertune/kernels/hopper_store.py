"""What the Hopper linear does with a tile of sums, which lies in registers as the matrix unit left it.

Either the group that multiplied it adds the bias, applies the gate and writes it, while the other group multiplies. Or
it leaves it in shared memory to eight more warps, which compute the gate's backward: some 40 instructions a number,
with which four warps, that nobody relieves when they wait, would not be done while the other group multiplies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from expertune.kernels.hopper_multiply import locate
from expertune.kernels.hopper_names import as_matrix


@gluon.jit
def _halves(tile):
    """Its left and right columns."""
    ROWS: gl.constexpr = tile.type.shape[0]
    HALF: gl.constexpr = tile.type.shape[1] // 2
    return tile.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()


@gluon.jit
def places(first_row, end, column, width, stride, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Where some rows and columns of a matrix lie, and which are before the end of the rows and the width."""
    i = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    j = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(i.to(gl.int64) * stride, 1) + gl.expand_dims(j, 0)
    return at, gl.expand_dims(i < end, 1) & gl.expand_dims(j < width, 0)


@gluon.jit
def _store_half(half, y_ptr, row, end, column, width, stride):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at, mask = places(row, end, column, width, stride, half.type.shape[0], half.type.shape[1], layout)
    gl.store(y_ptr + at, gl.convert_layout(half, layout), mask=mask)


@gluon.jit
def store_gated(
    acc,
    outputs,
    expert,
    row,
    end,
    item_column,
    _nth,
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
    left, right = _halves(y)
    _store_half(left, y_ptr, row, end, first, width, O)
    _store_half(right, y_ptr, row, end, second, O, O)
    if GATE is not None:
        if not IS_SPLIT:
            left, right = y.reshape([ROWS, HALF, 2]).split()
        a = GATE(left.to(gl.float32), right.to(gl.float32), ALPHA, LIMIT).to(y_ptr.dtype.element_ty)
        _store_half(a, a_ptr, row, end, item_column * HALF, O // 2, O // 2)


@gluon.jit
def _load_gate_up(
    h_ptr,
    first_row,
    end,
    column,
    F,
    IS_CONCATENATED: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    layout: gl.constexpr,
):
    """Both parts of some rows and columns of `h`."""
    if IS_CONCATENATED:
        at, mask = places(first_row, end, column, F, 2 * F, ROWS, COLUMNS, layout)
        g, u = gl.load(h_ptr + at, mask=mask, other=0.0), gl.load(h_ptr + F + at, mask=mask, other=0.0)
    else:
        pairs: gl.constexpr = gl.BlockedLayout([1, 8], layout.threads_per_warp, layout.warps_per_cta, [1, 0])
        at, mask = places(first_row, end, 2 * column, 2 * F, 2 * F, ROWS, 2 * COLUMNS, pairs)
        g, u = gl.load(h_ptr + at, mask=mask, other=0.0).reshape([ROWS, COLUMNS, 2]).split()
        g, u = gl.convert_layout(g, layout), gl.convert_layout(u, layout)
    return g, u


@gluon.jit
def _store_gate_up(dh_ptr, dg, du, first_row, end, column, F, IS_CONCATENATED: gl.constexpr):
    """Write them as `_load_gate_up` reads them."""
    ROWS: gl.constexpr = dg.type.shape[0]
    COLUMNS: gl.constexpr = dg.type.shape[1]
    layout: gl.constexpr = dg.type.layout
    if IS_CONCATENATED:
        at, mask = places(first_row, end, column, F, 2 * F, ROWS, COLUMNS, layout)
        gl.store(dh_ptr + at, dg, mask=mask)
        gl.store(dh_ptr + F + at, du, mask=mask)
    else:
        pairs: gl.constexpr = gl.BlockedLayout([1, 8], layout.threads_per_warp, layout.warps_per_cta, [1, 0])
        at, mask = places(first_row, end, 2 * column, 2 * F, 2 * F, ROWS, 2 * COLUMNS, pairs)
        gl.store(dh_ptr + at, gl.convert_layout(gl.join(dg, du).reshape([ROWS, 2 * COLUMNS]), pairs), mask=mask)


@gluon.jit
def hand_over(
    acc,
    outputs,
    _expert,
    _row,
    _end,
    _item_column,
    nth,
    _O,
    _HAS_BIAS: gl.constexpr,
    _IS_SPLIT: gl.constexpr,
    _GATE: gl.constexpr,
    _ALPHA: gl.constexpr,
    _LIMIT: gl.constexpr,
):
    """Leave one tile of sums, the program's `nth`, to the warps of `gate_backward`, rounded as it would be stored.

    Each group has a barrier of its own that says when the other's tile is taken: on one for both it could take an older
    phase of the same parity for its own.
    """
    tile, full, taken = outputs
    group = nth & 1
    mbarrier.wait(taken.index(group), ((nth >> 1) & 1) ^ (1 - group))
    as_matrix(tile, acc.type.shape[0], acc.type.shape[1]).store(acc.to(tile.dtype))
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def gate_backward(
    handed,
    outputs,
    tiles,
    F,
    GROUP: gl.constexpr,
    IS_CONCATENATED: gl.constexpr,
    GRAD: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Warps of their own, which take each tile of `da` that is handed over: `a` again, `dh`, and `⟨a, da⟩` of the tile.

    `dh` may lie where `h` lies. The next rows of `h` are on their way while some are computed with.
    """
    tile, full, taken = handed
    h_ptr, dh_ptr, a_ptr, dweight_ptr, weight_ptr, row_slot_ptr = outputs
    _tile_expert_ptr, _tile_row_ptr, num_tiles_ptr, _ends_ptr = tiles
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    NUM_PIECES: gl.constexpr = tile.type.shape[0]
    PIECE: gl.constexpr = tile.type.shape[1]
    ROWS: gl.constexpr = NUM_PIECES * PIECE
    COLUMNS: gl.constexpr = tile.type.shape[2]
    WIDTH: gl.constexpr = 8 if IS_CONCATENATED else 4
    layout: gl.constexpr = gl.BlockedLayout(
        [1, WIDTH], [32 * WIDTH // COLUMNS, COLUMNS // WIDTH], [NUM_WARPS, 1], [1, 0]
    )
    num_columns = gl.cdiv(F, COLUMNS)
    total = gl.load(num_tiles_ptr) * num_columns
    nth = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        _expert, row, end, item_column = locate(item, num_columns, tiles, ROWS, GROUP)
        column = item_column * COLUMNS
        g, u = _load_gate_up(h_ptr, row, end, column, F, IS_CONCATENATED, PIECE, COLUMNS, layout)
        i = row + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        slot = gl.load(row_slot_ptr + i, mask=i < end, other=0)
        mbarrier.wait(full.index(0), nth & 1)
        for n in range(NUM_PIECES):
            first_row = row + n * PIECE
            next_row = first_row + PIECE
            next_end = gl.where(n + 1 < NUM_PIECES, end, 0)
            weight = gl.load(weight_ptr + slot, mask=i < end, other=0.0).to(gl.float32)
            next_g, next_u = _load_gate_up(
                h_ptr, next_row, next_end, column, F, IS_CONCATENATED, PIECE, COLUMNS, layout
            )
            slot = gl.load(row_slot_ptr + i + PIECE, mask=i + PIECE < next_end, other=0)
            da = tile.index(n).load(layout).to(gl.float32)
            a, dg, du = GRAD(g.to(gl.float32), u.to(gl.float32), da, ALPHA, LIMIT)
            at, mask = places(first_row, end, column, F, F, PIECE, COLUMNS, layout)
            gl.store(a_ptr + at, a.to(dtype), mask=mask)
            dg, du = (dg * gl.expand_dims(weight, 1)).to(dtype), (du * gl.expand_dims(weight, 1)).to(dtype)
            _store_gate_up(dh_ptr, dg, du, first_row, end, column, F, IS_CONCATENATED)
            dweight = gl.sum(a * da, axis=1)
            gl.store(dweight_ptr + i.to(gl.int64) * num_columns + item_column, dweight, mask=i < end)
            i += PIECE
            g, u = next_g, next_u
        mbarrier.arrive(taken.index((nth + 1) & 1), count=1)
        nth += 1
