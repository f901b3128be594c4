"""The gradient of the balance loss with respect to routers' logits, in one kernel. Any Triton target.

d[m, e] = weight[m] · p[m, e] · (u[e] − Σ p[m] · u)      p: softmax of the logits, u: the gradient of the mean of p
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import RowBlocks, launch

_ELEMENTS = 2048  # of the rows that a program holds


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _balance_backward_kernel(
    logits_ptr, dmean_ptr, mask_ptr, out_ptr, num_rows, num_tokens, E,
    HAS_MASK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program per block of rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    e = tl.arange(0, BE)
    mask = (row[:, None] < num_rows) & (e[None, :] < E)
    places = row[:, None] * E + e[None, :]
    z = tl.load(logits_ptr + places, mask=mask, other=-float("inf")).to(tl.float32)
    z = tl.where(row[:, None] < num_rows, z, 0.0)
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    p /= tl.sum(p, axis=1)[:, None]
    u = tl.load(dmean_ptr + e, mask=e < E, other=0.0)
    d = p * (u[None, :] - tl.sum(p * u[None, :], axis=1)[:, None])
    if HAS_MASK:
        d *= tl.load(mask_ptr + row % num_tokens, mask=row < num_rows, other=0).to(tl.float32)[:, None]
    tl.store(out_ptr + places, d.to(out_ptr.dtype.element_ty), mask=mask)


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
