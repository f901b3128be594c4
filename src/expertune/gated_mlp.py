"""A dense gated MLP as one node of autograd: `down(act(gate(x)) · up(x))`, each linear with Split LoRA or without.

Written with torch's own operations, an MLP keeps four tensors of its inner width between forward and backward, and
walks twice as many in backward. Here `h = [gate(x) | up(x)]` is kept alone, as the walk does for experts: backward
needs the inner activation only for a gradient of the last factor, and computes it again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.activations import Gate
from expertune.kernels import has_triton
from expertune.shapes import LoraFactors


class Linear(NamedTuple):
    """A frozen linear, with an adapter that is trained or without.

    Args:
        weight_OI: frozen.
        bias_O: frozen, or None.
        adapter: factors `(R, I)` and `(O, R)`, or None.
    """

    weight_OI: Tensor
    bias_O: Tensor | None = None
    adapter: LoraFactors | None = None


def gated_mlp(x: Tensor, gate: Gate, linears: tuple[Linear, Linear, Linear]) -> Tensor:
    """`down(act(gate(x)) · up(x))`, `(…, O)` in the dtype of the weights.

    Args:
        x: `(…, I)`, in the dtype of the weights, which under autocast is autocast's.
        gate: of two halves side by side.
        linears: gate, up and down, all of one dtype. Factors are cast to it, and receive gradients.
    """
    tensors, scales = [], []
    for linear in linears:
        adapter = linear.adapter
        tensors += [linear.weight_OI, linear.bias_O, *((None, None) if adapter is None else (adapter.a, adapter.b))]
        scales.append(1.0 if adapter is None else adapter.scale)
    return _GatedMlp.apply(gate, tuple(scales), x, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Part(NamedTuple):
    """One of the three linears during a pass, its factors in the dtype of the weight."""

    weight_OI: Tensor
    a_RI: Tensor | None
    b_OR: Tensor | None
    scale: float

    def forward(self, x_NI: Tensor, bias_O: Tensor | None, out_NO: Tensor) -> Tensor | None:
        """Fill `out_NO`, and give `x_NI a_RIᵀ`."""
        if bias_O is None:
            torch.mm(x_NI, self.weight_OI.mT, out=out_NO)
        else:
            torch.addmm(bias_O, x_NI, self.weight_OI.mT, out=out_NO)
        if self.a_RI is None or self.b_OR is None:
            return None
        mid_NR = x_NI @ self.a_RI.mT
        out_NO.addmm_(mid_NR, self.b_OR.mT, alpha=self.scale)
        return mid_NR

    def dmid(self, dy_NO: Tensor) -> Tensor | None:
        """The gradient of `x_NI a_RIᵀ`."""
        return None if self.b_OR is None else (dy_NO @ self.b_OR).mul_(self.scale)

    def input_grad(self, dy_NO: Tensor, dmid_NR: Tensor | None, out_NI: Tensor | None = None) -> Tensor:
        """`dx_NI`, added to `out_NI` if that is given."""
        dx_NI = dy_NO @ self.weight_OI if out_NI is None else out_NI.addmm_(dy_NO, self.weight_OI)
        return dx_NI if self.a_RI is None or dmid_NR is None else dx_NI.addmm_(dmid_NR, self.a_RI)


class _GatedMlp(torch.autograd.Function):
    """Arguments: gate, scales, x, then weight, bias, `a` and `b` of each of the three linears."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, scales: tuple[float, ...], x: Tensor, *tensors: Tensor | None) -> Tensor:
        weights, biases, factors = tensors[::4], tensors[1::4], list(zip(tensors[2::4], tensors[3::4], strict=True))
        dtype, x_NI = x.dtype, x.reshape(-1, x.shape[-1])
        cast = [None if factor is None else factor.to(dtype) for pair in factors for factor in pair]
        parts = _parts(weights, cast, scales)
        inner, width = parts[0].weight_OI.shape[0], parts[2].weight_OI.shape[0]
        h_NG = x_NI.new_empty((len(x_NI), 2 * inner))
        y_NO = x_NI.new_empty((len(x_NI), width))
        halves = zip(parts, biases, h_NG.chunk(2, dim=1), strict=False)  # of gate and up
        mids = [part.forward(x_NI, bias, half) for part, bias, half in halves]
        mids.append(parts[2].forward(_forward(gate, h_NG), biases[2], y_NO))
        ctx.save_for_backward(x_NI, h_NG, *mids, *weights, *cast)
        ctx.gate, ctx.scales, ctx.shape = gate, scales, x.shape
        ctx.dtypes = [None if factor is None else factor.dtype for pair in factors for factor in pair]
        return y_NO.view(*x.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NG, *rest = ctx.saved_tensors
        mids, weights, cast = rest[:3], rest[3:6], rest[6:]
        parts = _parts(weights, cast, ctx.scales)
        _, _, wants_x, *wants = ctx.needs_input_grad
        dy_NO = dy.reshape(-1, dy.shape[-1])

        dmid_NR = parts[2].dmid(dy_NO)
        a_NF, dh_NG = _backward(ctx.gate, h_NG, parts[2].input_grad(dy_NO, dmid_NR))
        of_down = _factor_grads(parts[2], a_NF, dy_NO, mids[2], dmid_NR)
        del a_NF
        dx_NI, grads = None, []
        for part, mid_NR, dh_NF in zip(parts, mids, dh_NG.chunk(2, dim=1), strict=False):
            dmid_NR = part.dmid(dh_NF)
            if wants_x:
                dx_NI = part.input_grad(dh_NF, dmid_NR, dx_NI)
            grads += _factor_grads(part, x_NI, dh_NF, mid_NR, dmid_NR)
        results: list[Tensor | None] = []
        for i, grad in enumerate([*grads, *of_down]):
            if i % 2 == 0:
                results += [None, None]  # weight and bias
            results.append(grad.to(ctx.dtypes[i]) if grad is not None and wants[len(results)] else None)
        return (None, None, None if dx_NI is None else dx_NI.view(ctx.shape), *results)


def _parts(weights: Any, factors: Any, scales: tuple[float, ...]) -> list[_Part]:
    return [_Part(*each) for each in zip(weights, factors[::2], factors[1::2], scales, strict=True)]


def _factor_grads(
    part: _Part, x_NI: Tensor, dy_NO: Tensor, mid_NR: Tensor | None, dmid_NR: Tensor | None
) -> list[Tensor | None]:
    """Of `a` and `b`."""
    if mid_NR is None or dmid_NR is None:
        return [None, None]
    return [dmid_NR.mT @ x_NI, (dy_NO.mT @ mid_NR).mul_(part.scale)]


def _forward(gate: Gate, h_NG: Tensor) -> Tensor:
    """`a_NF`."""
    if not _has_kernel(h_NG):
        return gate.forward(h_NG)
    from expertune.backends.triton_steps import gate_kernel  # imports Triton, which is optional
    from expertune.kernels.gates import gate_forward

    kernel = gate_kernel(gate)
    return gate.forward(h_NG) if kernel is None else gate_forward(h_NG, kernel)


def _backward(gate: Gate, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
    """`a_NF` and `dh_NG`, which may come to lie where `da_NF` and `h_NG` lay."""
    if not _has_kernel(h_NG):
        return gate.backward(h_NG, da_NF)
    from expertune.backends.triton_steps import gate_kernel
    from expertune.kernels.gates import plain_gate_backward

    kernel = gate_kernel(gate)
    if kernel is None:
        return gate.backward(h_NG, da_NF)
    is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
    return plain_gate_backward(h_NG, da_NF, kernel, overwrites=is_last)


def _has_kernel(h_NG: Tensor) -> bool:
    return h_NG.is_cuda and h_NG.dtype != torch.float64 and has_triton()
