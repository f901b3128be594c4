"""Attention's backward in two rounds (`kernels/attention.py`): which heads and which queries at a time.

The gradient of all scores at once would grow with the square of the length. It is held for as many heads as keep the
card busy, within a bound in proportion to the queries; where even one head's is beyond that, for a run of queries at a
time, and what they give keys and values is summed in float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.kernels import attention as plain
from expertune.kernels import attention_hopper, attention_products_hopper
from expertune.kernels.attention import Part, row_sums, scratch_shape
from expertune.kernels.device import is_hopper, num_programs
from expertune.kernels.launch import are_aligned, ceil_div

_OF_QUERIES = 4  # times the bytes of queries, that the gradient of scores may take, measured on an H200
_LEAST = 2**29  # bytes that it may take in any case
_WAVES = 3  # blocks of keys a multiprocessor: uneven as they are, all end at about the same time


class Cut(NamedTuple):
    """Heads of keys, and queries of each that attends to them, whose scores are held at a time."""

    heads: int
    queries: int


def backward(
    dout_BTHD: Tensor, q_BHTD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, out_BTHD: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of causal attention over whole samples, in their shapes and dtype.

    Two runs give the same bits.

    Args:
        dout_BTHD: the gradient of the output.
        q_BHTD, k_BJTD, v_BJTD: what attended; values are as wide as keys, and `H / J` heads of queries share a key.
        out_BTHD, lse_BHT: what came out, and the logarithm of the sum of a query's exponentials, float32.
        scale: of scores.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BJTD, v_BJTD))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tensors = [_readable(x) for x in (q, k, v, dout_BTHD, out_BTHD)]
    lse_BHT = F.pad(lse_BHT, (0, -lse_BHT.shape[-1] % 4))[..., : lse_BHT.shape[-1]]  # rows of whole 16 bytes
    for each in range(len(q)):
        _sample(*(x[each] for x in (*tensors, lse_BHT, dq, dk, dv)), scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """Of one sample, `(T, heads, D)`."""
    on_hopper = is_hopper(q.device)
    values = attention_hopper.values if on_hopper else plain.values
    products = attention_products_hopper.products if on_hopper else plain.products
    keys = attention_hopper.KEYS if on_hopper else plain.KEYS
    (length, num_heads, width), num_shared = q.shape, k.shape[1]
    group = num_heads // num_shared
    delta_HT = row_sums(dout, out)
    cut = cut_into(length, num_heads, num_shared, width * q.element_size(), keys, num_programs(q.device))
    ds = q.new_empty(scratch_shape(cut.heads * group, length, cut.queries, keys))
    sums = None if cut.queries >= length else q.new_empty((2, length, cut.heads, width), dtype=torch.float32)
    for first_head in range(0, num_shared, cut.heads):
        shared = slice(first_head, min(first_head + cut.heads, num_shared))
        own = slice(group * shared.start, group * shared.stop)
        scratch = ds[: len(ds) // cut.heads * (shared.stop - shared.start)]
        to_sum = (None, None) if sums is None else sums[:, :, : shared.stop - shared.start]
        for part in _parts(scratch, length, cut.queries, keys):
            dk_part, dv_part = (dk[:, shared], dv[:, shared]) if part.end == length else to_sum
            heads = (q[:, own], k[:, shared], v[:, shared], dout[:, own], lse_HT[own], delta_HT[own])
            values(part, *heads, to_sum[1], dv_part, scale)
            products(part, q[:, own], to_sum[0], dk_part, scale, of_queries=False, group=group)
            products(part, k[:, shared], None, dq[:, own], scale, of_queries=True, group=group)


def _parts(ds: Tensor, length: int, num_queries: int, keys: int) -> Iterator[Part]:
    for first in range(0, length, num_queries):
        yield Part(ds, first, min(first + num_queries, length), keys)


def cut_into(length: int, num_heads: int, num_shared: int, row_bytes: int, keys: int, num_programs: int) -> Cut:
    """How a sample is cut.

    Args:
        length: rows.
        num_heads, num_shared: heads of queries and of keys.
        row_bytes: of a head's row.
        keys: of a block.
        num_programs: that run at the same time.
    """
    most = max(_OF_QUERIES * length * num_heads * row_bytes, _LEAST) // 2  # numbers in 16 bits
    group = num_heads // num_shared
    whole = ceil_div(length, keys) * keys
    rows, pitch = scratch_shape(group, length, whole, keys)
    if rows * pitch <= most:
        wanted = ceil_div(_WAVES * num_programs, whole // keys)
        heads = max(1, min(num_shared, wanted, most // (rows * pitch)))
        return Cut(ceil_div(num_shared, ceil_div(num_shared, heads)), whole)
    queries = most // (group * whole) // keys - 1
    return Cut(1, max(queries, 1) * keys)


def _readable(x: Tensor) -> Tensor:
    """As the tensor memory accelerator wants it: rows side by side, which begin at multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x if x.stride(-1) == 1 and are_aligned([x.data_ptr(), *strides]) else x.contiguous()
