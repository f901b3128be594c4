"""`memory` set, set again and left as it is: what a model carries is what was asked for last."""

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

import expertune
from expertune.hosts.attached import attached
from expertune.hosts.transformers import plan_of
from expertune.memory import token_tiles
from tests.conftest import Checkpoint
from tests.hosts.memories import PLENTY, TOO_LITTLE, Card, auto, lean
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import assert_equal_within, logits, run
from tests.memory.lanes import Lane


@pytest.mark.parametrize("later", ["fast", "auto"])
def test_what_was_set_before_is_let_go(checkpoint: Checkpoint, later: str) -> None:
    """With its buffers, which lie in pinned memory."""
    model, lane = load_tiny(checkpoint("qwen3_moe", num_hidden_layers=4)), Lane()
    lean(model, lane)
    run(model, batch())
    state = attached(model)
    assert state is not None
    assert state.memory is not None
    offload = weakref.ref(state.memory.offload)
    expertune.optimize(model, memory=later)
    del state
    gc.collect()
    assert offload() is None
    num_moved = len(lane.bytes_moved)
    for _ in range(2):
        plain = expertune.optimize(load_tiny(checkpoint("qwen3_moe", num_hidden_layers=4)))
        assert_equal_within(run(model, batch()), run(plain, batch()), 1e-12)
        expertune.optimize(model)  # which brings nothing back
    assert len(lane.bytes_moved) == num_moved > 0


@pytest.mark.parametrize("family", CONFIGS)
def test_auto_moves_and_cuts_only_in_steps_that_the_card_is_too_small_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, plain = load_tiny(checkpoint(family)), expertune.optimize(load_tiny(checkpoint(family)))
    lane, card = Lane(), Card()
    walk, walks = token_tiles.experts, []

    def spy(*args: Any, **keywords: Any) -> Any:
        walks.append(args)
        return walk(*args, **keywords)

    monkeypatch.setattr(token_tiles, "experts", spy)
    auto(model, lane, card)
    for seed, left in enumerate([TOO_LITTLE, TOO_LITTLE, PLENTY, PLENTY, TOO_LITTLE, PLENTY]):
        card.left = left
        lane.bytes_moved.clear()
        walks.clear()
        assert_equal_within(run(model, batch(seed)), run(plain, batch(seed)), 1e-12)
        assert bool(lane.bytes_moved) == bool(walks) == (left is TOO_LITTLE)


@pytest.mark.parametrize("before", [TOO_LITTLE, PLENTY])
def test_backward_does_as_forward_did_whatever_is_left_by_then(checkpoint: Checkpoint, before: int) -> None:
    """Two passes before one backward, of which the second is planned otherwise, and gradients that add up."""
    model, plain = load_tiny(checkpoint("qwen3_moe")), expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    lane, card = Lane(), Card()
    auto(model, lane, card)
    grads = []
    for each in (model, plain):
        for seed in (0, 2):
            card.left = before
            loss = each(**batch(seed)).loss
            card.left = PLENTY if before is TOO_LITTLE else TOO_LITTLE
            (loss - 0.5 * each(**batch(seed + 1)).loss).backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert_equal_within(grads[0], grads[1], 1e-12)
    assert len(lane.bytes_moved) == 2 * 2, "of one of two passes, each time: there and back"


def test_auto_walks_a_long_batch_whole_without_gradients(checkpoint: Checkpoint) -> None:
    """Nothing is kept then, so nothing was planned."""
    model, lane = load_tiny(checkpoint("qwen3_moe")), Lane()
    auto(model, lane)
    truth = logits(model)
    assert_equal_within(logits(expertune.optimize(load_tiny(checkpoint("qwen3_moe")))), truth, 0)
    assert not lane.bytes_moved


@pytest.mark.parametrize("earlier", ["fast", "auto", "lean"])
def test_a_model_that_is_optimized_again_keeps_what_was_set(checkpoint: Checkpoint, earlier: str) -> None:
    """Checkpointing, the planner with what it has measured, inputs that move, and tiles."""
    model, lane = load_tiny(checkpoint("qwen3_moe", num_hidden_layers=4)), Lane()
    if earlier == "lean":
        lean(model, lane)
    else:
        expertune.optimize(model, memory=earlier)
    before = _carried(model)
    num_moved = []
    for _ in range(3):
        run(model, batch())
        num_moved.append(len(lane.bytes_moved))
        expertune.optimize(model, backend="native_torch")
        assert _carried(model) == before
    assert num_moved == ([6, 12, 18] if earlier == "lean" else [0, 0, 0])


