"""A dense gated MLP as one node of autograd: `down(act(gate(x)) · up(x))`, each linear with Split LoRA or without.

Written with torch's own operations, an MLP keeps four tensors of its inner width between forward and backward, and
walks twice as many in backward. Here `h = [gate(x) | up(x)]` is kept alone, as the walk does for experts: backward
needs the inner activation only for a gradient of the last factor, and computes it again.
"""

from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import accumulate, kernels, prepare
from expertune.activations import Gate
from expertune.split_linear import Linear, SplitLinear


def gated_mlp(x: Tensor, gate: Gate, linears: tuple[Linear, Linear, Linear], tile: int | None = None) -> Tensor:
    """`down(act(gate(x)) · up(x))`, `(…, O)` in the dtype of the weights.

    Args:
        x: `(…, I)`, in the dtype of the weights, which under autocast is autocast's.
        gate: of two halves side by side.
        linears: gate, up and down, all of one dtype. Factors are cast to it, and receive gradients.
        tile: tokens that are computed at a time, of a batch of more: then nothing but `x` is kept for backward, which
            computes `h` of one tile after another again, and sums their gradients in float32 or wider.
    """
    tensors, scales = [], []
    for linear in linears:
        adapter = linear.adapter
        tensors += [linear.weight_OI, linear.bias_O, *((None, None) if adapter is None else (adapter.a, adapter.b))]
        scales.append(1.0 if adapter is None else adapter.scale)
    return _GatedMlp.apply(gate, tuple(scales), tile, x, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Parts(NamedTuple):
    """All three."""

    gate: SplitLinear
    up: SplitLinear
    down: SplitLinear

    @classmethod
    def of(cls, tensors: Any, scales: tuple[float, ...], dtypes: tuple[Any, ...]) -> "_Parts":
        """From weight, bias, `a` and `b` of each, and the dtypes of the factors themselves."""
        each = zip(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], scales, dtypes, strict=True)
        gate, up, down = (SplitLinear(*part) for part in each)
        return cls(gate, up, down)

    def first(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`h_NG`, and the mids of gate and up."""
        h_NG = x_NI.new_empty((len(x_NI), 2 * len(self.gate.weight_OI)))
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        return h_NG, self.gate.forward(x_NI, gate_NF), self.up.forward(x_NI, up_NF)


class _GatedMlp(torch.autograd.Function):
    """Arguments: gate, scales, tile, x, then weight, bias, `a` and `b` of each of the three linears."""

    @staticmethod
    def forward(
        ctx: Any, gate: Gate, scales: tuple[float, ...], tile: int | None, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        factors = prepare.cast([*tensors[2::4], *tensors[3::4]], x.dtype)
        each = zip(tensors[::4], tensors[1::4], factors[:3], factors[3:], strict=True)
        narrow = [*chain.from_iterable(each)]
        all_dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        dtypes = tuple(zip(all_dtypes[2::4], all_dtypes[3::4], strict=True))
        parts = _Parts.of(narrow, scales, dtypes)
        y_NO = x_NI.new_empty((len(x_NI), len(parts.down.weight_OI)))
        ctx.tile = tile if tile is not None and tile < len(x_NI) else None
        kept: list[Tensor | None] = [None] * 4
        for tile_NI, tile_NO in zip(_tiles(x_NI, ctx.tile), _tiles(y_NO, ctx.tile), strict=True):
            h_NG, *mids = parts.first(tile_NI)
            made = [h_NG, *mids, parts.down.forward(_forward(gate, h_NG), tile_NO)]
            if ctx.tile is None:
                kept = made
        ctx.save_for_backward(x_NI, *kept, *narrow)
        ctx.gate, ctx.scales, ctx.dtypes, ctx.shape = gate, scales, dtypes, x.shape
        return y_NO.view(*x.shape[:-1], y_NO.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *rest = ctx.saved_tensors
        parts = _Parts.of(rest[4:], ctx.scales, ctx.dtypes)
        _, _, _, wants_x, *wants = ctx.needs_input_grad
        dy_NO = dy.reshape(-1, dy.shape[-1])
        if ctx.tile is None:
            dx_NI, *sums = _walk_back(ctx.gate, parts, x_NI, dy_NO, rest[:4], wants_x=wants_x)
        else:
            dx_NI, *sums = _walk_tiles_back(ctx.gate, parts, x_NI, dy_NO, ctx.tile, wants_x=wants_x)
        results: list[Tensor | None] = [None] * len(wants)
        for place, total, dtype in zip((2, 3, 6, 7, 10, 11), sums, chain.from_iterable(ctx.dtypes), strict=True):
            if total is not None and wants[place]:
                results[place] = total.to(dtype)
        return (None, None, None, None if dx_NI is None else dx_NI.view(ctx.shape), *results)


def _tiles(x: Tensor, tile: int | None) -> tuple[Tensor, ...]:
    return (x,) if tile is None else torch.split(x, tile)


def _walk_back(
    gate: Gate, parts: _Parts, x_NI: Tensor, dy_NO: Tensor, kept: Any, *, wants_x: bool
) -> list[Tensor | None]:
    """The gradient of `x`, then of `a` and `b` of each linear.

    `kept` is `h_NG` and the three mids; that of down may be None, and is computed.
    """
    h_NG, gate_mid, up_mid, down_mid = kept
    dmid_NR = parts.down.dmid(dy_NO)
    a_NF, dh_NG = _backward(gate, h_NG, parts.down.input_grad(dy_NO, dmid_NR))
    down_mid = parts.down.mid(a_NF) if down_mid is None else down_mid
    of_down = [parts.down.a_grad(a_NF, dmid_NR), parts.down.b_grad(dy_NO, down_mid)]
    del a_NF, h_NG
    dx_NI: Tensor | None = None
    grads: list[Tensor | None] = []
    halves = dh_NG.chunk(2, dim=1)
    for part, dh_NF, mid_NR in ((parts.gate, halves[0], gate_mid), (parts.up, halves[1], up_mid)):
        dmid_NR = part.dmid(dh_NF)
        if wants_x:
            dx_NI = part.input_grad(dh_NF, dmid_NR, dx_NI)
        grads += [part.a_grad(x_NI, dmid_NR), part.b_grad(dh_NF, mid_NR)]
    return [dx_NI, *grads, *of_down]


def _walk_tiles_back(
    gate: Gate, parts: _Parts, x_NI: Tensor, dy_NO: Tensor, tile: int, *, wants_x: bool
) -> list[Tensor | None]:
    """The same of all tiles, each with `h` computed again."""
    dx_NI = torch.empty_like(x_NI) if wants_x else None
    sums: list[Tensor | None] = [None] * 6
    for i, (tile_NI, tile_NO) in enumerate(zip(_tiles(x_NI, tile), _tiles(dy_NO, tile), strict=True)):
        kept = [*parts.first(tile_NI), None]
        dx, *grads = _walk_back(gate, parts, tile_NI, tile_NO, kept, wants_x=wants_x)
        if dx_NI is not None:
            dx_NI[i * tile : (i + 1) * tile] = cast(Tensor, dx)
        sums = [accumulate.plus(total, grad) for total, grad in zip(sums, grads, strict=True)]
    return [dx_NI, *sums]


def _forward(gate: Gate, h_NG: Tensor) -> Tensor:
    """`a_NF`."""
    if (kernel := _kernel(gate, h_NG)) is None:
        return gate.forward(h_NG)
    from expertune.kernels.gates import gate_forward  # imports Triton, which is optional

    return gate_forward(h_NG, kernel)


def _backward(gate: Gate, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
    """`a_NF` and `dh_NG`, which may come to lie where `da_NF` and `h_NG` lay."""
    if (kernel := _kernel(gate, h_NG)) is None:
        return gate.backward(h_NG, da_NF)
    from expertune.kernels.gates import plain_gate_backward

    is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
    return plain_gate_backward(h_NG, da_NF, kernel, overwrites=is_last)


def _kernel(gate: Gate, h_NG: Tensor) -> Any:
    """Our device code, where it runs and knows the gate; else None."""
    if not kernels.computes(h_NG):
        return None
    from expertune.backends.triton_steps import gate_kernel

    return gate_kernel(gate)
