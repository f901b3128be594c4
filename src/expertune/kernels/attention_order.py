"""Which block of queries of which head a program has: some heads after others, and of these the last queries first.

Blocks of a head read the same keys and values. They read them from the cache where as many as possible run at the same
time, so a few heads come first, as many as keep the card busy, then the next few. Of whole samples the last queries
have most keys, and what is short comes last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.device import num_programs
from expertune.kernels.launch import ceil_div

_WAVES = 2  # blocks a multiprocessor, of the heads that come at the same time
_FEWEST = 2  # heads of keys; of one the blocks that end last are too few


@triton.jit
def own_block(num_blocks, num_heads, together):
    """This program's block and head; a grid has a program a block and head."""
    program = tl.program_id(0)
    first = program // (num_blocks * together) * together
    own, num_together = program - first * num_blocks, tl.minimum(together, num_heads - first)
    return num_blocks - 1 - own // num_together, first + own % num_together


def in_order(q_THD: Tensor, num_shared: int, queries: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The grid of a kernel whose programs find their blocks by `own_block`, and what it is told: heads, rows, together.

    Args:
        q_THD: queries.
        num_shared: heads of keys.
        queries: of a block.
    """
    length, num_heads, _ = q_THD.shape
    num_blocks = ceil_div(length, queries)
    together = heads_together(num_blocks, num_heads, num_shared, q_THD.device)
    return (num_blocks * num_heads, 1, 1), (num_heads, length, together)


def heads_together(num_blocks: int, num_heads: int, num_shared: int, device: torch.device) -> int:
    """Heads of queries that come at the same time: all that share keys, of about as many heads of keys each time.

    Args:
        num_blocks: of queries of a head.
        num_heads: of queries.
        num_shared: of keys.
        device: that they run on.
    """
    wanted = max(_FEWEST, _WAVES * num_programs(device) // num_blocks)
    return num_heads // num_shared * ceil_div(num_shared, ceil_div(num_shared, wanted))
