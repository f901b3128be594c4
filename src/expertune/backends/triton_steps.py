"""The steps of the walk on our Triton kernels. On Hopper the grouped linear is the Gluon kernel, elsewhere its twin."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from expertune import lora
from expertune.activations import ClampedSwiGlu, Gate, GeGlu, ReluSquared, SwiGlu
from expertune.backends import grouped_mm, torch_steps
from expertune.backends.protocol import FactorSide, PackedFactors
from expertune.kernels import combine, gates, linear, linear_hopper, outer, repack, routing, shrink
from expertune.kernels.device import is_hopper, tile_rows
from expertune.kernels.program import Bound, Programs
from expertune.kernels.repack import Job
from expertune.shapes import Dispatch, LoraFactors, Pass, RoutingShape, Tensors
from expertune.weights.dense import DenseWeights

_LEAST_WIDTH = 128  # of both sides of a product that torch's kernel is taken for
_programs = Programs()


@dataclass(frozen=True)
class TritonSteps:
    """Stateless: every step is a launch or two. What a pass launches is noted once a shape."""

    adds_in_place: bool = True

    def run(self, function: Pass, static: Hashable, inputs: Tensors, ahead: Pass | None = None) -> Tensors:
        return _programs.run(function, static, inputs, ahead)

    def bind(self, function: Pass, static: Hashable, first: Tensors) -> Callable[[Tensors], Tensors]:
        return Bound(_programs, function, static, first)

    def dispatch(self, expert_TK: Tensor, num_experts: int) -> Dispatch:
        shape = RoutingShape.of(expert_TK, num_experts, tile_rows(expert_TK.device))
        (words,) = self.run(_sort, shape, (expert_TK.contiguous(),))
        return Dispatch(shape, cast(Tensor, words))

    def pack(self, projections: Sequence[tuple[Sequence[LoraFactors], DenseWeights]]) -> list[PackedFactors | None]:
        jobs: list[Job] = []
        packed = [_pack(adapters, weights, jobs) if adapters else None for adapters, weights in projections]
        repack.repack(jobs)
        return packed

    def gather(self, x_TI: Tensor, a_ERI: Tensor | None, routing: Dispatch) -> tuple[Tensor, Tensor | None]:
        if a_ERI is None:
            return x_TI.index_select(0, routing.row_token_N), None
        return shrink.gather_shrink(x_TI.contiguous(), a_ERI, routing.tiles, routing.row_slot_N, routing.top_k)

    def shrink(self, x_NI: Tensor, a_ERI: Tensor, routing: Dispatch) -> Tensor:
        return shrink.shrink(x_NI, a_ERI, routing.tiles)

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
        tiles = routing.tiles
        if _runs_on_hopper(x_NI):
            return linear_hopper.linear(x_NI, w_EIO, tiles, mid_NR=mid_NR, b_ERO=b_ERO, bias_EO=bias_EO)[0]
        return linear.linear(x_NI, w_EIO, tiles, mid_NR=mid_NR, b_ERO=b_ERO, bias_EO=bias_EO)

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
        kernel = gate_kernel(gate)
        if kernel is not None and _runs_on_hopper(x_NI) and linear_hopper.fuses(kernel, w_EIO):
            mid_NR, b_ERO = low_rank or (None, None)
            return linear_hopper.linear(
                x_NI, w_EIO, routing.tiles, mid_NR=mid_NR, b_ERO=b_ERO, bias_EO=bias_EO, gate=kernel
            )
        h_NG = self.linear(x_NI, w_EIO, routing, low_rank=low_rank, bias_EO=bias_EO)
        return h_NG, self.gate_forward(gate, h_NG)

    def gate_forward(self, gate: Gate, h_NG: Tensor) -> Tensor:
        kernel = gate_kernel(gate)
        return gate.forward(h_NG) if kernel is None else gates.gate_forward(h_NG, kernel)

    def gate_backward(
        self,
        gate: Gate,
        h_NG: Tensor,
        da_NF: Tensor,
        weight_TK: Tensor,
        routing: Dispatch,
        *,
        overwrites: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `linear_gate_backward` gives, from `da_NF`, which is overwritten."""
        if (kernel := gate_kernel(gate)) is None:
            return torch_steps.gate_backward(gate, h_NG, da_NF, weight_TK, routing)
        return gates.gate_backward(h_NG, da_NF, weight_TK, routing.row_slot_N, kernel, overwrites=overwrites)

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
        overwrites: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = gate_kernel(gate)
        if kernel is not None and kernel.has_up and _runs_on_hopper(dy_NI):
            mid_NR, b_ERO = low_rank or (None, None)
            return linear_hopper.linear_gate_backward(
                dy_NI,
                w_EIF,
                routing.tiles,
                h_NG,
                weight_TK,
                routing.row_slot_N,
                kernel,
                mid_NR=mid_NR,
                b_ERO=b_ERO,
                overwrites=overwrites,
            )
        da_NF = self.linear(dy_NI, w_EIF, routing, low_rank=low_rank)
        return self.gate_backward(gate, h_NG, da_NF, weight_TK, routing, overwrites=overwrites)

    def combine(self, y_ND: Tensor, weight_TK: Tensor | None, routing: Dispatch) -> Tensor:
        return combine.combine(y_ND, routing.token_row_TK, None if weight_TK is None else weight_TK.contiguous())

    def factor_grads(
        self,
        a: FactorSide,
        b: FactorSide,
        adapters: Sequence[LoraFactors],
        routing: Dispatch,
        sums: Tensors,
        weight_TK: Tensor | None = None,
    ) -> list[Tensor | None]:
        num_experts, rank = routing.ends_E.shape[0], a.narrow_NR.shape[1]
        width, width_out = a.wide.shape[1], b.wide.shape[1]
        is_plain = lora.is_plain(adapters, num_experts)
        total = sums[0] if is_plain else None
        da_ERI = (
            a.wide.new_empty((num_experts, rank, width), dtype=_widest(adapter.a for adapter in adapters))
            if total is None
            else total.view(num_experts, rank, width)
        )
        db_EOR = b.wide.new_empty((num_experts, width_out, rank), dtype=_dtype_between(b.wide.dtype, adapters))
        outer.outer(
            outer.Sum(a.wide.contiguous(), a.narrow_NR, da_ERI, a.by_token, adds=total is not None),
            outer.Sum(b.wide.contiguous(), b.narrow_NR, db_EOR, b.by_token, is_wide_first=True),
            routing.ends_E,
            row_slot_N=routing.row_slot_N,
            top_k=routing.top_k,
            weight_TK=weight_TK,
        )
        if not is_plain:
            das, dbs = lora.unpack_a_grads(da_ERI, adapters), lora.unpack_b_grads(db_EOR, adapters)
            return torch_steps.add_each(lora.alternate(das, dbs), sums)
        (adapter,) = adapters
        # written to PEFT's layout at once, every element would be a memory transaction of its own: 4 times the time
        db = torch.empty_like(adapter.b, memory_format=torch.contiguous_format) if sums[1] is None else sums[1]
        sides = (1, num_experts, 1, width_out * rank)
        repack.repack([Job(db_EOR, db, adapter.scale, sides, adds=sums[1] is not None)])
        return [da_ERI.view(adapter.a.shape) if total is None else None, db if sums[1] is None else None]

    def outer(self, u_NO: Tensor, v_NI: Tensor, routing: Dispatch, total: Tensor | None = None) -> Tensor | None:
        if total is None and _suits_grouped_mm(u_NO, v_NI):
            return grouped_mm.outer(u_NO, v_NI, routing.ends_E)
        shape = (routing.ends_E.shape[0], u_NO.shape[1], v_NI.shape[1])
        out_EOI = u_NO.new_empty(shape) if total is None else total
        outer.outer(
            outer.Sum(v_NI.contiguous(), u_NO.contiguous(), out_EOI, adds=total is not None),
            None,
            routing.ends_E,
            row_slot_N=routing.row_slot_N,
            top_k=routing.top_k,
        )
        return out_EOI if total is None else None


