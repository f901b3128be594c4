"""Hosts' rotations that follow the formula, found by trying them, and attention that runs with ours in their place."""

import copy
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.attention.rotary import Rotation, formula, why_not
from expertune.hosts import forwards, rotary
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny

HALVES = Rotation(interleaved=False, shared=False, half_width=False, passes=False)
FOUND = {
    ("qwen3_moe", "apply_rotary_pos_emb"): HALVES,
    ("mixtral", "apply_rotary_pos_emb"): HALVES,
    ("glm4_moe", "apply_rotary_pos_emb"): HALVES._replace(passes=True),
    ("gpt_oss", "apply_rotary_pos_emb"): HALVES._replace(half_width=True),
    ("ernie4_5_moe", "apply_rotary_pos_emb"): None,  # computes in float32 and interleaves the output too
    ("gemma3n", "apply_rotary_pos_emb"): None,  # takes one tensor
}


@pytest.mark.parametrize(("family", "name"), FOUND, ids=str)
def test_the_formula_of_a_function_is_found_by_trying_it(family: str, name: str) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    assert rotary.rotation_of(getattr(module, name)) == FOUND[family, name]


def widening(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(formula(x, cos, sin, HALVES).float() for x in (q, k))


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(formula(x, cos, sin, HALVES) * 1.001 for x in (q, k))


@pytest.mark.parametrize("function", [widening, scaled])
def test_another_formula_is_left_to_the_host(function: Any) -> None:
    assert rotary.rotation_of(function) is None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "glm4_moe_lite", "deepseek_v3"])
def test_attention_runs_with_ours(checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula stands in for the kernel; the host's own function is not called, and its module is as it was."""
    stock = load_tiny(checkpoint(family), torch.float64)
    ours = expertune.optimize(copy.deepcopy(stock), attention="host")
    calls: list[Rotation] = []

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        calls.append(rotation)
        return formula(q, cos, sin, rotation), formula(k, cos, sin, rotation)

    def takes_all(*_: Any) -> None:
        return None

    monkeypatch.setattr(rotary, "rotate", rotate)
    monkeypatch.setattr(rotary, "why_not", takes_all)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (ours, stock):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters()]])
        assert len(calls) == 2
    torch.testing.assert_close(*results)


def test_it_is_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))
    attentions = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeAttention"]
    assert all(forwards.runs(attention, rotary.forward) for attention in attentions)
    twin = copy.deepcopy(attentions[0])
    assert twin.forward.args == (twin,)
    expertune.restore(model)
    assert not any("forward" in vars(module) for module in attentions)


def test_another_forward_is_left_alone(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    attention = model.model.layers[0].self_attn
    mine = partial(type(attention).forward, attention)
    attention.forward = mine
    expertune.optimize(model)
    assert attention.forward is mine
    expertune.restore(model)
    assert attention.forward is mine


def test_what_ours_does_not_take() -> None:
    q, angles = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 8)
    assert why_not(q, q, angles, angles, HALVES) == "there is no Triton here"


@needs_cuda
def test_what_ours_does_not_take_on_a_gpu() -> None:
    q, k, cos, sin = (torch.zeros(shape, device="cuda") for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    assert why_not(q, k, cos, sin, HALVES) is None
    for changed in (
        (q.half(), k, cos, sin),
        (q, k, cos.clone().requires_grad_(), sin),
        (q.mT.contiguous().mT, k, cos, sin),
        (q, k, cos[..., :4], sin[..., :4]),
        (q.double(), k.double(), cos.double(), sin.double()),
    ):
        assert why_not(*changed, HALVES) is not None
    assert why_not(q, k, cos[..., :4], sin[..., :4], HALVES._replace(passes=True)) is None


@needs_cuda
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "glm4_moe_lite"])
def test_on_a_gpu_it_is_as_the_hosts(checkpoint: Checkpoint, family: str) -> None:
    stock = load_tiny(checkpoint(family), torch.float32).cuda()
    ours = expertune.optimize(copy.deepcopy(stock), backend="native_torch", attention="host", graphs=False)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    results = []
    for model in (ours, stock):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_modules_of_another_kind_are_left_alone() -> None:
    assert rotary.find(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(2, 2))) == []
