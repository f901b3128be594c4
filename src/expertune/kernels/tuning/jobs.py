"""What a search runs: a kernel on random rows, and what plain torch makes of them, summed in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertune.kernels import linear, shrink
from expertune.kernels.device import tile_rows
from expertune.kernels.routing import sort_by_expert
from expertune.kernels.tuning.configs import LinearShape, ShrinkShape
from expertune.kernels.tuning.lookup import Key
from expertune.shapes import RoutingShape, Tiles


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many tokens are routed, to how many of how many experts."""

    num_tokens: int
    top_k: int
    num_experts: int

    @property
    def num_rows(self) -> int:
        """`N`."""
        return self.num_tokens * self.top_k


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kernel on fixed inputs.

    Args:
        run: the kernel under a configuration.
        expected: what each of its results should be, float32.
    """

    run: Callable[[Any], tuple[Tensor, ...]]
    expected: tuple[Tensor, ...]


def make_job(key: Key, batch: Batch) -> Job:
    """The job of a key, on fresh random rows that are routed evenly."""
    expert_TK = torch.rand(batch.num_tokens, batch.num_experts, device=key.device).topk(batch.top_k).indices
    routing = sort_by_expert(expert_TK, RoutingShape.of(expert_TK, batch.num_experts, tile_rows(key.device)))
    if isinstance(key.shape, LinearShape):
        return _linear_job(key, key.shape, batch, routing.tiles)
    return _shrink_job(key, key.shape, batch, routing.tiles, routing.row_slot_N)


def _linear_job(key: Key, shape: LinearShape, batch: Batch, tiles: Tiles) -> Job:
    x_NI = _normal(key, batch.num_rows, shape.width_in)
    w_EIO = _matrices(key, batch.num_experts, shape.width_in, shape.width_out, is_turned=shape.is_k_contiguous)
    if shape.rank == 0:
        return Job(
            run=lambda config: (linear.linear(x_NI, w_EIO, tiles, config=config),),
            expected=(_product(x_NI, w_EIO, tiles),),
        )
    mid_NR = _normal(key, batch.num_rows, shape.rank)
    b_ERO = _matrices(key, batch.num_experts, shape.rank, shape.width_out, is_turned=shape.is_k_contiguous)
    return Job(
        run=lambda config: (linear.linear(x_NI, w_EIO, tiles, mid_NR=mid_NR, b_ERO=b_ERO, config=config),),
        expected=(_product(x_NI, w_EIO, tiles).add_(_product(mid_NR, b_ERO, tiles)),),
    )


def _shrink_job(key: Key, shape: ShrinkShape, batch: Batch, tiles: Tiles, row_slot_N: Tensor) -> Job:
    a_EIR = _matrices(key, batch.num_experts, shape.width, shape.rank, is_turned=shape.is_k_contiguous)
    if not shape.is_gathered:
        x_NI = _normal(key, batch.num_rows, shape.width)
        return Job(
            run=lambda config: (shrink.shrink(x_NI, a_EIR.mT, tiles, config),), expected=(_product(x_NI, a_EIR, tiles),)
        )
    x_TI = _normal(key, batch.num_tokens, shape.width)
    x_NI = x_TI.index_select(0, row_slot_N // batch.top_k)
    return Job(
        run=lambda config: shrink.gather_shrink(x_TI, a_EIR.mT, tiles, row_slot_N, batch.top_k, config),
        expected=(x_NI.float(), _product(x_NI, a_EIR, tiles)),
    )


def _normal(key: Key, *shape: int) -> Tensor:
    return torch.randn(shape, device=key.device, dtype=key.dtype)


def _matrices(key: Key, num_experts: int, width_in: int, width_out: int, *, is_turned: bool) -> Tensor:
    """`(E, I, O)`, of such size that a product keeps the size of its rows; `is_turned` lies as `(E, O, I)`."""
    shape = (num_experts, width_out, width_in) if is_turned else (num_experts, width_in, width_out)
    matrices = _normal(key, *shape).mul_(width_in**-0.5)
    return matrices.mT if is_turned else matrices


def _product(x_NI: Tensor, w_EIO: Tensor, tiles: Tiles) -> Tensor:
    """`y_NO` in float32, one expert after another."""
    y_NO = x_NI.new_empty((x_NI.shape[0], w_EIO.shape[2]), dtype=torch.float32)
    start = 0
    for w_IO, end in zip(w_EIO, tiles.ends_E.tolist(), strict=True):
        torch.mm(x_NI[start:end].float(), w_IO.float(), out=y_NO[start:end])
        start = end
    return y_NO
