"""Attention's backward of a long sample by halves: the gradient of a head's scores in half the memory.

Scores are two triangles, of each half of the queries with its own keys, and a square between them, of the later half
with the earlier keys. The triangles are those of two samples half as long, so they are computed as two heads of one
are; then the square, in their memory, is added in float32. One head of a long sample keeps a card busy so: programs of
the triangles are as many as those of the whole, and those of the square are half as many and equally long.
"""

from typing import Any

import torch
from torch import Tensor

from expertune.kernels.attention import Grads, Heads, Part, scratch_shape
from expertune.kernels.attention_spans import Spans, spans

_MOST_APART = 2**31  # elements, between heads that kernels read as one tensor


def num_scores(length: int, keys: int) -> int:
    """That are held at a time."""
    rows, pitch = scratch_shape(2, length // 2, length // 2, keys, 0)
    return rows * pitch


def why_not(given: Heads, keys: int, num_programs: int, fewest: float) -> str | None:
    """Why a sample is not cut so, in words; None if it is.

    Args:
        given: all heads.
        keys: of a block.
        num_programs: that run at the same time.
        fewest: blocks of keys for each.
    """
    length = len(given.q_THD)
    if length % (2 * keys):
        return "its halves are no whole blocks"
    if length // keys < fewest * num_programs:
        return "one head of it has too few blocks"
    if length // 2 * max(x_THD.stride(0) for x_THD in given[:4]) >= _MOST_APART:
        return "its halves lie too far apart"
    return None


def sample(kernels: Any, given: Heads, dq_THD: Tensor, grads: Grads, scale: float, of_all: Spans) -> None:
    """Write the gradients of a sample, one head of queries at a time; they may lie where queries, keys and values do.

    Args:
        kernels: the two rounds.
        given: all heads.
        dq_THD: of queries.
        grads: of keys and values.
        scale: of scores.
        of_all: spans of the sample, which is whole.
    """
    (length, num_heads, width), group = given.q_THD.shape, given.q_THD.shape[1] // given.k_TJD.shape[1]
    half = length // 2
    of_half = spans(half, half, None, given.q_THD.device)
    ds = given.q_THD.new_empty(scratch_shape(2, half, half, kernels.keys, 0))
    dq, dk = (ds.new_empty((length, 1, width), dtype=torch.float32) for _ in range(2))
    sums = Grads(dk, ds.new_empty((length, 1, given.v_TJV.shape[2]), dtype=torch.float32))
    for head in range(num_heads):
        own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        one = given.of(own, shared)
        triangles = Part(ds, 0, half, kernels.keys, is_band=False, adds=head % group > 0)
        square = Part(ds, half, length, kernels.keys, is_band=False, adds=False, keys_end=half)
        _add(kernels, triangles, _halves(one), of_half, _in_halves(dq), Grads(*map(_in_halves, sums)), scale)
        _add(kernels, square, one, of_all, dq, sums, scale)
        dq_THD[:, own].copy_(dq)
        if own.stop % group == 0:
            for grad, total in zip(grads, sums, strict=True):
                grad[:, shared].copy_(total)


def _add(kernels: Any, part: Part, heads: Heads, of_rows: Spans, dq: Tensor, sums: Grads, scale: float) -> None:
    """Both rounds for a part, to sums in float32."""
    kernels.values(part, heads, of_rows, sums, sums, scale)
    kernels.products(part, heads.q_THD, of_rows, sums.dk, sums.dk, scale, of_queries=False)
    kernels.products(part, heads.k_TJD, of_rows, dq, dq, scale, of_queries=True)


def _halves(one: Heads) -> Heads:
    """Of one head two, half as long."""
    rows = (x_1T.view(2, -1) for x_1T in (one.lse_HT, one.delta_HT))
    return Heads(*map(_in_halves, one[:4]), *rows)


def _in_halves(x_T1D: Tensor) -> Tensor:
    return x_T1D[:, 0].view(2, -1, x_T1D.shape[2]).transpose(0, 1)
