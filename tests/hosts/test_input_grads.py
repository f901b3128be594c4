"""Frozen embeddings require no gradient where memory is spared our way, whoever asks for it, and then they do again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, wrap
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run

MEMORIES = ["fast", "auto", "lean"]


def wants_gradient(model: Any, layer: int) -> bool:
    """Whether the input of a layer does."""
    seen: list[Tensor] = []

    def see(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_base_model().model.layers[layer].register_forward_pre_hook(see, with_kwargs=True)
    model(**batch())
    handle.remove()
    return seen[0].requires_grad


def make(checkpoint: Checkpoint, memory: str | None, **settings: Any) -> Any:
    """As `load` and `get_peft_model` do it."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float64), memory=memory)
    return wrap(model, lora(target_modules=["q_proj", "o_proj"], **settings)).train()


@pytest.mark.parametrize("memory", MEMORIES)
def test_whoever_asks(checkpoint: Checkpoint, memory: str) -> None:
    ours, truth = make(checkpoint, memory), expertune.restore(make(checkpoint, None))
    for model in (ours, truth):
        model.enable_input_require_grads()  # as TRL does
    for _ in range(3):
        assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert not wants_gradient(ours, 0)
    assert wants_gradient(truth, 0)
    assert not ours.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("memory", MEMORIES)
def test_backward_ends_at_the_first_layer_that_is_trained(checkpoint: Checkpoint, memory: str) -> None:
    settings: dict[str, Any] = {"layers_to_transform": [1], "target_parameters": []}
    ours, truth = make(checkpoint, memory, **settings), expertune.restore(make(checkpoint, None, **settings))
    for _ in range(3):
        assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert not wants_gradient(ours, 1)


def test_what_was_asked_for_before_or_meanwhile_holds_after(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float64)
    model.enable_input_require_grads()
    ours = wrap(expertune.optimize(model, memory="lean"), lora())
    assert not wants_gradient(ours, 0)
    for again in (ours, copy.deepcopy(ours)):
        expertune.optimize(again, memory="auto")
        assert not wants_gradient(again, 0)
        expertune.restore(again)
        assert wants_gradient(again, 0)
        assert len(again.get_input_embeddings()._forward_hooks) == 1
        assert "enable_input_require_grads" not in vars(again.get_base_model())


def test_what_is_asked_for_meanwhile(checkpoint: Checkpoint) -> None:
    ours = make(checkpoint, "fast")
    ours.get_base_model()._expertune.asks_for_input_grads = False  # PEFT has not asked, say
    assert not wants_gradient(expertune.restore(copy.deepcopy(ours)), 0)
    ours.enable_input_require_grads()
    assert not wants_gradient(ours, 0)
    expertune.optimize(ours)
    assert not wants_gradient(ours, 0), "memory is as it was"
    again = copy.deepcopy(ours)
    assert wants_gradient(expertune.restore(ours), 0)
    again.disable_input_require_grads()
    assert not wants_gradient(expertune.restore(again), 0)


def test_every_time_that_it_was_asked_for(checkpoint: Checkpoint) -> None:
    """Transformers itself forgets all but the last."""
    model = load_tiny(checkpoint("qwen3_moe"), torch.float64)
    for _ in range(3):
        model.enable_input_require_grads()
    ours = wrap(expertune.optimize(model, memory="lean"), lora())
    assert not wants_gradient(ours, 0)


def test_where_memory_is_the_trainers(checkpoint: Checkpoint) -> None:
    ours = make(checkpoint, None)
    ours.enable_input_require_grads()
    assert wants_gradient(ours, 0)


def test_embeddings_that_are_trained(checkpoint: Checkpoint) -> None:
    ours, truth = make(checkpoint, "lean"), expertune.restore(make(checkpoint, None))
    for model in (ours, truth):
        model.get_input_embeddings().weight.requires_grad_(True)
    assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
