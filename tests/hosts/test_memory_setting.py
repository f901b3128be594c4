"""`memory` set, set again and left as it is: what a model carries is what was asked for last."""

import gc
import weakref
from typing import Any

import pytest

import expertune
from expertune.hosts.attach import attached
from expertune.hosts.transformers import plan_of
from tests.conftest import Checkpoint
from tests.hosts.memories import lean
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run
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
    assert tiles == [state.memory.tiles] * len(layers)
    return [id(state.memory), [layer.gradient_checkpointing for layer in layers]]


SAID = {
    "fast": "memory fast: no layer runs again in backward",
    "auto": "memory auto: layers that the card has no room for run again in backward",
    "lean": "memory lean: every layer runs again in backward; inputs of layers move to the host from 8,192 tokens on, "
    "and experts walk tiles of tokens from 16,384 tokens and 1,024 rows an expert on",
}


@pytest.mark.parametrize("memory", SAID)
def test_explain_says_what_a_step_keeps_computes_again_and_moves(checkpoint: Checkpoint, memory: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")), memory=memory)
    assert str(expertune.explain(model)).splitlines()[-1] == SAID[memory]
    assert str(expertune.explain(expertune.optimize(model))).splitlines()[-1] == SAID[memory]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        assert "by gradient checkpointing that was turned on elsewhere" in str(expertune.explain(model))
        run(model, batch())
    model.gradient_checkpointing_disable()
    off = f"memory {memory}: no layer runs again in backward"
    assert str(expertune.explain(model)).splitlines()[-1].startswith(off)


def test_explain_says_nothing_of_memory_where_nobody_has_set_it(checkpoint: Checkpoint) -> None:
    assert "memory" not in str(expertune.explain(expertune.optimize(load_tiny(checkpoint("qwen3_moe")))))
