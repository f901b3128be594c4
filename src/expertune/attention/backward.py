"""Attention's backward by our kernels; of its two rounds (`kernels/attention.py`), which heads and queries at a time.

The gradient of all scores at once would grow with the square of the length. It is held for as many heads as keep the
card busy, within a bound in proportion to the length; where even one head's is beyond that, for a run of queries at a
time. What several runs, or several heads of queries, give the same keys and values is summed in float32.
"""

from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.attention import backward_again, backward_halves
from expertune.kernels import attention as plain
from expertune.kernels import attention_hopper, attention_products, attention_products_hopper
from expertune.kernels.attention import Grads, Heads, Part, row_sums, scratch_shape
from expertune.kernels.attention_hopper import readable
from expertune.kernels.attention_spans import Spans
from expertune.kernels.device import is_hopper, num_programs
from expertune.kernels.launch import ceil_div

# bytes that the gradient of scores may take: at 32,768 tokens one head of 20 (measured on an H200)
_A_TOKEN = 40 * 2**10
_LEAST = 2**29  # and in any case
# blocks of keys a multiprocessor, so that all end at about the same time: uneven ones, and those that fill a band
_WAVES, _WAVES_OF_A_BAND = 5, 16
_FEWEST_WAVES = 1.9  # where there is no room for so many: more gain nothing then (measured: heads of 256 on an H200)
# at least, where several heads that share keys are summed by one program
_WAVES_OF_SUMS, _WAVES_OF_SUMS_IN_A_BAND = 5, 2.5


class Cut(NamedTuple):
    """How a sample is cut.

    Args:
        heads: of queries, whose scores are held at a time.
        queries: of each.
        band: columns of a band; 0 if folded.
        summed: heads whose gradients of shared keys and values one program sums.
    """

    heads: int
    queries: int
    band: int = 0
    summed: int = 1


class _Kernels(NamedTuple):
    """The two rounds, and the keys of a block of theirs."""

    values: Any
    products: Any
    keys: int


