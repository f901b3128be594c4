"""What the walk keeps for backward, counted in bytes: DESIGN's formula, the same on every backend."""

from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

import expertune.experts as passes
from expertune.activations import Gate, SwiGlu
from expertune.backends import native_torch
from expertune.backends.protocol import Backend
from expertune.experts import experts
from expertune.shapes import ExpertsLayout, LoraFactors
from expertune.walk import ExpertsStep, Projection
from tests.cases import DEVICE, later, pair_id, runnable
from tests.kept import kept_for_backward

T, K, E, D, F, R = 10, 2, 4, 32, 16, 8
_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, tuple[Projection, Projection]]


def _inputs(*, is_transposed: bool, trains_base: bool, dtype: torch.dtype = torch.bfloat16) -> _Inputs:
    torch.manual_seed(0)

    def projection(width_in: int, width_out: int) -> Projection:
        shape = (E, width_in, width_out) if is_transposed else (E, width_out, width_in)
        adapter = LoraFactors(
            a=(torch.randn(E * R, width_in, device=DEVICE) / 8).requires_grad_(),
            b=(torch.randn(width_out, R * E, device=DEVICE) / 8).requires_grad_(),
            scale=2.0,
        )
        return Projection(
            weight=(torch.randn(shape, device=DEVICE) / 8).to(dtype).requires_grad_(trains_base), adapters=(adapter,)
        )

    x_TD = torch.randn(T, D, device=DEVICE).to(dtype).requires_grad_()
    weight_TK, expert_TK = torch.randn(T, E, device=DEVICE).softmax(-1).topk(K, dim=-1)
    return x_TD, expert_TK, weight_TK.requires_grad_(), (projection(D, 2 * F), projection(F, D))


def _step(backend: Backend, gate: Gate, *, is_transposed: bool) -> ExpertsStep:
    layout = ExpertsLayout(
        num_experts=E, model_width=D, expert_width=F, has_gate=True, is_transposed=is_transposed, has_bias=False
    )
    return ExpertsStep(layout=layout, gate=gate, backend=backend)


@pytest.mark.parametrize(("backend", "dtype"), runnable(torch.bfloat16, torch.float16), ids=pair_id)
@pytest.mark.parametrize(("gate", "is_transposed"), [(SwiGlu(), False), (SwiGlu(is_concatenated=False), True)])
def test_saved_bytes_are_the_formula(backend: Backend, dtype: torch.dtype, gate: Gate, is_transposed: bool) -> None:
    inputs = _inputs(is_transposed=is_transposed, trains_base=False, dtype=dtype)
    step = _step(backend, gate, is_transposed=is_transposed)
    assert _saved_bytes(inputs, step) == _formula(inputs[1], step)


@pytest.mark.parametrize(
    ("is_transposed", "has_own_dtype"),
    [
        pytest.param(False, False, id="factors in the weights' dtype"),
        pytest.param(False, True, id="in another"),
        # for one of the reasons above, or for both
        pytest.param(True, False, marks=later(True), id="transposed, factors in the weights' dtype"),
        pytest.param(True, True, marks=later(True), id="transposed, in another"),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), runnable(torch.bfloat16, torch.float16), ids=pair_id)
