"""Routing: the experts that each token chose become rows sorted by expert, once per layer.

Everything stays on the device: shapes depend on `T` and `K` alone, so nothing waits for the host.
"""

import torch
from torch import Tensor

from expertune.shapes import Dispatch, RoutingShape


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the routed rows by expert. The only sort of a layer; stable, so two runs are equal.

    Args:
        expert_TK: integer expert ids below `num_experts`, as the host's router yields them.
        num_experts: `E`.
    """
    device = expert_TK.device
    rows = Dispatch.empty(RoutingShape.of(expert_TK, num_experts), device)
    row_expert_N, slot_N = torch.sort(expert_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, device=device, dtype=row_expert_N.dtype)
    rows.row_slot_N.copy_(slot_N)
    rows.row_expert_N.copy_(row_expert_N)
    row_N = torch.arange(len(slot_N), device=device, dtype=torch.int32)
    rows.token_row_TK.view(-1).index_copy_(0, slot_N, row_N)
    torch.searchsorted(row_expert_N, experts_E, right=True, out_int32=True, out=rows.ends_E)
    return rows


def combine(y_ND: Tensor, weight_TK: Tensor, token_row_TK: Tensor) -> Tensor:
    """Sum each token's rows with its router weights, in a fixed order: `(T, D)` in the dtype of `y_ND`.

    A batched product, because it accumulates in float32 and writes no `(T, K, D)` product.
    """
    num_tokens, top_k = token_row_TK.shape
    y_TKD = y_ND.index_select(0, token_row_TK.reshape(-1)).view(num_tokens, top_k, y_ND.shape[1])
    out_TD = y_ND.new_empty((num_tokens, y_ND.shape[1]))  # a base tensor: hosts add to it in place
    torch.bmm(weight_TK.unsqueeze(1).to(y_ND.dtype), y_TKD, out=out_TD.unsqueeze(1))
    return out_TD


def sum_rows(dx_ND: Tensor, token_row_TK: Tensor) -> Tensor:
    """The backward of copying tokens to rows: sum each token's rows, `(T, D)`, accumulated in float32 or better."""
    num_tokens, top_k = token_row_TK.shape
    dx_TKD = dx_ND.index_select(0, token_row_TK.reshape(-1)).view(num_tokens, top_k, dx_ND.shape[1])
    return dx_TKD.sum(1)
