"""The steps of the walk on our Triton kernels. On Hopper the grouped linear is the Gluon kernel, elsewhere its twin."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertune import lora
from expertune.activations import ClampedSwiGlu, Gate, GeGlu, SwiGlu
from expertune.backends import torch_steps
from expertune.backends.protocol import PackedFactors
from expertune.kernels import combine, gates, linear, linear_hopper, outer, routing, shrink, turn
from expertune.kernels.device import is_hopper, tile_rows
from expertune.routing import Dispatch
from expertune.shapes import LoraFactors, Tiles
from expertune.weights.dense import DenseWeights


@dataclass(frozen=True)
class TritonSteps:
    """Stateless: every step is a launch or two."""

    def dispatch(self, expert_TK: Tensor, num_experts: int) -> Dispatch:
        rows = tile_rows(expert_TK.device)
        placed = routing.sort_by_expert(expert_TK, num_experts, rows)
        row_slot_N, row_expert_N, slot_row_N, ends_E, expert, row, count = placed
        return Dispatch(
            row_slot_N=row_slot_N,
            row_expert_N=row_expert_N,
            token_row_TK=slot_row_N.view(expert_TK.shape),
            ends_E=ends_E,
            tiles=Tiles(rows=rows, expert=expert, row=row, count=count, ends_E=ends_E),
        )

    def pack(self, adapters: Sequence[LoraFactors], weights: DenseWeights) -> PackedFactors:
        num_experts, dtype = weights.tensor.shape[0], weights.tensor.dtype
        if not _is_simple(adapters, num_experts):
            a_ERI, b_EOR = lora.pack(adapters, num_experts, dtype)
        else:
            (adapter,) = adapters
            a_ERI, b_EOR = adapter.a.view(num_experts, -1, adapter.a.shape[1]).to(dtype), _packed_b(adapter, weights)
        if (
            weights.is_transposed
        ):  # factors lie along the same dimension as the weights beside which they are multiplied
            a_ERI, b_EOR = a_ERI.mT.contiguous().mT, b_EOR.mT.contiguous().mT
        return PackedFactors(a_ERI, b_EOR)

    def gather(self, x_TI: Tensor, a_ERI: Tensor | None, routing: Dispatch) -> tuple[Tensor, Tensor | None]:
        if a_ERI is None:
            return x_TI.index_select(0, routing.row_token_N), None
        return shrink.gather_shrink(x_TI.contiguous(), a_ERI, _tiles(routing), routing.row_slot_N, routing.top_k)

    def shrink(self, x_NI: Tensor, a_ERI: Tensor, routing: Dispatch) -> Tensor:
        return shrink.shrink(x_NI, a_ERI, _tiles(routing))

    def linear(
        self,
        x_NI: Tensor,
        w_EIO: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias_EO: Tensor | None = None,
    ) -> Tensor:
        mid_NR, b_ERO = low_rank or (None, None)
        runs_on_hopper = is_hopper(x_NI.device) and x_NI.dtype != torch.float32
        multiply = linear_hopper.linear if runs_on_hopper else linear.linear
        return multiply(x_NI, w_EIO, _tiles(routing), mid_NR=mid_NR, b_ERO=b_ERO, bias_EO=bias_EO)

    def gate_forward(self, gate: Gate, h_NG: Tensor) -> Tensor:
        kernel = _gate_kernel(gate)
        return gate.forward(h_NG) if kernel is None else gates.gate_forward(h_NG, kernel)

    def gate_backward(
        self, gate: Gate, h_NG: Tensor, da_NF: Tensor, weight_TK: Tensor, routing: Dispatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (kernel := _gate_kernel(gate)) is None:
            return torch_steps.gate_backward(gate, h_NG, da_NF, weight_TK, routing)
        return gates.gate_backward(h_NG, da_NF, weight_TK, routing.row_slot_N, kernel)

    def combine(self, y_ND: Tensor, weight_TK: Tensor | None, routing: Dispatch) -> Tensor:
        return combine.combine(y_ND, routing.token_row_TK, None if weight_TK is None else weight_TK.contiguous())

    def a_grads(
        self,
        x: Tensor,
        dmid_NR: Tensor,
        adapters: Sequence[LoraFactors],
        routing: Dispatch,
        weight_TK: Tensor | None = None,
        *,
        by_token: bool = False,
    ) -> list[Tensor]:
        num_experts = routing.ends_E.shape[0]
        shape = (num_experts, dmid_NR.shape[1], x.shape[1])
        da_ERI = x.new_empty(shape, dtype=adapters[0].a.dtype)
        self._sum(x, dmid_NR, routing, weight_TK, by_token, da_ERI)
        return lora.unpack_a_grads(da_ERI, adapters)

    def b_grads(
        self,
        dy: Tensor,
        mid_NR: Tensor,
        adapters: Sequence[LoraFactors],
        routing: Dispatch,
        weight_TK: Tensor | None = None,
        *,
        by_token: bool = False,
    ) -> list[Tensor]:
        num_experts, width = routing.ends_E.shape[0], dy.shape[1]
        db_EOR = dy.new_empty((num_experts, width, mid_NR.shape[1]), dtype=adapters[0].b.dtype)
        self._sum(dy, mid_NR, routing, weight_TK, by_token, db_EOR.mT)
        if not _is_simple(adapters, num_experts):
            return lora.unpack_b_grads(db_EOR, adapters)
        # written to PEFT's layout at once, every element would be a memory transaction of its own: 4 times the time
        (adapter,) = adapters
        db = torch.empty_like(adapter.b, memory_format=torch.contiguous_format)
        turn.turn(db_EOR.view(num_experts, -1), db.view(-1, num_experts).T, adapter.scale)
        return [db]

    def outer(self, u_NO: Tensor, v_NI: Tensor, routing: Dispatch) -> Tensor:
        out_EOI = u_NO.new_empty((routing.ends_E.shape[0], u_NO.shape[1], v_NI.shape[1]))
        outer.outer(v_NI, u_NO.contiguous(), routing.ends_E, out_EOI)
        return out_EOI

    def _sum(
        self,
        wide: Tensor,
        narrow_NR: Tensor,
        routing: Dispatch,
        weight_TK: Tensor | None,
        by_token: bool,
        out_ERI: Tensor,
    ) -> None:
        outer.outer(
            wide.contiguous(),
            narrow_NR,
            routing.ends_E,
            out_ERI,
            weight_TK=weight_TK,
            row_slot_N=routing.row_slot_N,
            by_token=routing.top_k if by_token else 0,
        )


STEPS = TritonSteps()


def _is_simple(adapters: Sequence[LoraFactors], num_experts: int) -> bool:
    """One adapter of a rank that needs no padding: its factors go to and from the kernels without a detour."""
    return len(adapters) == 1 and adapters[0].a.shape[0] // num_experts == lora.joined_rank(adapters, num_experts)


def _packed_b(adapter: LoraFactors, weights: DenseWeights) -> Tensor:
    """`scale · b_EOR`: in PEFT's layout a transposed matrix of `O·R` rows and `E` columns."""
    num_experts, width = weights.tensor.shape[0], adapter.b.shape[0]
    b_EOR = adapter.b.new_empty((num_experts, width, adapter.b.shape[1] // num_experts), dtype=weights.tensor.dtype)
    turn.turn(adapter.b.view(-1, num_experts), b_EOR.view(num_experts, -1).T, adapter.scale)
    return b_EOR


def _tiles(routing: Dispatch) -> Tiles:
    assert routing.tiles is not None
    return routing.tiles


def _gate_kernel(gate: Gate) -> gates.GateKernel | None:
    """Our device code for a gate, or None where only the host's own function knows it."""
    if isinstance(gate, SwiGlu):
        return gates.GateKernel(*gates.SILU, is_concatenated=gate.is_concatenated)
    if isinstance(gate, GeGlu):
        functions = gates.GELU if gate.approximate == "none" else gates.GELU_TANH
        return gates.GateKernel(*functions, is_concatenated=gate.is_concatenated)
    if isinstance(gate, ClampedSwiGlu):
        return gates.GateKernel(
            *gates.CLAMPED, is_concatenated=gate.is_concatenated, alpha=gate.alpha, limit=gate.limit
        )
    return None
