"""Linears that read the same tokens, computed as one node: stock PEFT's numbers, whatever the host does with them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import expertune
from expertune.hosts import lora_layers, siblings
from expertune.hosts.current import recording
from expertune.hosts.forwards import bind
from expertune.split_linear import Linear
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch
from tests.hosts.passes import assert_equal_within, run
from tests.hosts.recorded import both, step, tokens

WIDTH = 24
QKV = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """What reads its input with three linears, of which `uses` says how."""

    values = WIDTH

    def __init__(self, uses: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.uses = uses
        self.q_proj, self.k_proj = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 16)
        self.v_proj = nn.Linear(self.values, 16)

    def forward(self, x: Tensor) -> Tensor:
        with recording.being(True), siblings.together(self):
            return self.uses(self, x)


def plainly(attention: Any, x: Tensor) -> Tensor:
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    return torch.cat([q.sin(), k.cos(), v.square()], dim=-1)


def pair(uses: Callable[[Any, Tensor], Tensor], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and stock's, with the same adapters in float64."""
    defaults: dict[str, Any] = {"r": 4, "target_modules": QKV, "init_lora_weights": False}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(Attention(uses).double(), LoraConfig(**defaults | settings)))  # type: ignore[arg-type]
    layers = [m for m in models[0].modules() if lora_layers.LoraLinear is type(m)]
    for layer in layers:
        bind([layer], lora_layers.lora_linear_forward)
    return models[0], models[1]


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each node was of."""
    real, seen = siblings.lora_linears, list[int]()

    def spy(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        seen.append(len(linears))
        return real(x, linears)

    monkeypatch.setattr(siblings, "lora_linears", spy)
    return seen


def results(model: nn.Module, x: Tensor, backward: Callable[[Tensor], Tensor] = Tensor.sum) -> list[Tensor | None]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    backward(y).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_same(models: tuple[nn.Module, nn.Module], *others: Any) -> None:
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for mine, truth in zip(*(results(model, x, *others) for model in models), strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None and truth is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


SETTINGS: dict[str, dict[str, Any]] = {
    "alike": {},
    "of several ranks and scales": {
        "rank_pattern": {"k_proj": 3, "v_proj": 8}, "alpha_pattern": {"q_proj": 7, "v_proj": 1}, "use_rslora": True,
    },
    "two of three": {"target_modules": ["q_proj", "v_proj"]},
    "one": {"target_modules": ["k_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_as_stock_peft(numbers: list[int], settings: dict[str, Any]) -> None:
    assert_same(pair(plainly, **settings))
    assert numbers == [len(settings.get("target_modules", QKV))]


def test_no_tokens(numbers: list[int]) -> None:
    ours, truth = pair(plainly)
    for mine, its in zip(*(results(model, torch.zeros(0, WIDTH).double()) for model in (ours, truth)), strict=True):
        torch.testing.assert_close(mine, its)
    assert numbers == [3]


@pytest.mark.parametrize("place", range(3))
def test_one_that_nobody_learns_from_gets_no_gradient(place: int) -> None:
    widths = [(0, 40), (40, 56), (56, 72)]
    start, end = widths[place]
    assert_same(pair(plainly), lambda y: y[..., :start].sum() + y[..., end:].sum())
    assert_same(pair(lambda a, x: [a.q_proj(x), a.k_proj(x), a.v_proj(x)][place].sin()))


def test_factors_that_are_frozen_get_none() -> None:
    models = pair(plainly)
    for model in models:
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "q_proj.lora_A" in name or "v_proj.lora_B" in name:
                parameter.requires_grad_(False)
    assert_same(models)


def test_factors_of_several_dtypes(numbers: list[int]) -> None:
    ours, truth = pair(plainly)
    for model in (ours, truth):
        model.bfloat16()
        for name, parameter in model.named_parameters():
            if "k_proj.lora_" in name:
                parameter.data = parameter.data.float()
    x = torch.randn(7, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mine, its = (results(model, x) for model in (ours, truth))
    assert numbers == [3]
    for a, b in zip(mine, its, strict=True):
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def halved(attention: Any, x: Tensor) -> Tensor:
    """Keys of other tokens."""
    return torch.cat([attention.q_proj(x), attention.k_proj(x / 2), attention.v_proj(x)], dim=-1).sin()


def written_to(attention: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = attention.q_proj(x).sin()
    with torch.no_grad():
        x.add_(1)
    return torch.cat([q, attention.k_proj(x), attention.v_proj(x)], dim=-1)


def twice(attention: Any, x: Tensor) -> Tensor:
    return torch.cat([attention.q_proj(x), attention.q_proj(x), attention.k_proj(x)], dim=-1).sin()


def clamped(attention: Any, x: Tensor) -> Tensor:
    """In place, as OLMoE does."""
    parts = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    for part in parts:
        part.clamp_(min=-0.3, max=0.3)
    return torch.cat(parts, dim=-1)


def without_history(attention: Any, x: Tensor) -> Tensor:
    q = attention.q_proj(x)
    with torch.no_grad():
        k = attention.k_proj(x)
    return torch.cat([q, k, attention.v_proj(x)], dim=-1).sin()


@pytest.mark.parametrize("uses", [halved, twice, clamped, without_history])
def test_each_gets_what_it_was_asked_for(uses: Callable[[Any, Tensor], Tensor]) -> None:
    assert_same(pair(uses))


def test_tokens_that_have_been_written_to_meanwhile_are_others() -> None:
    ours, truth = pair(written_to)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), truth(x), rtol=1e-12, atol=1e-12)


def test_one_that_somebody_looks_at_is_computed_when_it_is_called(numbers: list[int]) -> None:
    models = pair(plainly)
    seen: list[int] = []
    for model in models:
        layer = model.base_model.model.k_proj
        layer.register_forward_hook(lambda _m, _x, y: (seen.append(len(seen)), 2 * y)[1])
        layer.register_full_backward_hook(lambda *_: None)
    assert_same(models)
    assert (numbers, seen) == ([2, 1], [0, 1])


def test_one_that_a_hook_of_accelerate_lies_around_is_computed_when_it_is_called(numbers: list[int]) -> None:
    """Its weights may be elsewhere until then."""
    models = pair(plainly)
    for model in models:
        add_hook_to_module(model.base_model.model.k_proj, ModelHook())
    assert_same(models)
    assert numbers == [2, 1]


def narrowed(attention: Any, x: Tensor) -> Tensor:
    """Values of half of each token."""
    half = x[..., : WIDTH // 2]
    return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(half)], dim=-1).sin()


def test_one_of_another_width_is_no_sibling(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "values", WIDTH // 2)
    assert_same(pair(narrowed))
    assert numbers == [2, 1]


def test_an_adapter_that_is_off(numbers: list[int]) -> None:
    models: Any = pair(plainly)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad(), models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(models[0](x), models[1](x))
    assert numbers == []


def test_what_was_made_is_gone_after_the_call_also_when_it_raised() -> None:
    def raising(attention: Any, x: Tensor) -> Tensor:
        attention.q_proj(x)
        raise ValueError("mine")

    ours, _ = pair(raising)
    with pytest.raises(ValueError, match="mine"):
        ours(torch.randn(5, WIDTH, dtype=torch.float64))
    assert siblings._running.value is None


def test_a_gradient_that_is_none_leaves_none() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, __: Tensor) -> None:
            return None

    assert_same(pair(lambda a, x: Nothing.apply(plainly(a, x)) + x.sum()))


def test_alone_outside_an_attention(numbers: list[int]) -> None:
    ours: Any = pair(plainly)[0]
    ours.base_model.model.q_proj(torch.randn(5, WIDTH, dtype=torch.float64))
    assert numbers == [1]


TARGETS = {
    "qwen3_moe": ([3, 1], QKV),
    "gpt_oss": ([3, 1], QKV),
    "gemma3_text": ([3, 1], QKV),
    "mixtral": ([3, 1], QKV),
    "glm4_moe_lite": ([2, 1], ["q_a_proj", "kv_a_proj_with_mqa"]),
    "deepseek_v3": ([2, 1], ["q_a_proj", "kv_a_proj_with_mqa"]),
}


@pytest.mark.parametrize("family", TARGETS)
def test_models(checkpoint: Checkpoint, numbers: list[int], family: str) -> None:
    expected, names = TARGETS[family]
    config = lora(target_modules=[*names, "o_proj"], target_parameters=[])
    ours, truth = (stock(checkpoint(family), config) for _ in range(2))
    expertune.optimize(ours)
    right = run(truth, batch())
    assert_equal_within(run(ours, batch()), right, 1e-11)
    assert numbers == 2 * [1] * sum(expected), "each by itself where nothing is recorded"
    numbers.clear()
    with recording.being(True):
        assert_equal_within(run(ours, batch()), right, 1e-11)
    assert numbers == 2 * expected


@pytest.mark.parametrize(("family", "expected"), [("qwen3_moe", [3, 1]), ("glm4_moe_lite", [2, 1, 1])])
def test_layers_that_are_recorded(checkpoint: Checkpoint, numbers: list[int], family: str, expected: list[int]) -> None:
    ours, truth, capture = both(checkpoint(family), family)
    for seed in range(4):
        torch.testing.assert_close(step(ours, tokens(seed)), step(truth, tokens(seed)))
    assert capture.replays
    numbers.clear()
    step(ours, tokens(5))  # without a GPU a replay runs forward again
    assert numbers == 2 * expected
