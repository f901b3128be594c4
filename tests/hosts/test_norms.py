"""Norms of the host that follow the formula, found by trying them, and what ours gives in their place."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.hosts import norms
from expertune.hosts.attached import attached
from expertune.hosts.norms import Formula, formula_of
from expertune.rms_norm import rms_norm
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny
from tests.hosts.passes import assert_equal_within, logits


class ScaledRMSNorm(nn.Module):
    """A formula of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * 1.1 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class BesideRMSNorm(ScaledRMSNorm):
    """Its eps is added to the root, and not under it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class GatedRMSNorm(ScaledRMSNorm):
    """Wants more than one tensor."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x if gate is None else x * gate


def test_the_formula_of_a_class_is_found_by_trying_it(checkpoint: Checkpoint) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    assert formula_of(Qwen3MoeRMSNorm(8, eps=1e-5)) == Formula(1e-5, 0.0, keeps_dtype=False)
    assert formula_of(GptOssRMSNorm(8)) == Formula(1e-6, 0.0, keeps_dtype=True)
    assert formula_of(Gemma3RMSNorm(8)) == Formula(1e-6, 1.0, keeps_dtype=True)
    for other in (ScaledRMSNorm(), BesideRMSNorm(), GatedRMSNorm(), nn.LayerNorm(8)):
        assert formula_of(other) is None


def test_formulas_are_found_wherever_torch_makes_tensors_by_default(checkpoint: Checkpoint) -> None:
    """As where a model is made on the GPU by `with torch.device("cuda")`, and optimized there."""
    folder, found = checkpoint("glm4_moe_lite"), []
    for default in ("cpu", "meta"):
        model = load_tiny(folder, torch.float32)
        with torch.device(default):
            expertune.optimize(model)
        state = attached(model)
        assert state is not None
        found.append({name: len(getattr(state, name)) for name in ("norms", "routers", "latents", "rotaries", "mlps")})
        assert "gate silu" in str(expertune.explain(model))
    on_the_cpu, elsewhere = found
    assert elsewhere == on_the_cpu
    assert on_the_cpu["mlps"] == 2


def test_the_formula_is_found_whatever_torch_makes_by_default() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    norm = Qwen3MoeRMSNorm(8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert formula_of(norm) == Formula(1e-6, 0.0, keeps_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=needs_cuda),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [128, 2880])
def test_it_is_no_worse_than_the_host_s(width: int, weight_dtype: torch.dtype, offset: float, device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(33, width, generator=draw).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(width, generator=draw).to(device, weight_dtype).requires_grad_()
    dy = torch.randn(33, width, generator=draw).to(device, torch.bfloat16)

    def host(x: Tensor, weight: Tensor, up: Any) -> Tensor:
        wide = x.to(up)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return ((offset + weight) * wide.to(x.dtype)).to(x.dtype)

    with torch.autocast(device, dtype=torch.bfloat16):
        ours = rms_norm(x, weight, 1e-6, offset)
    assert ours.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    results = [
        [out.detach(), *torch.autograd.grad(out, tensors, dy.to(out.dtype))]
        for out, tensors in (
            (ours, (x, weight)),
            (host(x, weight, torch.float32), (x, weight)),
            (host(*exact, torch.float64), exact),
        )
    ]
    for got, plain, truth in zip(*results, strict=True):
        assert (got.double() - truth).norm() <= 1.05 * (plain.double() - truth).norm()


def test_a_model_with_ours_is_the_host_s(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    host = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    model = expertune.optimize(copy.deepcopy(host))
    assert_equal_within(logits(model), logits(host), 1e-5)
    seen: list[float] = []
    monkeypatch.setattr(norms, "_is_fused", lambda _: True)
    monkeypatch.setattr(norms, "rms_norm", lambda *args: (seen.append(args[2]), rms_norm(*args))[1])
    assert_equal_within(logits(model), logits(host), 1e-5)
    assert len(seen) == 9  # two and two a layer, and the last
    seen.clear()
    assert_equal_within(logits(expertune.restore(copy.deepcopy(model))), logits(host), 1e-5)
    assert not seen


def test_another_s_forward_stays(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"))
    first, second = model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm
    first.forward = theirs = lambda x: x
    expertune.optimize(model)
    assert first.forward is theirs
    second.forward = theirs
    expertune.restore(model)
    assert first.forward is theirs
    assert second.forward is theirs
    assert "forward" not in vars(model.model.norm)
