"""Routing: a stable counting sort of the routed rows by expert, and the list of row tiles that grouped products walk.

Slot `s = t·K + k` holds token `t`'s k-th choice. Row `n` is where slot `s` lands after the sort. Three launches, no
wait for the host: every block of slots counts its experts; the counts of each expert are added up over the blocks; then
every block knows where its rows go. Any Triton target; integers only, no atomics, so two runs are equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch, next_power_of_2
from expertune.shapes import Dispatch, RoutingShape

_SLOTS = 128  # slots a block
_CHUNK = 32  # of what a block compares at a time, so that it stays in registers
_BLOCKS, _COLUMNS = 128, 8  # of the counts that are added up at a time


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(expert_ptr, count_ptr, num_slots, E, SLOTS: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """One program per block of slots: how many go to each expert."""
    block = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    is_own = tl.zeros((CHUNK, E_PAD), tl.int32)
    for first in tl.static_range(0, SLOTS, CHUNK):
        slot = block * SLOTS + first + tl.arange(0, CHUNK)
        expert = tl.load(expert_ptr + slot, mask=slot < num_slots, other=E_PAD).to(tl.int32)
        is_own += (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(count_ptr + block * E + experts, tl.sum(is_own, axis=0), mask=experts < E)


@triton.jit(do_not_specialize=["num_blocks"])
def _add_up_kernel(count_ptr, total_ptr, num_blocks, E, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per few experts: each block's count becomes that of all blocks before it."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (block[:, None] < num_blocks) & (expert[None, :] < E)
        at = count_ptr + block[:, None] * E + expert[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(total_ptr + expert, total, mask=expert < E)


@triton.jit(do_not_specialize=["num_slots", "tiles_a_block"])
def _place_kernel(
    expert_ptr,
    before_ptr,
    total_ptr,
    row_slot_ptr,
    row_expert_ptr,
    slot_row_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    num_slots,
    tiles_a_block,
    E,
    SLOTS: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One program per block of slots: the rows of its slots, and its share of the tile list."""
    block = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    total = tl.load(total_ptr + experts, mask=experts < E, other=0)
    before = tl.load(before_ptr + block * E + experts, mask=experts < E, other=0)
    ends = tl.cumsum(total, axis=0)
    starts = ends - total

    slot = block * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    expert = tl.load(expert_ptr + slot, mask=inside, other=0).to(tl.int32)
    row = tl.gather(starts + before, expert, 0)
    for first in tl.static_range(0, SLOTS, CHUNK):
        twin = block * SLOTS + first + tl.arange(0, CHUNK)
        twin_expert = tl.load(expert_ptr + twin, mask=twin < num_slots, other=E_PAD).to(tl.int32)
        is_earlier_twin = (twin_expert[:, None] == expert[None, :]) & (twin[:, None] < slot[None, :])
        row += tl.sum(is_earlier_twin.to(tl.int32), axis=0)
    tl.store(slot_row_ptr + slot, row, mask=inside)
    tl.store(row_slot_ptr + row, slot, mask=inside)
    tl.store(row_expert_ptr + row, expert, mask=inside)

    num_tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    last_tile = tl.cumsum(num_tiles, axis=0)
    num_listed = tl.sum(num_tiles, axis=0)
    if block == 0:
        tl.store(ends_ptr + experts, ends, mask=experts < E)
        tl.store(num_tiles_ptr, num_listed)
    # the first row of a tile, had its expert's tiles started at tile 0
    offset = starts - (last_tile - num_tiles) * TILE_ROWS
    for first in range(0, tiles_a_block, CHUNK):
        mine = first + tl.arange(0, CHUNK)
        tile = block * tiles_a_block + mine
        in_list = (mine < tiles_a_block) & (tile < num_listed)
        tile_expert = tl.sum((last_tile[:, None] <= tile[None, :]).to(tl.int32), axis=0)
        tile_row = tile * TILE_ROWS + tl.gather(offset, tl.minimum(tile_expert, E_PAD - 1), 0)
        tl.store(tile_expert_ptr + tile, tile_expert, mask=in_list)
        tl.store(tile_row_ptr + tile, tile_row, mask=in_list)


def sort_by_expert(expert_TK: Tensor, shape: RoutingShape) -> Dispatch:
    """Sort slots by expert, stably, and cut every expert's rows into tiles.

    Args:
        expert_TK: integer expert ids.
        shape: of the routing, with rows a tile.
    """
    num_experts, num_slots = shape.num_experts, shape.num_rows
    rows = Dispatch.empty(shape, expert_TK.device)
    num_blocks = max(1, ceil_div(num_slots, _SLOTS))
    counts = rows.words.new_empty((num_blocks * num_experts,))
    totals = rows.words.new_empty((num_experts,))
    expert_N, tiles = expert_TK.reshape(-1), rows.tiles
    grid, columns = (num_blocks, 1, 1), (ceil_div(num_experts, _COLUMNS), 1, 1)
    constants = {"SLOTS": _SLOTS, "E_PAD": next_power_of_2(num_experts), "CHUNK": _CHUNK}
    launch(_count_kernel, grid, (expert_N, counts), (num_slots,), (num_experts,), constants, num_warps=4)
    added = {"BLOCKS": _BLOCKS, "COLUMNS": _COLUMNS}
    launch(_add_up_kernel, columns, (counts, totals), (num_blocks,), (num_experts,), added, num_warps=4)
    outputs = (rows.row_slot_N, rows.row_expert_N, rows.token_row_TK, tiles.ends_E, tiles.expert, tiles.row)
    launch(
        _place_kernel,
        grid,
        (expert_N, counts, totals, *outputs, tiles.count),
        (num_slots, ceil_div(shape.max_tiles, num_blocks)),
        (num_experts,),
        constants | {"TILE_ROWS": shape.tile_rows},
        num_warps=4,
    )
    return rows
