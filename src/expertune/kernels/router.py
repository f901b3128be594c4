"""From a router's logits to the experts of each token and their scores: one kernel each way. Any Triton target.

s[t, e] = exp(z[t, e] − max z[t]), or sigmoid(z[t, e])
chosen are the top_k highest of z, or of p + bias, where p is s, or its share of the sum; of equals the first
of experts in groups only those of a token's best groups count, by the sum of their two highest p + bias
score[t, k] = scale · s[t, e(k)] / total      total: the sum of the chosen s, or of all; of sigmoids, if not normed, 1

Shares sum to 1, so a gradient less what all of it have in common is the same: the first score's is taken off before the
sums, or nothing would be left of the digits of an expert that has nearly all. For the same, divisions are rounded.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import RowBlocks, launch, next_power_of_2
from expertune.shapes import RoutingRule

_ELEMENTS = 1024  # of the rows that a program holds


@triton.jit
def scores(logits_ptr, row, inside, E, IS_SIGMOID: tl.constexpr, BE: tl.constexpr):
    """`z` and `s` of some rows; beyond the experts -inf and 0."""
    e = tl.arange(0, BE)
    mask = inside[:, None] & (e[None, :] < E)
    z = tl.load(logits_ptr + row[:, None] * E + e[None, :], mask=mask, other=-float("inf")).to(tl.float32)
    if IS_SIGMOID:
        s = tl.sigmoid(z)
    else:
        most = tl.max(z, axis=1)
        s = tl.exp(z - tl.where(inside, most, 0.0)[:, None])
    return z, s


@triton.jit
def best(x, place, last):
    """Of each row the place of its highest number, of equals the first; where nothing is a number, `last`."""
    return tl.min(tl.where(x == tl.max(x, axis=1)[:, None], place[None, :], last), axis=1)


@triton.jit
def above_taken(x, place, E):
    """The same numbers, of which those of minus infinity are the lowest finite one: what has been taken is below."""
    return tl.where((place[None, :] < E) & (x == -float("inf")), -3.4e38, x)


@triton.jit
def _of_groups(choice, G: tl.constexpr, USED: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """What is compared, -inf where a row does not use the group."""
    SIZE: tl.constexpr = BE // G
    grouped = tl.reshape(choice, (BR * G, SIZE))
    g, place = tl.arange(0, G), tl.arange(0, SIZE)
    others = tl.where(place[None, :] == best(grouped, place, SIZE - 1)[:, None], -float("inf"), grouped)
    score = tl.reshape(tl.max(grouped, axis=1) + tl.max(others, axis=1), (BR, G))
    is_used = tl.zeros((BR, G), tl.int32)
    for _ in tl.static_range(USED):
        is_best = g[None, :] == best(score, g, G - 1)[:, None]
        is_used = tl.where(is_best, 1, is_used)
        score = tl.where(is_best, -float("inf"), score)
    is_used = tl.reshape(is_used, (BR * G, 1))
    return tl.reshape(tl.where(is_used > 0, grouped, -float("inf")), (BR, BE))


@triton.jit(do_not_specialize=["num_rows"])
def _route_kernel(
    logits_ptr, bias_ptr, index_ptr, score_ptr, num_rows, E, scale, eps,
    IS_SIGMOID: tl.constexpr, IS_NORMED: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    G: tl.constexpr, USED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CHOSEN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program per block of rows. With `IS_CHOSEN` the experts are read, else they are written."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < num_rows
    e, slot = tl.arange(0, BE), tl.arange(0, BK)
    z, s = scores(logits_ptr, row, inside, E, IS_SIGMOID, BE)
    choice = z
    if HAS_BIAS or G > 1:
        p = s if IS_SIGMOID else tl.div_rn(s, tl.sum(s, axis=1)[:, None])
        choice = tl.where(e[None, :] < E, p, -float("inf"))
    if HAS_BIAS:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if G > 1:
        choice = _of_groups(choice, G, USED, BR, BE)
    choice = above_taken(choice, e, E)
    chosen = tl.zeros((BR, BK), tl.float32)
    for k in tl.static_range(K):
        if IS_CHOSEN:
            expert = tl.load(index_ptr + row * K + k, mask=inside, other=0).to(tl.int32)
        else:
            expert = best(choice, e, E - 1)
            tl.store(index_ptr + row * K + k, expert.to(tl.int64), mask=inside)
            choice = tl.where(e[None, :] == expert[:, None], -float("inf"), choice)
        s_k = tl.sum(tl.where(e[None, :] == expert[:, None], s, 0.0), axis=1)
        chosen = tl.where(slot[None, :] == k, s_k[:, None], chosen)
    if IS_NORMED:
        chosen = tl.div_rn(chosen, (tl.sum(chosen, axis=1) + eps)[:, None])
    elif not IS_SIGMOID:
        chosen = tl.div_rn(chosen, tl.sum(s, axis=1)[:, None])
    places = score_ptr + row[:, None] * K + slot[None, :]
    mask = inside[:, None] & (slot[None, :] < K)
    tl.store(places, chosen * scale, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _route_backward_kernel(
    logits_ptr, index_ptr, dscore_ptr, dlogits_ptr, num_rows, E, scale, eps,
    IS_SIGMOID: tl.constexpr, IS_NORMED: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program per block of rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < num_rows
    e = tl.arange(0, BE)
    _, s = scores(logits_ptr, row, inside, E, IS_SIGMOID, BE)
    ds = tl.zeros((BR, BE), tl.float32)
    is_chosen = tl.zeros((BR, BE), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(index_ptr + row * K + k, mask=inside, other=0).to(tl.int32)
        dscore = tl.load(dscore_ptr + row * K + k, mask=inside, other=0.0)
        here = (e[None, :] == expert[:, None]).to(tl.float32)
        ds += here * dscore[:, None]
        is_chosen += here
    p = s
    counts = is_chosen if IS_NORMED else tl.full((BR, BE), 1.0, tl.float32)
    if IS_NORMED:
        p = tl.div_rn(s, (tl.sum(is_chosen * s, axis=1) + eps)[:, None])
    elif not IS_SIGMOID:
        p = tl.div_rn(s, tl.sum(s, axis=1)[:, None])
    if IS_NORMED or not IS_SIGMOID:
        ds -= counts * tl.load(dscore_ptr + row * K, mask=inside, other=0.0)[:, None]
        ds -= counts * tl.sum(ds * p, axis=1)[:, None]
    slope = p * (1 - s) if IS_SIGMOID else p
    places = dlogits_ptr + row[:, None] * E + e[None, :]
    mask = inside[:, None] & (e[None, :] < E)
    tl.store(places, (scale * ds * slope).to(dlogits_ptr.dtype.element_ty), mask=mask)


def route(
    logits_TE: Tensor, bias_E: Tensor | None, index_TK: Tensor, score_TK: Tensor, rule: RoutingRule, *, is_chosen: bool
) -> None:
    """Fill the scores, and the experts unless they are chosen.

    Args:
        logits_TE: contiguous.
        bias_E: is added to what is compared; None for none.
        index_TK: int64.
        score_TK: float32.
        rule: of the router; with groups, their number and that of the experts are powers of two.
        is_chosen: whether the experts are given.
    """
    constants = {
        "G": rule.num_groups,
        "USED": rule.top_groups,
        "HAS_BIAS": bias_E is not None,
        "IS_CHOSEN": is_chosen,
        "BK": next_power_of_2(rule.top_k),
    }
    tensors = (logits_TE, logits_TE if bias_E is None else bias_E, index_TK, score_TK)
    _launch(_route_kernel, tensors, rule, constants)


def route_backward(logits_TE: Tensor, index_TK: Tensor, dscore_TK: Tensor, rule: RoutingRule) -> Tensor:
    """`dlogits_TE` in the dtype of the logits.

    Args:
        logits_TE, index_TK: as in forward.
        dscore_TK: contiguous, float32.
        rule: as in forward.
    """
    dlogits_TE = torch.empty_like(logits_TE)
    _launch(_route_backward_kernel, (logits_TE, index_TK, dscore_TK, dlogits_TE), rule, {})
    return dlogits_TE


def _launch(kernel: object, tensors: tuple[Tensor, ...], rule: RoutingRule, constants: dict[str, Any]) -> None:
    num_rows, num_experts = tensors[0].shape
    if num_rows == 0:
        return
    blocks = RowBlocks.of(num_rows, num_experts, _ELEMENTS)
    known = {"IS_SIGMOID": rule.is_sigmoid, "IS_NORMED": rule.is_normed, "K": rule.top_k}
    cut = {"BR": blocks.rows, "BE": blocks.columns}
    numbers = (num_experts, rule.scale, rule.eps)
    launch(kernel, blocks.grid, tensors, (num_rows,), numbers, known | cut | constants, num_warps=4)
