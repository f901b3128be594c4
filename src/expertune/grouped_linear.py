"""The grouped linear with Split LoRA, as one pass of the walk sees it, over any backend's products."""

from typing import NamedTuple, cast

from torch import Tensor

from expertune import lora
from expertune.activations import Gate
from expertune.backends.protocol import PackedFactors, Steps
from expertune.shapes import Dispatch, LoraFactors
from expertune.weights.dense import DenseWeights


class GroupedLinear(NamedTuple):
    """A projection during one pass: rows times the weights of their experts, with Split LoRA, and the gradients."""

    steps: Steps
    routing: Dispatch
    weights: DenseWeights
    bias_EO: Tensor | None
    adapters: tuple[LoraFactors, ...]

    def gated(
        self, gate: Gate, x_NI: Tensor, packed: PackedFactors | None, mid_NR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`h_NG` and `a_NF`."""
        low_rank = _forward_terms(packed, mid_NR)
        w_EIO, bias_EO = self.weights.w_EIO, self.bias_EO
        return self.steps.gated_linear(gate, x_NI, w_EIO, self.routing, low_rank=low_rank, bias_EO=bias_EO)

    def forward(self, x_NI: Tensor, packed: PackedFactors | None, mid_NR: Tensor | None) -> Tensor:
        """`y_NO`."""
        low_rank = _forward_terms(packed, mid_NR)
        return self.steps.linear(x_NI, self.weights.w_EIO, self.routing, low_rank=low_rank, bias_EO=self.bias_EO)

    def input_grad(self, dy_NO: Tensor, packed: PackedFactors | None, dmid_NR: Tensor | None) -> Tensor:
        """`dx_NI`."""
        low_rank = _backward_terms(packed, dmid_NR)
        return self.steps.linear(dy_NO, self.weights.w_EOI, self.routing, low_rank=low_rank)

    def gate_backward(
        self,
        gate: Gate,
        dy_NO: Tensor,
        packed: PackedFactors | None,
        dmid_NR: Tensor | None,
        h_NG: Tensor,
        weight_TK: Tensor,
        *,
        overwrites: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward of the gate before it, from `input_grad`: see `Steps.linear_gate_backward`."""
        low_rank = _backward_terms(packed, dmid_NR)
        w_EOI, routing = self.weights.w_EOI, self.routing
        return self.steps.linear_gate_backward(
            gate, dy_NO, w_EOI, h_NG, weight_TK, routing, low_rank=low_rank, overwrites=overwrites
        )

    def weight_grad(self, dy_NO: Tensor, x_NI: Tensor, total: Tensor | None) -> Tensor | None:
        """`dW` in the host's layout, or None if it was added to `total`. Only called where the weight is trained."""
        u, v = (x_NI, dy_NO) if self.weights.is_transposed else (dy_NO, x_NI)
        return self.steps.outer(u, v, self.routing, total)

    def bias_grad(self, dy_NO: Tensor, weight_N1: Tensor | None) -> Tensor:
        """`(E, O)`: each expert's rows summed, as a product with a column so that the order is fixed."""
        column_N8 = dy_NO.new_ones((dy_NO.shape[0], lora.RANK_MULTIPLE))
        if weight_N1 is not None:
            column_N8.mul_(weight_N1)
        return cast(Tensor, self.steps.outer(dy_NO, column_N8, self.routing))[:, :, 0]

    def held(self, packed: PackedFactors | None) -> tuple[Tensor | None, Tensor | None]:
        """What of the packed factors is not memory of the adapter itself: `a_ERI` may be."""
        if packed is None:
            return None, None
        is_the_adapters = any(packed.a_ERI.data_ptr() == adapter.a.data_ptr() for adapter in self.adapters)
        return None if is_the_adapters else packed.a_ERI, packed.b_EOR

    def packed(self, a_ERI: Tensor | None, b_EOR: Tensor | None) -> PackedFactors | None:
        """The packed factors, from what `held` gave of them."""
        if b_EOR is None:
            return None
        if a_ERI is None:
            num_experts, _, rank = b_EOR.shape
            a_ERI = self.adapters[0].a.view(num_experts, rank, -1)
        return PackedFactors(a_ERI, b_EOR)


def _forward_terms(packed: PackedFactors | None, mid_NR: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What is multiplied beside rows and weights: the mid and `b`, if there are adapters."""
    return None if packed is None or mid_NR is None else (mid_NR, packed.b_EOR.mT)


def _backward_terms(packed: PackedFactors | None, dmid_NR: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The same for the gradient of the rows: the gradient of the mid, and `a`."""
    return None if packed is None or dmid_NR is None else (dmid_NR, packed.a_ERI)


def pack(first: GroupedLinear, second: GroupedLinear) -> list[PackedFactors | None]:
    """The adapters of both, joined."""
    return first.steps.pack([(first.adapters, first.weights), (second.adapters, second.weights)])
