"""Norms of queries and keys that are rotated as they are computed: taken where the host asks for just that."""

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

import expertune
from expertune.attention import normed_heads
from expertune.attention import rotary as rotation
from expertune.attention.normed_heads import why_not
from expertune.attention.rotary import Rotation, formula
from expertune.hosts import heads, norms, rotary
from expertune.rms_norm import rms_norm
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny
from tests.hosts.recorded import run_all_as_recorded
from tests.hosts.test_rotary import HALVES


def by_torch(
    x: Tensor, weight: Tensor, eps: float, offset: float, cos: Tensor, sin: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, as one node."""
    y = rms_norm(x, weight, eps, offset)
    turned = formula(y.transpose(1, 2), cos, sin, rotation).transpose(1, 2)
    outs: tuple[Tensor, Tensor] = _Node.apply(y, turned)
    return outs


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, y: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        return y.clone(), turned.clone()

    @staticmethod
    def backward(_: Any, dy: Tensor, dturned: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dturned


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is recorded, all that is asked of a device holds, and torch computes what kernels would."""
    run_all_as_recorded(monkeypatch)
    for module in (rotation, normed_heads):
        monkeypatch.setattr(module, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(heads, "norm_and_rotate", by_torch)
    monkeypatch.setattr(norms, "_is_fused", lambda _: True)
    monkeypatch.setattr(rotary, "rotate", lambda q, k, cos, sin, how: tuple(formula(x, cos, sin, how) for x in (q, k)))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each rotation whether it had been made."""
    real, seen = heads.turned, list[bool]()

    def spy(*args: Tensor) -> tuple[Tensor, Tensor] | None:
        seen.append((made := real(*args)) is not None)
        return made

    monkeypatch.setattr(heads, "turned", spy)
    return seen


@pytest.mark.usefixtures("on_any_device")
def test_a_model(checkpoint: Checkpoint, taken: list[bool]) -> None:
    stock = load_tiny(checkpoint("qwen3_moe"), torch.float64)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("norm" not in name)
    ours = expertune.optimize(copy.deepcopy(stock))
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (ours, stock):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the host's norms compute in float32
    assert taken == [True, True]


@pytest.mark.usefixtures("on_any_device")
def test_norms_that_are_trained(checkpoint: Checkpoint, taken: list[bool]) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float64))
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert taken == [False, False]
    assert model.model.layers[0].self_attn.q_norm.weight.grad is not None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.v_norm = nn.Identity(), nn.Identity(), nn.Identity()


def turned_about(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2)


def written_to(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = turned_about(q, k)
    return q, k.mul_(2)


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], bool]] = {
    "turned about": (turned_about, True),
    "written to": (written_to, False),
    "detached": (lambda q, k: turned_about(q.detach(), k), False),
    "scaled": (lambda q, k: turned_about(q * 1, k), False),
    "viewed": (lambda q, k: turned_about(q.view(q.shape), k), False),
    "some heads": (lambda q, k: turned_about(q[:, :, :1], k), False),
    "changed over": (lambda q, k: turned_about(k, q), False),
    "as they are": (lambda q, k: (q, k), False),
    "turned about otherwise": (lambda q, k: (q.transpose(1, 3), k.transpose(1, 3)), False),
}


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("way", WAYS)
def test_only_what_the_norms_gave_is_taken(way: str) -> None:
    """Of the others the rotation is computed of what they are."""
    change, expected = WAYS[way]
    attention, weight = Attention(), torch.ones(8, dtype=torch.float64)
    x, cos, sin = (
        torch.randn(1, 3, *shape, dtype=torch.float64, requires_grad=len(shape) > 1) for shape in [(2, 8), (8,), (8,)]
    )
    with heads.rotated_by(HALVES, attention, (cos, sin)):
        q, k = (
            heads.normed(norm, x + i, weight, 1e-6, 0.0) for i, norm in enumerate((attention.q_norm, attention.k_norm))
        )
        assert q is not None
        assert k is not None
        assert heads.normed(attention.v_norm, x, weight, 1e-6, 0.0) is None
        q, k = change(q, k)
        turned = heads.turned(q, k, cos, sin)
        assert heads.turned(q, k, cos, sin) is None, "once"
    assert (turned is not None) is expected
    if turned is not None:
        torch.testing.assert_close(turned, tuple(formula(each, cos, sin, HALVES) for each in (q, k)))


@pytest.mark.usefixtures("on_any_device")
def test_other_angles() -> None:
    attention, weight, x = Attention(), torch.ones(8), torch.randn(1, 3, 2, 8)
    cos, sin = torch.randn(2, 1, 3, 8)
    for others in ((cos.clone(), sin), (cos, cos)):
        with heads.rotated_by(HALVES, attention, (cos, sin)):
            q, k = (heads.normed(norm, x, weight, 1e-6, 0.0) for norm in (attention.q_norm, attention.k_norm))
            assert q is not None
            assert k is not None
            assert heads.turned(*turned_about(q, k), *others) is None


@pytest.mark.usefixtures("on_any_device")
def test_nothing_is_normed_so_outside_an_attention_or_without_angles() -> None:
    attention, weight, x, cos = Attention(), torch.ones(8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
    assert heads.normed(attention.q_norm, x, weight, 1e-6, 0.0) is None
    for how, angles in ((HALVES, None), (HALVES, cos), (None, (cos, cos))):
        with heads.rotated_by(how, attention, angles):
            assert heads.normed(attention.q_norm, x, weight, 1e-6, 0.0) is None
            assert heads.turned(x, x, cos, cos) is None
    with pytest.raises(ValueError, match="mine"), heads.rotated_by(HALVES, attention, (cos, cos)):
        raise ValueError("mine")
    assert heads._running.value is None


@pytest.mark.usefixtures("on_any_device")
def test_what_is_not_taken() -> None:
    x, weight, angles = torch.zeros(2, 3, 4, 8), torch.zeros(8), torch.zeros(2, 3, 8)
    assert why_not(x, weight, angles, angles, HALVES) is None
    assert why_not(x, weight, angles[:1], angles[:1], HALVES) is None
    assert why_not(x, weight, angles[..., :4], angles[..., :4], HALVES._replace(passes=True)) is None
    for changed in (
        (x[0], weight, angles, angles),
        (x, weight, angles[:, :2], angles[:, :2]),
        (x, weight, angles[..., :4], angles[..., :4]),
        (x[..., :7], weight[:7], angles[..., :7], angles[..., :7]),
        (x, weight.clone().requires_grad_(), angles, angles),
        (torch.cat([x, x]), weight, angles, angles),
    ):
        assert why_not(*changed, HALVES) is not None


@needs_cuda
def test_on_a_gpu_it_is_as_the_hosts(
    checkpoint: Checkpoint, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all_as_recorded(monkeypatch)
    stock = load_tiny(checkpoint("qwen3_moe"), torch.float32).cuda()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("norm" not in name)
    ours = expertune.optimize(copy.deepcopy(stock), graphs=False)
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    results = []
    for model in (ours, stock):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    assert taken == [True, True]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_not_where_nothing_is_recorded() -> None:
    attention, cos = Attention(), torch.randn(1, 3, 8)
    with heads.rotated_by(HALVES, attention, (cos, cos)):
        assert heads._running.value is None


@pytest.mark.usefixtures("on_any_device")
def test_norms_under_a_checkpoint_have_a_history_of_their_own() -> None:
    """The checkpoint runs them again without what was turned."""
    attention, weight, x = Attention(), torch.ones(8), torch.randn(1, 3, 2, 8, requires_grad=True)
    cos, sin = torch.randn(2, 1, 3, 8)
    with heads.rotated_by(HALVES, attention, (cos, sin)):
        q, k = (
            checkpoint(lambda x, norm=norm: heads.normed(norm, x, weight, 1e-6, 0.0), x, use_reentrant=True)
            for norm in (attention.q_norm, attention.k_norm)
        )
        assert heads.turned(*turned_about(q, k), cos, sin) is None


def test_two_rotations_are_none() -> None:
    both: Any = lambda x: (apply_rotary_pos_emb(x), apply_rotary_pos_emb_interleave(x))  # noqa: E731, F821
    names = {"apply_rotary_pos_emb": qwen3_moe.apply_rotary_pos_emb}
    assert rotary._only(FunctionType(both.__code__, names)) == HALVES
    names["apply_rotary_pos_emb_interleave"] = qwen3_moe.apply_rotary_pos_emb
    assert rotary._only(FunctionType(both.__code__, names)) is None