def _dtype_between(rows: torch.dtype, adapters: Sequence[LoraFactors]) -> torch.dtype:
    """In which the gradient of `B` is held on its way to PEFT's layout: the dtype of the rows if that is bfloat16.

    It is multiplied in that dtype, so autograd, casting it, would round its gradient as well; and it is written and
    read in half the time. float16 has not the range of float32.
    """
    return rows if rows == torch.bfloat16 else _widest(adapter.b for adapter in adapters)


def _widest(factors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds those of all."""
    return reduce(torch.promote_types, (factor.dtype for factor in factors))


STEPS = TritonSteps()


def _sort(shape: RoutingShape, inputs: Tensors) -> Tensors:
    (expert_TK,) = inputs
    return (routing.sort_by_expert(cast(Tensor, expert_TK), shape).words,)


def _pack(adapters: Sequence[LoraFactors], weights: DenseWeights, jobs: list[Job]) -> PackedFactors:
    """The adapters of one projection, joined. What one launch can do for both projections is added to `jobs`.

    Factors lie along the same dimension as the weights beside which they are multiplied.
    """
    num_experts, dtype = weights.tensor.shape[0], weights.tensor.dtype
    if not lora.is_plain(adapters, num_experts):
        packed = PackedFactors(*lora.pack(adapters, num_experts, dtype))
        return PackedFactors(*[f.mT.contiguous().mT for f in packed]) if weights.is_transposed else packed
    (adapter,) = adapters
    a, b = adapter.a.contiguous(), adapter.b.contiguous()
    rank, width, width_out = a.shape[0] // num_experts, a.shape[1], b.shape[0]
    if weights.is_transposed:
        a_EIR = a.new_empty((num_experts, width, rank), dtype=dtype)
        b_ERO = b.new_empty((num_experts, rank, width_out), dtype=dtype)
        jobs.append(Job(a, a_EIR, sides=(num_experts, rank, 1, width)))
        jobs.append(Job(b, b_ERO, adapter.scale, sides=(1, width_out, rank, num_experts)))
        return PackedFactors(a_EIR.mT, b_ERO.mT)
    if a.dtype != dtype:
        narrowed = a.new_empty(a.shape, dtype=dtype)
        jobs.append(Job(a, narrowed))
        a = narrowed
    b_EOR = b.new_empty((num_experts, width_out, rank), dtype=dtype)
    jobs.append(Job(b, b_EOR, adapter.scale, sides=(1, width_out * rank, 1, num_experts)))
    return PackedFactors(a.view(num_experts, rank, width), b_EOR)


def _suits_grouped_mm(u_NO: Tensor, v_NI: Tensor) -> bool:
    """Whether torch multiplies two wide sides faster than `outer.py`: on Hopper, where it takes two thirds of the time.

    Not to add to a sum: of all experts, what is added would be another copy.
    """
    is_wide = all(t.shape[1] >= _LEAST_WIDTH and t.shape[1] % 8 == 0 and t.is_contiguous() for t in (u_NO, v_NI))
    return is_wide and u_NO.dtype == torch.bfloat16 and is_hopper(u_NO.device)


def _runs_on_hopper(x_NI: Tensor) -> bool:
    return x_NI.dtype != torch.float32 and is_hopper(x_NI.device)


def gate_kernel(gate: Gate) -> gates.GateKernel | None:
    """Our device code for a gate, or None where only the host's own function knows it."""
    if isinstance(gate, SwiGlu):
        return gates.GateKernel(*gates.SILU, is_concatenated=gate.is_concatenated)
    if isinstance(gate, GeGlu):
        functions = gates.GELU if gate.approximate == "none" else gates.GELU_TANH
        return gates.GateKernel(*functions, is_concatenated=gate.is_concatenated)
    if isinstance(gate, ReluSquared):
        return gates.GateKernel(*gates.RELU_SQUARED, is_concatenated=True, has_up=False)
    if isinstance(gate, ClampedSwiGlu):
        functions = gates.SHIFTED if gate.shift else gates.CLAMPED
        return gates.GateKernel(*functions, is_concatenated=gate.is_concatenated, alpha=gate.alpha, limit=gate.limit)
    return None