def backward(
    dout_BTHV: Tensor,
    q_BHTD: Tensor,
    k_BJTD: Tensor,
    v_BJTV: Tensor,
    out_BTHV: Tensor,
    lse_BHT: Tensor,
    scale: float,
    spans: Spans,
    *,
    forms_again: bool = False,
    is_whole: bool = False,
    overwrites: bool = False,
    overwrites_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of causal attention, in their shapes and dtype.

    Two runs give the same bits.

    Args:
        dout_BTHV: the gradient of the output.
        q_BHTD, k_BJTD, v_BJTV: what attended; `H / J` heads of queries share a key.
        out_BTHV, lse_BHT: what came out, and the logarithm of the sum of a query's exponentials, float32.
        scale: of scores.
        spans: of the rows of each; packed samples are one row of a batch.
        forms_again: whether scores are formed again for queries (`backward_again.py`), instead of their gradient held;
            values are as wide as keys there.
        is_whole: whether all rows are one sample, without a window.
        overwrites: whether gradients may be written over queries, keys and values. Scores that are formed again are
            formed of these to the end: there it is not done.
        overwrites_gradient: whether that of queries may be written over `dout`; not done there either, nor where values
            have another width.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BJTD, v_BJTV))
    overwrites = overwrites and not forms_again
    in_dout = overwrites_gradient and not forms_again and dout_BTHV.shape == q.shape and dout_BTHV.is_contiguous()
    dk, dv = (x if overwrites else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dq = q if overwrites else dout_BTHV if in_dout else torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = [readable(x) for x in (q, k, v, dout_BTHV, out_BTHV)]
    lse_BHT = F.pad(lse_BHT, (0, -lse_BHT.shape[-1] % 4))[..., : lse_BHT.shape[-1]]  # rows of whole 16 bytes
    run = backward_again.sample if forms_again else _by_halves if is_whole else _by_heads
    for each in range(len(q)):
        q_THD, k_TJD, v_TJV, dout_THV, out_THV = (x[each] for x in tensors)
        heads = Heads(q_THD, k_TJD, v_TJV, dout_THV, lse_BHT[each], row_sums(dout_THV, out_THV))
        run(heads, dq[each], Grads(dk[each], dv[each]), scale, spans)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _by_halves(given: Heads, dq: Tensor, grads: Grads, scale: float, spans: Spans) -> None:
    """Of one row of the batch, which is whole: by halves, if it is long and these are not too large."""
    kernels, length = _kernels(given.q_THD.device), len(given.q_THD)
    is_long = backward_halves.why_not(given, kernels.keys, num_programs(dq.device), _FEWEST_WAVES) is None
    if is_long and backward_halves.num_scores(length, kernels.keys) <= _most_scores(length):
        backward_halves.sample(kernels, given, dq, grads, scale, spans)
    else:
        _by_heads(given, dq, grads, scale, spans)


def _by_heads(given: Heads, dq: Tensor, grads: Grads, scale: float, spans: Spans) -> None:
    """Of one row of the batch, `(T, heads, D)`, in two rounds."""
    q, k = given.q_THD, given.k_TJD
    dk, dv = grads
    (length, num_heads, _), group = q.shape, q.shape[1] // k.shape[1]
    kernels = _kernels(q.device)
    cut = cut_into(length, num_heads, group, kernels.keys, num_programs(q.device), spans.band(kernels.keys))
    ds = q.new_empty(scratch_shape(cut.heads, length, cut.queries, kernels.keys, cut.band))
    are_summed = cut.queries < length or cut.summed < group
    sums = backward_again.sums_of(grads, cut.heads // cut.summed) if are_summed else None
    for first in range(0, num_heads, cut.heads):
        own = slice(first, min(first + cut.heads, num_heads))
        shared = slice(first // group, ceil_div(own.stop, group))
        heads = given.of(own, shared)
        to_sum = None if sums is None else Grads(*[x[:, : (own.stop - first) // cut.summed] for x in sums])
        scratch = ds[: len(ds) // cut.heads * (own.stop - first)]
        is_last = own.stop % group == 0
        written = Grads(dk[:, shared], dv[:, shared])
        last = written if is_last and cut.summed == min(group, cut.heads) else None
        if last is not None and dk.data_ptr() == k.data_ptr():  # keys are read after their gradient is made
            last = last._replace(dk=torch.empty_like(last.dk))
        for part in _parts(scratch, length, cut, kernels.keys, adds=first % group > 0):
            _part(kernels, part, heads, spans, to_sum, last, dq[:, own], scale)
        if to_sum is not None and last is None and is_last:
            backward_again.add_up(to_sum, written)
        if last is not None and last.dk is not written.dk:
            written.dk.copy_(last.dk)


def _part(
    kernels: _Kernels,
    part: Part,
    heads: Heads,
    spans: Spans,
    sums: Grads | None,
    last: Grads | None,
    dq: Tensor,
    scale: float,
) -> None:
    """Both rounds for some queries. What they give keys and values is summed, or written if they are the last."""
    grads = last if last is not None and part.end == len(dq) else sums
    assert grads is not None, "what is not the last is summed"
    kernels.values(part, heads, spans, sums, grads, scale)
    dk_sum = None if sums is None else sums.dk
    kernels.products(part, heads.q_THD, spans, dk_sum, grads.dk, scale, of_queries=False)
    kernels.products(part, heads.k_TJD, spans, None, dq, scale, of_queries=True)


def _kernels(device: torch.device) -> _Kernels:
    if is_hopper(device):
        return _Kernels(attention_hopper.values, attention_products_hopper.products, attention_hopper.KEYS)
    return _Kernels(plain.values, attention_products.products, plain.KEYS)


def _parts(ds: Tensor, length: int, cut: Cut, keys: int, *, adds: bool) -> Iterator[Part]:
    for first in range(0, length, cut.queries):
        yield Part(ds, first, min(first + cut.queries, length), keys, cut.band > 0, adds)


def _most_scores(length: int) -> int:
    """Of which the gradient is held at a time, in 16 bits."""
    return max(_A_TOKEN * length, _LEAST) // 2


def cut_into(length: int, num_heads: int, group: int, keys: int, num_programs: int, band: int) -> Cut:
    """How a sample is cut: into whole groups of heads that share keys, or a group into equal parts.

    Args:
        length: rows.
        num_heads: of queries.
        group: of them that share one of keys.
        keys: of a block.
        num_programs: that run at the same time.
        band: columns of one; it is taken where it is smaller than a folded square.
    """
    most = _most_scores(length)
    whole = ceil_div(length, keys) * keys
    folded, in_a_band = (prod(scratch_shape(1, length, whole, keys, columns)) for columns in (0, band))
    band = band if in_a_band < folded else 0
    numbers = min(folded, in_a_band)  # of a head
    if numbers > most:
        queries = most // whole // keys - 1
        return Cut(1, max(queries, 1) * keys)
    waves = _WAVES_OF_A_BAND if band else _WAVES
    wanted = ceil_div(waves * num_programs, whole // keys)
    sizes = [n for n in range(1, group) if group % n == 0] + list(range(group, num_heads + 1, group))
    fitting = [n for n in sizes if n * numbers <= most]
    heads = next((n for n in fitting if n >= wanted), fitting[-1])
    if heads < min(wanted, num_heads) and not band:
        enough = _FEWEST_WAVES * num_programs / (whole // keys)
        heads = next((n for n in fitting if n >= enough), heads)
    if heads >= group:  # as many at each time
        heads = ceil_div(num_heads // group, ceil_div(num_heads, heads)) * group
    fewest = (_WAVES_OF_SUMS_IN_A_BAND if band else _WAVES_OF_SUMS) * num_programs
    summed = backward_again.heads_summed(gcd(group, heads), whole // keys * heads, fewest)
    return Cut(heads, whole, band, summed)
