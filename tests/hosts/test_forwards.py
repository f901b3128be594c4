"""Forwards of single modules: put back by `restore`, below hooks of Accelerate too, and never left half given."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import expertune
from expertune.hosts import attach, forwards
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run


class Counting(ModelHook):
    """Counts the calls of all modules that it lies on."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if forwards.given(module) is not None]


@pytest.mark.parametrize("hook_comes", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_restore_below_a_hook(checkpoint: Checkpoint, family: str, hook_comes: str) -> None:
    model = stock(checkpoint(family), lora(), torch.float64)
    expected = run(model, batch())
    hook = Counting()
    hooked = [module for module in model.modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)]

    def add() -> None:
        for module in hooked:
            add_hook_to_module(module, hook)

    if hook_comes == "before":
        add()
    expertune.optimize(model, backend="native_torch")
    if hook_comes == "after":
        add()
    assert own_forwards(model)
    assert_equal_within(run(model, batch()), expected, 1e-11)
    assert hook.calls
    expertune.restore(model)
    assert own_forwards(model) == []
    hook.calls = 0
    assert_equal_within(run(model, batch()), expected, 0)
    of_stock, hook.calls = hook.calls, 0
    assert of_stock
    for module in hooked:
        remove_hook_from_module(module)
    assert_equal_within(run(model, batch()), expected, 0)
    assert not hook.calls


def test_a_forward_is_given_and_taken_back() -> None:
    linear = nn.Linear(2, 2)
    x, mine = torch.ones(1, 2), torch.zeros(1, 2)
    expected = linear(x)
    for has_hook in (False, True):
        if has_hook:
            add_hook_to_module(linear, Counting())
        assert forwards.given(linear) is None
        forwards.give(linear, give_mine := lambda _: mine)
        assert forwards.given(linear) is give_mine
        assert linear(x) is mine
        forwards.take_back(linear)
        assert forwards.given(linear) is None
        assert torch.equal(linear(x), expected)


class GpuOnlyRMSNorm(nn.Module):
    """As someone's kernel in a norm's place, which runs on a GPU alone."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        return x * self.weight


def test_what_cannot_be_tried_is_left_to_the_host(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    model = load_tiny(checkpoint("gpt_oss"), torch.float32)
    norm = model.model.layers[0].input_layernorm = GpuOnlyRMSNorm(model.model.layers[0].input_layernorm.weight)
    monkeypatch.setattr(modeling_gpt_oss, "apply_rotary_pos_emb", rotate)
    # another function than the one whose rotation was found before
    forward = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "forward", lambda *args, **kwargs: forward(*args, **kwargs)
    )
    expertune.optimize(model)
    assert forwards.given(norm) is None
    assert forwards.given(model.model.layers[1].input_layernorm) is not None


def test_a_refusal_leaves_attention_and_norms_as_they_were(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("gpt_oss"), torch.float32)
    model.model.layers[1].mlp.experts.extra = nn.Parameter(torch.ones(3))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="extra"):
        expertune.optimize(model)
    assert model.config._attn_implementation == before
    assert own_forwards(model) == []


def test_hooks_hear_of_no_numbers_that_nobody_sent(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    heard: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *call: heard.append(call))
    expertune.optimize(model)
    assert not heard


def test_an_interrupt_leaves_the_model_as_it_was(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock(checkpoint("gpt_oss"), lora(), torch.float64)
    expected = run(model, batch())
    before = fingerprint(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("_hook", "_bind", "bind_all", "_make_recorder"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(attach, name, interrupt)
            expertune.optimize(model)
        assert fingerprint(model) == before
    assert_equal_within(run(model, batch()), expected, 0)


def test_a_forward_without_a_module_is_somebody_elses() -> None:
    def forward(x: Tensor) -> Tensor:
        return x

    forward.__module__ = None  # type: ignore[assignment]
    module = nn.Linear(2, 2)
    assert not forwards.is_somebody_elses(module)
    module.forward = forward
    assert forwards.is_somebody_elses(module)
