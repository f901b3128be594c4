"""Routing: the experts that each token chose become rows sorted by expert, once per layer.

Everything stays on the device: shapes depend on `T` and `K` alone, so nothing waits for the host.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expertune.shapes import Tiles


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Where each routed row comes from and where each token's rows lie. All int32.

    Args:
        row_slot_N: the slot `t·K + k` that a row copies: token `t`, its `k`-th choice.
        row_expert_N: the expert that a row goes to; ascending.
        token_row_TK: the rows of a token, in the order of its router weights.
        ends_E: expert `e` owns rows `ends_E[e-1]` to `ends_E[e]`.
        tiles: the rows cut into tiles, for backends that need them.
    """

    row_slot_N: Tensor
    row_expert_N: Tensor
    token_row_TK: Tensor
    ends_E: Tensor
    tiles: Tiles | None = None

    @property
    def top_k(self) -> int:
        """`K`."""
        return self.token_row_TK.shape[1]

    @property
    def tile_rows(self) -> int | None:
        """Rows a tile, or None where the rows are not cut."""
        return None if self.tiles is None else self.tiles.rows

    @cached_property
    def row_token_N(self) -> Tensor:
        """The token that a row copies."""
        return self.row_slot_N // max(self.top_k, 1)

    def by_row(self, weight_TK: Tensor) -> Tensor:
        """The router's weight of each row, `(N, 1)`."""
        return weight_TK.reshape(-1, 1).index_select(0, self.row_slot_N)


def dispatch(expert_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the routed rows by expert. The only sort of a layer; stable, so two runs are equal.

    Args:
        expert_TK: integer expert ids below `num_experts`, as the host's router yields them.
        num_experts: `E`.
    """
    num_tokens, top_k = expert_TK.shape
    device = expert_TK.device
    row_expert_N, slot_N = torch.sort(expert_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, device=device, dtype=row_expert_N.dtype)
    row_N = torch.arange(num_tokens * top_k, device=device, dtype=torch.int32)
    token_row_TK = torch.empty_like(row_N).index_copy_(0, slot_N, row_N).view(num_tokens, top_k)
    return Dispatch(
        row_slot_N=slot_N.to(torch.int32),
        row_expert_N=row_expert_N.to(torch.int32),
        token_row_TK=token_row_TK,
        ends_E=torch.searchsorted(row_expert_N, experts_E, right=True, out_int32=True),
    )


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
