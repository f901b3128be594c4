"""Attention's backward with scores formed twice: in a round for keys and values, and in one for queries.

Each is one pass over what is attended, like the forward, and writes nothing but gradients, so all heads run at once.
That is seven products where `backward.py`, which writes the gradient of scores, has five: with heads of 64 and 128 two
more take less time than that traffic, and registers hold the sums of `dK` beside those of `dV`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.kernels import attention as plain
from expertune.kernels import attention_hopper, attention_queries, attention_queries_hopper
from expertune.kernels.attention import Grads, Heads
from expertune.kernels.attention_spans import Spans
from expertune.kernels.device import is_hopper, num_programs
from expertune.kernels.launch import ceil_div

_WAVES = 1.5  # blocks of keys a multiprocessor at least, where several heads that share keys are summed by one program


class _Rounds(NamedTuple):
    """The two rounds, and the keys of a block of the first."""

    keys_and_values: Any
    queries: Any
    keys: int


def sample(heads: Heads, dq_THD: Tensor, grads: Grads, scale: float, spans: Spans) -> None:
    """Write the gradients of one row of a batch.

    Args:
        heads: all of it.
        dq_THD: of queries.
        grads: of keys and values.
        scale: of scores.
        spans: of the rows.
    """
    rounds = _rounds(heads.q_THD.device)
    _keys_and_values(rounds, heads, spans, grads, scale)
    rounds.queries(heads, spans, dq_THD, scale)


def _keys_and_values(rounds: _Rounds, heads: Heads, spans: Spans, grads: Grads, scale: float) -> None:
    """Of heads that share keys by one program, or where too few programs would be left by several, in float32."""
    (length, num_heads, _), num_shared = heads.q_THD.shape, heads.k_TJD.shape[1]
    num_blocks = ceil_div(length, rounds.keys) * num_heads
    fewest = _WAVES * num_programs(heads.q_THD.device)
    summed = heads_summed(num_heads // num_shared, num_blocks, fewest)
    if summed == num_heads // num_shared:
        rounds.keys_and_values(heads, spans, grads, scale)
        return
    sums = sums_of(grads, num_heads // summed)
    rounds.keys_and_values(heads, spans, sums, scale)
    add_up(sums, grads)


def sums_of(grads: Grads, number: int) -> Grads:
    """Room for so many sums of keys' gradients, and of values', in float32."""
    return Grads(*[x.new_empty((len(x), number, x.shape[2]), dtype=torch.float32) for x in grads])


def add_up(sums: Grads, grads: Grads) -> None:
    """Write the gradients of shared keys and values, of each as many sums in a row."""
    for several, grad in zip(sums, grads, strict=True):
        length, num_shared, width = grad.shape
        grad.copy_(several.view(length, num_shared, -1, width).sum(2))


def heads_summed(group: int, num_blocks: int, fewest: float) -> int:
    """How many heads of a group that shares keys one program sums: as many as leave so many programs, or one.

    Args:
        group: heads of queries that share one of keys.
        num_blocks: of keys, of all heads of queries.
        fewest: programs.
    """
    return max(n for n in range(1, group + 1) if n == 1 or (group % n == 0 and num_blocks >= n * fewest))


def _rounds(device: torch.device) -> _Rounds:
    if is_hopper(device):
        return _Rounds(attention_hopper.keys_and_values, attention_queries_hopper.queries, attention_hopper.KEYS)
    return _Rounds(plain.keys_and_values, attention_queries.queries, plain.KEYS)