def _carried(model: Any) -> list[Any]:
    """What spares memory in a model, by identity."""
    state = attached(model)
    assert state is not None
    assert state.memory is not None
    layers = model.model.layers
    tiles = [plan_of(layer.mlp.experts).tiles for layer in layers]
    assert tiles == [state.memory.tiles if state.memory.name == "lean" else None] * len(layers)
    return [id(state.memory), [layer.gradient_checkpointing for layer in layers]]


LEAN = (
    "inputs of layers move to the host from 8,192 tokens on, and experts walk tiles of tokens from 16,384 tokens and "
    "1,024 rows an expert on"
)
SAID = {
    "fast": "memory fast: no layer runs again in backward",
    "auto": "memory auto: layers that the card has no room for run again in backward; where it has none even so, "
    + LEAN,
    "lean": "memory lean: every layer runs again in backward; " + LEAN,
}


@pytest.mark.parametrize("memory", SAID)
def test_explain_says_what_a_step_keeps_computes_again_and_moves(checkpoint: Checkpoint, memory: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")), memory=memory)
    assert str(expertune.explain(model)).splitlines()[-1] == SAID[memory]
    assert str(expertune.explain(expertune.optimize(model))).splitlines()[-1] == SAID[memory]
    model.gradient_checkpointing_enable({"use_reentrant": False})  # which our setting takes the place of
    for _ in range(2):
        assert str(expertune.explain(model)).splitlines()[-1] == SAID[memory]
        run(model, batch())
    model.gradient_checkpointing_disable()
    off = f"memory {memory}: no layer runs again in backward"
    assert str(expertune.explain(model)).splitlines()[-1].startswith(off)


def test_explain_says_nothing_of_experts_where_there_are_none(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gemma3_text")), memory="lean")
    said = "memory lean: every layer runs again in backward; inputs of layers move to the host from 8,192 tokens on"
    assert str(expertune.explain(model)).splitlines()[-1] == said


def test_explain_where_nobody_has_set_it(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    assert expertune.explain(model).memory is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        assert "by gradient checkpointing that was turned on elsewhere" in str(expertune.explain(model))
        run(model, batch())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma3_text"])
@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_what_was_set_takes_the_place_of_a_trainers_gradient_checkpointing(
    checkpoint: Checkpoint, family: str, when: str
) -> None:
    """TRL turns it on by default; then a plain `SFTTrainer` would run every layer again, whatever `load` was told."""
    keeping, plain = (expertune.optimize(load_tiny(checkpoint(family)), memory=m) for m in ("fast", None))
    leanly, lane = load_tiny(checkpoint(family)), Lane()
    lean(leanly, lane)
    for model in (keeping, leanly):
        if when == "between steps":
            run(model, batch())
            lane.bytes_moved.clear()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    for _ in range(2):
        truth = run(plain, batch())
        assert_equal_within(run(keeping, batch()), truth, 1e-12)
        assert_equal_within(run(leanly, batch()), truth, 1e-12)
        assert not keeping.is_gradient_checkpointing
        assert lane.bytes_moved
        lane.bytes_moved.clear()
    expertune.restore(leanly)
    assert leanly.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma3_text"])
@pytest.mark.parametrize("memory", ["lean", "auto", "the trainer's"])
def test_a_cache_in_training_is_attended_to(checkpoint: Checkpoint, family: str, memory: str) -> None:
    """As tuned prefixes are: the host's checkpoint of a layer drops it, and where attention is ours nobody noticed."""
    ours, stock = load_tiny(checkpoint(family)), load_tiny(checkpoint(family))
    expertune.optimize(ours, memory=None if memory == "the trainer's" else memory)
    if memory == "the trainer's":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    ids = batch()["input_ids"][:, :9]
    results = []
    for model in (ours, stock):
        with torch.no_grad():
            past = model.eval()(input_ids=ids[:, :4], use_cache=True).past_key_values
        results.append(run(model.train(), {"input_ids": ids[:, 4:], "labels": ids[:, 4:], "past_key_values": past}))
    assert_equal_within(*results, 1e-11)
    layers = [module for module in ours.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all(layer.gradient_checkpointing for layer in layers), "only beside a cache do they run once"


def test_an_interrupted_call_beside_a_cache_leaves_checkpointing_on(checkpoint: Checkpoint) -> None:
    """torch calls no hook behind a call that Ctrl-C ended."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")), memory="lean")
    ids = batch()["input_ids"][:, :9]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for is_interrupted in (True, False):
        with torch.no_grad():
            past = model.eval()(input_ids=ids[:, :4], use_cache=True).past_key_values
        handle = model.model.layers[1].register_forward_pre_hook(interrupt) if is_interrupted else None
        with pytest.raises(KeyboardInterrupt) if is_interrupted else nullcontext():
            model.train()(input_ids=ids[:, 4:], past_key_values=past)
        if handle is not None:
            handle.remove()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