def test_factors_that_are_kept_packed_are_packed_once(
    backend: Backend, dtype: torch.dtype, is_transposed: bool, has_own_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(is_transposed=is_transposed, trains_base=False, dtype=dtype)
    x_TD, expert_TK, weight_TK, projections = inputs
    factors = [factor for projection in projections for factor in projection.adapters]
    if not has_own_dtype:
        for factor in factors:
            factor.a.data, factor.b.data = factor.a.data.to(dtype), factor.b.data.to(dtype)
    step = _step(backend, SwiGlu(), is_transposed=is_transposed)
    packs, first_gradients = _packs(monkeypatch), None
    for keeps_packed in (False, True):
        for time in range(3):  # Triton's launches are noted at the second and repeated at the third
            packs.clear()
            out_TD = experts(x_TD, step.dispatch(expert_TK), weight_TK, projections, step, keeps_packed=keeps_packed)
            wanted = [x_TD, weight_TK, *(each for factor in factors for each in (factor.a, factor.b))]
            gradients = torch.autograd.grad(out_TD.sum(), wanted)
            if time == 1:  # at first a GPU's kernels are built, by another run of the passes
                assert len(packs) == (1 if keeps_packed else 2)
            first_gradients = first_gradients or gradients
            assert all(map(torch.equal, gradients, first_gradients))
    packed = sum(factor.b.numel() for factor in factors)
    if has_own_dtype or (is_transposed and backend.name == "triton"):  # else it lies as it is multiplied
        packed += sum(factor.a.numel() for factor in factors)
    assert _saved_bytes(inputs, step, keeps_packed=True) == _formula(expert_TK, step) + packed * dtype.itemsize


def _packs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What factors are packed for from now on."""
    real, calls = passes.pack, []

    def spy(*linears: Any) -> Any:
        calls.append(linears)
        return real(*linears)

    monkeypatch.setattr(passes, "pack", spy)
    return calls


def _formula(expert_TK: Tensor, step: ExpertsStep) -> int:
    listed_words = E  # the ends, and two words a tile where a backend lists tiles: nothing that grows with the width
    if (shape := step.dispatch(expert_TK).shape).tile_rows is not None:
        listed_words += 2 * (-(-shape.max_tiles // 4) * 4) + 1  # each list starts at a multiple of 16 bytes
    return T * (2 * D + K * (4 * F + 4 * R + 16)) + 4 * listed_words


def _saved_bytes(inputs: _Inputs, step: ExpertsStep, *, keeps_packed: bool = False) -> int:
    """What forward leaves for backward, beside parameters."""
    x_TD, expert_TK, weight_TK, projections = inputs
    parameters = [p.weight for p in projections] + [f for p in projections for a in p.adapters for f in (a.a, a.b)]
    with kept_for_backward(parameters) as saved:
        experts(x_TD, step.dispatch(expert_TK), weight_TK, projections, step, keeps_packed=keeps_packed)
    return sum(saved.values())


@pytest.mark.parametrize("trains_base", [False, True])
def test_dw_is_computed_only_for_a_trained_weight(trains_base: bool) -> None:
    x_TD, expert_TK, weight_TK, projections = _inputs(is_transposed=False, trains_base=trains_base)
    shapes = []

    def outer(u_NO: Tensor, v_NI: Tensor, ends_E: Tensor) -> Tensor:
        out_EOI = native_torch.outer(u_NO, v_NI, ends_E)
        shapes.append(tuple(out_EOI.shape))
        return out_EOI

    spy = replace(native_torch.STEPS, outer_product=outer)
    backend = replace(native_torch.BACKEND, name="spy", steps=lambda: spy)
    step = _step(backend, SwiGlu(), is_transposed=False)
    out_TD = experts(x_TD, step.dispatch(expert_TK), weight_TK, projections, step)
    out_TD.sum().backward()
    weights = {tuple(p.weight.shape) for p in projections}
    assert (weights <= set(shapes)) is trains_base
    assert len(shapes) == (6 if trains_base else 4)


def test_an_experts_layer_without_adapters_keeps_no_input() -> None:
    """Frozen, not adapted: only what the gate and the router need."""
    x_TD, expert_TK, weight_TK, projections = _inputs(is_transposed=False, trains_base=False)
    plain = tuple(Projection(weight=p.weight) for p in projections)
    with kept_for_backward() as kept:
        step = _step(native_torch.BACKEND, SwiGlu(), is_transposed=False)
        experts(x_TD, step.dispatch(expert_TK), weight_TK, (plain[0], plain[1]), step)
    assert x_TD.untyped_storage().data_ptr() not in kept
