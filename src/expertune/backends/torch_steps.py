"""The steps of the walk in plain torch, over two grouped products that the backends of this kind differ in."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertune import lora
from expertune import routing as rows
from expertune.activations import Gate
from expertune.backends.protocol import FactorSide, PackedFactors
from expertune.shapes import Dispatch, LoraFactors, Pass, Tensors
from expertune.weights.dense import DenseWeights


@dataclass(frozen=True, kw_only=True)
class TorchSteps:
    """Steps made of two products.

    Args:
        matmul: `(x_NI, w_EIO, ends_E) -> y_NO`, every row times the matrix of its own expert.
        outer_product: `(u_NO, v_NI, ends_E) -> (E, O, I)`, the sum over each expert's rows of `u ⊗ v`; zero for an
            expert without rows.
        adds_in_place: see `Steps`.
    """

    matmul: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer_product: Callable[[Tensor, Tensor, Tensor], Tensor]
    adds_in_place: bool = False

    def run(
        self,
        function: Pass,
        static: Hashable,
        inputs: Tensors,
        ahead: Pass | None = None,  # noqa: ARG002  torch brings its kernels built
    ) -> Tensors:
        assert inputs[0] is not None
        with torch.autocast(inputs[0].device.type, enabled=False):
            return function(static, inputs)

    def bind(self, function: Pass, static: Hashable, first: Tensors) -> Callable[[Tensors], Tensors]:
        return lambda others: self.run(function, static, (*first, *others))

    def dispatch(self, expert_TK: Tensor, num_experts: int) -> Dispatch:
        return rows.dispatch(expert_TK, num_experts)

    def pack(self, projections: Sequence[tuple[Sequence[LoraFactors], DenseWeights]]) -> list[PackedFactors | None]:
        return [
            PackedFactors(*lora.pack(adapters, weights.tensor.shape[0], weights.tensor.dtype)) if adapters else None
            for adapters, weights in projections
        ]

    def gather(self, x_TI: Tensor, a_ERI: Tensor | None, routing: Dispatch) -> tuple[Tensor, Tensor | None]:
        x_NI = x_TI.index_select(0, routing.row_token_N)
        return x_NI, None if a_ERI is None else self.shrink(x_NI, a_ERI, routing)

    def shrink(self, x_NI: Tensor, a_ERI: Tensor, routing: Dispatch) -> Tensor:
        return self.matmul(x_NI, a_ERI.mT, routing.ends_E)

    def linear(
        self,
        x_NI: Tensor,
        w_EIO: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias_EO: Tensor | None = None,
    ) -> Tensor:
        y_NO = self.matmul(x_NI, w_EIO, routing.ends_E)
        if low_rank is not None:
            y_NO.add_(self.matmul(*low_rank, routing.ends_E))
        if bias_EO is not None:
            y_NO.add_(bias_EO.to(y_NO.dtype).index_select(0, routing.row_expert_N))
        return y_NO

    def gated_linear(
        self,
        gate: Gate,
        x_NI: Tensor,
        w_EIO: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias_EO: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        h_NG = self.linear(x_NI, w_EIO, routing, low_rank=low_rank, bias_EO=bias_EO)
        return h_NG, gate.forward(h_NG)

    def linear_gate_backward(
        self,
        gate: Gate,
        dy_NI: Tensor,
        w_EIF: Tensor,
        h_NG: Tensor,
        weight_TK: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        overwrites: bool = False,  # noqa: ARG002  it may, it need not
    ) -> tuple[Tensor, Tensor, Tensor]:
        da_NF = self.linear(dy_NI, w_EIF, routing, low_rank=low_rank)
        return gate_backward(gate, h_NG, da_NF, weight_TK, routing)

    def combine(self, y_ND: Tensor, weight_TK: Tensor | None, routing: Dispatch) -> Tensor:
        if weight_TK is None:
            return rows.sum_rows(y_ND, routing.token_row_TK)
        return rows.combine(y_ND, weight_TK, routing.token_row_TK)

    def factor_grads(
        self,
        a: FactorSide,
        b: FactorSide,
        adapters: Sequence[LoraFactors],
        routing: Dispatch,
        sums: Tensors,
        weight_TK: Tensor | None = None,
    ) -> list[Tensor | None]:
        weight_N1 = None if weight_TK is None else routing.by_row(weight_TK).to(a.narrow_NR.dtype)
        wide_NI, narrow_NR = _by_row(a, routing, weight_N1)
        das = lora.unpack_a_grads(self.outer_product(narrow_NR, wide_NI, routing.ends_E), adapters)
        del wide_NI
        wide_NO, narrow_NR = _by_row(b, routing, weight_N1)
        dbs = lora.unpack_b_grads(self.outer_product(wide_NO, narrow_NR, routing.ends_E), adapters)
        return add_each(lora.alternate(das, dbs), sums)

    def outer(self, u_NO: Tensor, v_NI: Tensor, routing: Dispatch, total: Tensor | None = None) -> Tensor | None:
        return add_each([self.outer_product(u_NO, v_NI, routing.ends_E)], [total])[0]


def add_each(grads: Sequence[Tensor], sums: Tensors) -> list[Tensor | None]:
    """Add each gradient to its sum in place; those that have none are given, in their places."""
    left: list[Tensor | None] = []
    for grad, total in zip(grads, sums, strict=True):
        if total is not None:
            total.add_(grad)
        left.append(grad if total is None else None)
    return left


def gate_backward(
    gate: Gate, h_NG: Tensor, da_NF: Tensor, weight_TK: Tensor, routing: Dispatch
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_gate_backward` gives, from `da_NF`, which is overwritten; by the gate's own torch code."""
    a_NF, dh_NG = gate.backward(h_NG, da_NF * routing.by_row(weight_TK).to(da_NF.dtype))
    dweight_N = da_NF.mul_(a_NF).sum(-1, dtype=torch.promote_types(a_NF.dtype, torch.float32))
    return a_NF, dh_NG, dweight_N.index_select(0, routing.token_row_TK.reshape(-1)).view_as(weight_TK)


def _by_row(side: FactorSide, routing: Dispatch, weight_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both operands by row. The weight multiplies the narrow one: the cheaper."""
    wide = side.wide.index_select(0, routing.row_token_N) if side.by_token else side.wide
    return wide, side.narrow_NR if weight_N1 is None else side.narrow_NR * weight_N1
