"""What a user changes of a model's modules after `optimize` counts from the next batch on, as in the host's code."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import expertune
from expertune.hosts import norms, router
from expertune.hosts.transformers import named_experts
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers and norms are ours on the CPU too, by torch's own operations."""
    monkeypatch.setattr(router, "has_kernel", lambda *_: True)
    monkeypatch.setattr(norms, "_is_fused", lambda _: True)


def with_attribute(model: nn.Module, name: str) -> Iterator[Any]:
    return (module for module in model.modules() if name in vars(module) or name in module._modules)


def setting(name: str, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        modules = list(with_attribute(model, name))
        assert modules
        for module in modules:
            setattr(module, name, value)

    return change


def resized(num_experts: int) -> Callable[[nn.Module], None]:
    """Experts repeated, or cut, and the rows of their routers."""

    def change(model: Any) -> None:
        place = torch.arange(num_experts) % 8
        for _, experts in named_experts(model):
            experts.num_experts = num_experts
        for name, parameter in list(model.named_parameters()):
            holder, _, last = name.rpartition(".")
            if "experts." in name or holder.endswith((".gate", ".router")):
                draw = torch.Generator().manual_seed(len(name))
                noise = 0.1 * torch.randn(num_experts, *parameter.shape[1:], generator=draw, dtype=parameter.dtype)
                setattr(model.get_submodule(holder), last, nn.Parameter(parameter.detach()[place] + noise))
        for module in model.modules():
            if "num_experts" in vars(module):
                module.num_experts = num_experts

    return change


CHANGES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "experts a token": ("qwen3_moe", setting("top_k", 4)),
    "scores normed": ("qwen3_moe", setting("norm_topk_prob", False)),
    "scale of scores": ("glm4_moe_lite", setting("routed_scaling_factor", 0.3)),
    "eps of norms": ("qwen3_moe", setting("variance_epsilon", 0.5)),
    "activation": ("qwen3_moe", setting("act_fn", nn.GELU())),
    "activation of dense MLPs": ("glm4_moe_lite", setting("act_fn", nn.GELU())),
    "limit of a gate": ("gpt_oss", setting("limit", 0.05)),
    "more experts": ("qwen3_moe", resized(16)),
    "fewer experts": ("qwen3_moe", resized(6)),
    "more experts, with biases": ("gpt_oss", resized(16)),
}


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_counts(checkpoint: Checkpoint, what: str, memory: str) -> None:
    family, change = CHANGES[what]
    stock = load_tiny(checkpoint(family), torch.float32).train()
    ours = expertune.optimize(copy.deepcopy(stock), memory=memory)
    before = run(stock, batch())
    assert_equal_within(run(ours, batch()), before, 1e-4)
    for model in (stock, ours):
        change(model)
    expected = run(stock, batch())
    assert (expected["logits"] - before["logits"]).abs().max() > 0.01, "the test can fail"
    assert_equal_within(run(ours, batch()), expected, 1e-4)
