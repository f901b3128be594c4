"""Copies of an optimized model's parts: of as much as they hold, and they compute what the part does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.hosts import forwards, mlps
from expertune.hosts.attached import attached
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch
from tests.hosts.passes import assert_equal_within, logits, run

MEMORIES = ("fast", "auto", "lean")


def optimized(checkpoint: Checkpoint, memory: str, family: str = "qwen3_moe") -> Any:
    model = expertune.optimize(stock(checkpoint(family), lora()).train(), memory=memory)
    run(model, batch())
    return model


def layers_of(model: Any) -> nn.ModuleList:
    layers = model.get_base_model().model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@pytest.mark.parametrize("part", ["", "self_attn", "mlp", "mlp.experts"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_part_is_copied_without_the_model(checkpoint: Checkpoint, memory: str, part: str) -> None:
    original = layers_of(optimized(checkpoint, memory))[1].get_submodule(part)
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(original, memo)
    copied = sum(x.numel() for x in memo.values() if isinstance(x, nn.Parameter))
    assert copied == sum(p.numel() for p in twin.parameters())
    assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, original.parameters()))


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_copied_layer_computes_what_the_layer_does(checkpoint: Checkpoint, memory: str, family: str) -> None:
    """As where a model is made deeper by its own layers."""
    model, theirs = optimized(checkpoint, memory, family), stock(checkpoint(family), lora())
    for each in (model, theirs):
        layers = layers_of(each)
        layers[0] = copy.deepcopy(layers[1])
    inputs: Any = batch() | {"use_cache": False}  # in a cache both would be the same layer
    assert_equal_within(run(model, inputs), run(theirs, inputs), 1e-11)
    expertune.optimize(model)
    assert_equal_within(run(model, inputs), run(theirs, inputs), 1e-11)


def test_a_part_with_a_forward_of_ours_keeps_it(checkpoint: Checkpoint) -> None:
    model = optimized(checkpoint, "fast", "glm4_moe_lite")
    (mlp, *_) = attached(model.get_base_model()).mlps  # type: ignore[union-attr]
    twin = copy.deepcopy(mlp)
    assert forwards.runs(twin, mlps.forward)
    x = torch.randn(5, 32, dtype=torch.float64)
    assert torch.equal(twin(x), mlp(x))
    with torch.no_grad():
        twin.down_proj.weight.zero_()
    assert not torch.equal(twin(x), mlp(x))


def test_an_adapter_may_save_a_copied_block_whole(checkpoint: Checkpoint) -> None:
    from peft import LoraConfig

    outputs: list[dict[str, Tensor]] = []
    for way in (lambda _: None, expertune.optimize):
        model = stock(checkpoint("qwen3_moe"), lora())
        way(model)
        torch.manual_seed(1)
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"], "init_lora_weights": False}
        model.add_adapter("second", LoraConfig(r=3, **settings))  # type: ignore[arg-type]
        model.set_adapter("second")
        outputs.append(logits(model))
    assert_equal_within(outputs[1], outputs[0], 1e-11)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_whole_copy_is_a_model_of_its_own(checkpoint: Checkpoint, memory: str) -> None:
    model = optimized(checkpoint, memory)
    expected = run(model, batch())
    twin = copy.deepcopy(model)
    state, its = attached(model.get_base_model()), attached(twin.get_base_model())
    assert state is not None and its is not None and state.recorder is not None and its.recorder is not None
    assert its.recorder is not state.recorder
    assert its.recorder.whole is twin.get_base_model()
    assert {id(piece.module) for piece in its.recorder.pieces} <= {id(module) for module in twin.modules()}
    assert len(its.recorder.pieces) == len(state.recorder.pieces)
    if memory == "auto":
        assert its.memory is not None and its.memory.planner is not state.memory.planner  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal_within(run(twin, batch()), expected, 1e-11)
