"""A frozen linear with LoRA as one node: stock PEFT's numbers, and PEFT itself wherever something else is meant."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

import expertune
from expertune.hosts import lora_layers, siblings
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.spies import inputs_of
from tests.kept import kept_for_backward
from tests.numerics import assert_no_worse

WIDTH, OUT, RANK = 24, 40, 8


class _Model(nn.Module):
    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, OUT, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)  # type: ignore[no-any-return]


def _layer(dtype: torch.dtype, has_bias: bool = True, factors: torch.dtype | None = None) -> LoraLinear:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj"], init_lora_weights=False)
    layer: Any = get_peft_model(_Model(has_bias).to(dtype), config).base_model.model.q_proj
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors or dtype)
    return layer  # type: ignore[no-any-return]


def _results(layer: LoraLinear, function: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = function(layer, x)
    grads = torch.autograd.grad(y, [x, *trained], torch.ones_like(y).cumsum(-1) / OUT, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that went through the one node."""
    return inputs_of(monkeypatch, siblings, "lora_linears")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (7, WIDTH), (0, WIDTH)], ids=str)
def test_float64_equals_peft(nodes: list[Tensor], shape: tuple[int, ...], has_bias: bool) -> None:
    layer = _layer(torch.float64, has_bias)
    x = torch.randn(shape, dtype=torch.float64)
    ours, stock = (_results(layer, f, x) for f in (lora_layers.lora_linear_forward, LoraLinear.forward))
    assert len(nodes) == 1
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_under_autocast_no_worse_than_peft(nodes: list[Tensor], device: str) -> None:
    layer = _layer(torch.bfloat16, factors=torch.float32).to(device)
    x = torch.randn(3, 11, WIDTH, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, stock = (_results(layer, f, x) for f in (lora_layers.lora_linear_forward, LoraLinear.forward))
    exact = _results(layer.double(), LoraLinear.forward, x.double())
    assert len(nodes) == 1
    for a, b, truth in zip(ours, stock, exact, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse(a, b, truth)


@needs_cuda
def test_gradients_of_wide_factors_are_not_rounded_on_the_way() -> None:
    layer = _layer(torch.bfloat16, factors=torch.float32).cuda()
    x = torch.randn(40, WIDTH, dtype=torch.bfloat16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        *_, da, db = _results(layer, lora_layers.lora_linear_forward, x)
    for grad in (da, db):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


def test_saved_for_backward() -> None:
    layer = _layer(torch.bfloat16, has_bias=False, factors=torch.float32)
    x = torch.randn(50, WIDTH, dtype=torch.bfloat16).requires_grad_()
    with kept_for_backward() as storages, torch.autocast("cpu", torch.bfloat16):
        lora_layers.lora_linear_forward(layer, x)
    weight, factors, mid = WIDTH * OUT, RANK * (WIDTH + OUT), 50 * RANK
    assert sum(storages.values()) == 2 * (x.numel() + weight + factors + mid)


REASONS: dict[str, Callable[[LoraLinear], Any]] = {
    "a trained bias": lambda layer: layer.base_layer.bias.requires_grad_(),
    "a hook": lambda layer: layer.base_layer.register_forward_hook(lambda _m, _x, y: y * 2),
    "a replaced forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: x.sum(-1, True).expand(-1, OUT)),
    "another class": lambda layer: setattr(layer.base_layer, "__class__", type("Linear8", (nn.Linear,), {})),
    "a hook on a factor": lambda layer: layer.lora_A["default"].register_forward_hook(lambda _m, _x, y: y * 2),
    "a replaced forward of a factor": lambda layer: setattr(
        layer.lora_B["default"], "forward", lambda x: x.sum(-1, True).expand(-1, OUT)
    ),
    "a hook on what drops nothing": lambda layer: layer.lora_dropout["default"].register_forward_hook(
        lambda _m, _x, y: y * 2
    ),
    "factors of another dtype": lambda layer: (layer.lora_A.float(), layer.lora_B.float()),
}


@pytest.mark.parametrize("change", REASONS.values(), ids=REASONS)
def test_anything_else_is_left_to_peft(nodes: list[Tensor], change: Callable[[LoraLinear], Any]) -> None:
    layer = _layer(torch.float64)
    change(layer)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    ours, stock = (_results(layer, f, x) for f in (lora_layers.lora_linear_forward, LoraLinear.forward))
    assert not nodes
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_wide_tokens_under_autocast_are_left_to_peft(nodes: list[Tensor]) -> None:
    layer = _layer(torch.bfloat16, factors=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora_layers.lora_linear_forward(layer, torch.randn(6, WIDTH))
    assert not nodes


def test_a_bias_of_another_dtype_is_cast_by_autocast(nodes: list[Tensor]) -> None:
    layer = _layer(torch.bfloat16, factors=torch.float32)
    layer.base_layer.bias.data = layer.base_layer.bias.data.float()
    x = torch.randn(6, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, stock = (_results(layer, f, x) for f in (lora_layers.lora_linear_forward, LoraLinear.forward))
    assert not nodes
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_weights_and_factors_that_want_nothing_get_nothing() -> None:
    layer = _layer(torch.float64)
    layer.lora_A["default"].weight.requires_grad_(False)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    lora_layers.lora_linear_forward(layer, x).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
    assert layer.lora_A["default"].weight.grad is layer.base_layer.weight.grad is None


def test_a_forward_that_somebody_has_given_a_layer_stays(checkpoint: Checkpoint) -> None:
    model = stock(checkpoint("qwen3_moe"), lora(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    own = layer.forward = partial(LoraLinear.forward, layer)
    for change in (expertune.optimize, expertune.restore):
        change(model)
        assert layer.forward is own


def test_many_gradients_at_once(nodes: list[Tensor]) -> None:
    layer, x = _layer(torch.float64), torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(3, 6, OUT, dtype=torch.float64)
    y = lora_layers.lora_linear_forward(layer, x)
    (many,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(many, torch.stack(each))
    assert len(nodes) == 1
