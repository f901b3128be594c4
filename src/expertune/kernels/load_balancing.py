"""The sums of which the balance loss is made, and its gradient, in one kernel each. Any Triton target.

count[e] = Σ_m weight[m] · [e is among the top_k highest of z[m], of equals the first]
probability[e] = Σ_m weight[m] · p[m, e]      p: softmax of the logits z

d[m, e] = weight[m] · p[m, e] · (u[e] − Σ p[m] · u)      u: the gradient of a sum of probabilities
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import RowBlocks, launch
from expertune.kernels.router import above_taken, best, scores

_ELEMENTS = 2048  # of the rows that a program holds
_MOST_PROGRAMS = 1024  # of the sums, which are then added up


@triton.jit
def _probabilities(logits_ptr, row, num_rows, E, BE: tl.constexpr):
    """Of some rows, the logits and their softmax; beyond the experts -inf and 0."""
    inside = row < num_rows
    z, s = scores(logits_ptr, row, inside, E, False, BE)
    return z, s / tl.where(inside, tl.sum(s, axis=1), 1.0)[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _balance_kernel(
    logits_ptr, mask_ptr, out_ptr, num_rows, num_tokens, E,
    HAS_MASK: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program adds up every so many blocks of rows."""
    e = tl.arange(0, BE)
    count = tl.zeros((BE,), tl.float32)
    probability = tl.zeros((BE,), tl.float32)
    for first in range(tl.program_id(0) * BR, num_rows, tl.num_programs(0) * BR):
        row = tl.arange(0, BR).to(tl.int64) + first
        z, p = _probabilities(logits_ptr, row, num_rows, E, BE)
        z = above_taken(z, e, E)
        is_chosen = tl.zeros((BR, BE), tl.float32)
        for _ in tl.static_range(K):
            is_best = e[None, :] == best(z, e, BE - 1)[:, None]
            is_chosen = tl.where(is_best, 1.0, is_chosen)
            z = tl.where(is_best, -float("inf"), z)
        weight = tl.where(row < num_rows, 1.0, 0.0)
        if HAS_MASK:
            weight = tl.load(mask_ptr + row % num_tokens, mask=row < num_rows, other=0).to(tl.float32)
        count += tl.sum(is_chosen * weight[:, None], axis=0)
        probability += tl.sum(p * weight[:, None], axis=0)
    row_ptr = out_ptr + tl.program_id(0) * 2 * E
    tl.store(row_ptr + e, count, mask=e < E)
    tl.store(row_ptr + E + e, probability, mask=e < E)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _balance_backward_kernel(
    logits_ptr, dmean_ptr, mask_ptr, out_ptr, num_rows, num_tokens, E,
    HAS_MASK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program per block of rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    e = tl.arange(0, BE)
    _, p = _probabilities(logits_ptr, row, num_rows, E, BE)
    u = tl.load(dmean_ptr + e, mask=e < E, other=0.0)
    d = p * (u[None, :] - tl.sum(p * u[None, :], axis=1)[:, None])
    if HAS_MASK:
        d *= tl.load(mask_ptr + row % num_tokens, mask=row < num_rows, other=0).to(tl.float32)[:, None]
    mask = (row[:, None] < num_rows) & (e[None, :] < E)
    tl.store(out_ptr + row[:, None] * E + e[None, :], d.to(out_ptr.dtype.element_ty), mask=mask)


def balance_sums(logits_ME: Tensor, top_k: int, mask_N: Tensor | None) -> Tensor:
    """How often each expert is chosen, and the sum of its probabilities: float32 `(2, E)`, the same in every run.

    Args:
        logits_ME: contiguous, layer after layer: M = layers · N.
        top_k: experts a row.
        mask_N: what a layer's rows count, contiguous; None where each counts one.
    """
    num_rows, num_experts = logits_ME.shape
    blocks = RowBlocks.of(num_rows, num_experts, _ELEMENTS)
    num_programs = max(1, min(blocks.grid[0], _MOST_PROGRAMS))
    out_P2E = torch.empty(num_programs, 2, num_experts, dtype=torch.float32, device=logits_ME.device)
    launch(
        _balance_kernel,
        (num_programs, 1, 1),
        (logits_ME, logits_ME if mask_N is None else mask_N, out_P2E),
        (num_rows, num_rows if mask_N is None else len(mask_N)),
        (num_experts,),
        {"HAS_MASK": mask_N is not None, "K": top_k, "BR": blocks.rows, "BE": blocks.columns},
        num_warps=4,
    )
    return out_P2E.sum(0)


def balance_backward(logits_ME: Tensor, dmean_E: Tensor, mask_N: Tensor | None) -> Tensor:
    """`d_ME` in the dtype of the logits.

    Args:
        logits_ME: contiguous, layer after layer: M = layers · N.
        dmean_E: the gradient of the sum of each expert's probabilities, float32.
        mask_N: what a layer's rows count, contiguous; None where each counts one.
    """
    num_rows, num_experts = logits_ME.shape
    out_ME = torch.empty_like(logits_ME)
    if num_rows == 0:
        return out_ME
    blocks = RowBlocks.of(num_rows, num_experts, _ELEMENTS)
    launch(
        _balance_backward_kernel,
        blocks.grid,
        (logits_ME, dmean_E, dmean_E if mask_N is None else mask_N, out_ME),
        (num_rows, num_rows if mask_N is None else len(mask_N)),
        (num_experts,),
        {"HAS_MASK": mask_N is not None, "BR": blocks.rows, "BE": blocks.columns},
        num_warps=4,
    )
    return out_ME
