"""The walk of a long batch in tiles of tokens: what one layer's experts take grows with the tile, not with the context.

Forward walks one tile after another and keeps `x_TD`, the router's weights and the sorted choice of each tile:
`2D + 16K` bytes a token in 16 bits. Backward walks each tile again, up to the gate, and then back, in the same order,
and sums what the tiles give to base weights, biases and factors. So `h_NG`, `x_ND`, `y_ND` and their gradients are
those of one tile. The price is a second pass of gate_up, which a checkpointed layer would make anyway when it runs
again: there the tiled walk itself is left out. Tiles of a sequence are the idea of ALST (Bekman et al. 2025).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import accumulate
from expertune.experts import kept, run_backward, run_forward
from expertune.shapes import Dispatch, ExpertsLayout, Tensors
from expertune.walk import ExpertsStep, Projection, Walk, flatten

_BASE_WEIGHTS = (0, 2)  # places of `w1` and `w2` among these, the biases and the factors
_ALIGNED_TOKENS = 8  # a tile then starts at a multiple of 16 bytes in every tensor, which noted launches count on


@dataclass(frozen=True, kw_only=True)
class TokenTiles:
    """How long a tile is, at least. A batch of less than two is walked whole.

    Args:
        least_tokens: of a tile.
        least_rows: of a tile and expert, on average. Each tile reads the weights of all experts once more: by `r` rows
            of an expert, a weight of two bytes is used for `2r` operations, and an H100 makes 300 while it reads one.
    """

    least_tokens: int = 8192
    least_rows: int = 512

    def length(self, num_tokens: int, top_k: int, layout: ExpertsLayout) -> int:
        """Tokens of every tile but the last, which may be shorter; `num_tokens` where there is but one."""
        return _even(num_tokens, max(self.least_tokens, -(-self.least_rows * layout.num_experts // max(top_k, 1))))

    def dense_length(self, num_tokens: int) -> int:
        """The same for a layer whose weights all tokens read."""
        return _even(num_tokens, self.least_tokens)

    def cuts(self, expert_TK: Tensor, layout: ExpertsLayout) -> bool:
        """Whether a batch is walked in more than one tile."""
        num_tokens, top_k = expert_TK.shape
        return self.length(num_tokens, top_k, layout) < num_tokens

    def dispatch(self, expert_TK: Tensor, step: ExpertsStep) -> tuple[Dispatch, ...]:
        """The rows of each tile, sorted by expert."""
        num_tokens, top_k = expert_TK.shape
        tiles = torch.split(expert_TK, self.length(num_tokens, top_k, step.layout))
        return tuple(step.dispatch(tile_TK) for tile_TK in tiles)


def _even(num_tokens: int, least: int) -> int:
    """Tokens of tiles of one length, at least so many."""
    if num_tokens < 2 * least:
        return num_tokens
    even = -(-num_tokens // (num_tokens // least))
    return -(-even // _ALIGNED_TOKENS) * _ALIGNED_TOKENS


def experts(
    x_TD: Tensor,
    routings: Sequence[Dispatch],
    weight_TK: Tensor,
    projections: tuple[Projection, Projection],
    step: ExpertsStep,
    *,
    leaves_out: bool = False,
) -> Tensor:
    """`experts.experts`, tile by tile: the same output and gradients, within rounding.

    The gradients of factors and biases are summed over tiles in float32 or wider; those of base weights in their own
    dtype, as autograd sums them over micro batches: another copy of all experts would be as dear as a tile.

    Args:
        x_TD: the tokens; cast to the dtype of the base weights.
        routings: the rows of each tile, by `TokenTiles.dispatch`.
        weight_TK: the router's weights.
        projections: gate_up (or up) and down.
        step: layout, gate and backend.
        leaves_out: yield zeros, with the right gradient. Then nothing is walked before backward.
    """
    tensors, scales = flatten(projections)
    walks = tuple(Walk(step=step, scales=scales, routing=routing.shape) for routing in routings)
    words = [routing.words for routing in routings]
    out_TD = _TiledFunction.apply(  # type: ignore[no-untyped-call]
        walks, leaves_out, x_TD.to(projections[0].weight.dtype), weight_TK, *words, *tensors
    )
    return cast(Tensor, out_TD).to(x_TD.dtype)


class _TiledFunction(torch.autograd.Function):
    """Arguments: walks, whether the output is left out, x, weight, the words of each tile, then as for the walk."""

    @staticmethod
    def forward(
        ctx: Any, walks: tuple[Walk, ...], leaves_out: bool, x_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        weight_TK = weight_TK.contiguous()
        _, _, wants_x, wants_weight, *wants = ctx.needs_input_grad
        ctx.walks = tuple(walk._replace(wants=(wants_x, wants_weight, *wants[len(walks) :])) for walk in walks)
        ctx.save_for_backward(x_TD, weight_TK, *tensors)
        if leaves_out:
            return torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
        out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        for walk, tile, of_tile in _tiles(walks, tensors):
            out_TD[tile] = cast(Tensor, run_forward(walk, x_TD[tile], weight_TK[tile], of_tile)[0])
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, *tensors = ctx.saved_tensors
        walks: tuple[Walk, ...] = ctx.walks
        wants_x, wants_weight, *_ = walks[0].wants
        dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if wants_x else None
        dweight_TK = torch.empty_like(weight_TK) if wants_weight else None
        sums: list[Tensor | None] = [None] * len(tensors[len(walks) :])
        for walk, tile, of_tile in _tiles(walks, tensors):
            dx, dweight, *others = _walk_back(walk, dout_TD[tile], x_TD[tile], weight_TK[tile], of_tile, sums)
            if dx_TD is not None:
                dx_TD[tile] = cast(Tensor, dx)
            if dweight_TK is not None:
                dweight_TK[tile] = cast(Tensor, dweight)
            sums = [
                accumulate.plus(total, grad, widens=place not in _BASE_WEIGHTS)
                for place, (total, grad) in enumerate(zip(sums, others, strict=True))
            ]
            del dx, dweight, others
        grads = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, tensors[len(walks) :], strict=True)
        ]
        return (None, None, dx_TD, dweight_TK, *[None] * len(walks), *grads)


def _tiles(walks: tuple[Walk, ...], tensors: Tensors) -> Iterator[tuple[Walk, slice, Tensors]]:
    """Each tile: its walk, its tokens, and its words before the tensors that all share."""
    start, shared = 0, tensors[len(walks) :]
    for walk, words in zip(walks, tensors, strict=False):
        stop = start + walk.routing.num_tokens
        yield walk, slice(start, stop), (words, *shared)
        start = stop


def _walk_back(
    walk: Walk, dout_TD: Tensor, x_TD: Tensor, weight_TK: Tensor, tensors: Tensors, sums: Sequence[Tensor | None]
) -> Tensors:
    """The gradients of one tile, as `run_backward` gives them; it is walked once more for what they need."""
    walk = walk._replace(keeps_packed=True)
    _, *made = run_forward(walk._replace(leaves_out=True), x_TD, weight_TK, tensors)
    saved = kept(walk, x_TD, weight_TK, made, tensors)
    del made
    return run_backward(walk._replace(overwrites=True), dout_TD, saved, sums)
