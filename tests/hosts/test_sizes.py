"""The bytes that a model is said to take at least, against those of real steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.hosts.sizes import model_bytes
from expertune.memory.needs import LayerBytes
from expertune.optim.adamw_8bit import AdamW8bit
from tests.conftest import Checkpoint
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.memory.saved import SavedBytes, least_saved

# Experts as wide beside the rest of a layer as those that people train.
LARGE = {"moe_intermediate_size": 192, "num_experts_per_tok": 4, "num_hidden_layers": 6, "vocab_size": 64}
ROWS, LENGTH = 2, 11


def adapted(model: Any, **settings: Any) -> Any:
    return expertune.add_lora(model, **{"r": 4, "init_lora_weights": False} | settings)


def full(model: Any) -> Any:
    return model.requires_grad_(True)


def saved(model: nn.Module, length: int = LENGTH) -> int:
    counted = SavedBytes(model)
    with counted.counting():
        model(**batch(num_rows=ROWS, length=length)).loss.backward()
    return counted.peak


@pytest.mark.parametrize("memory", ["fast", "auto"])
@pytest.mark.parametrize("train", [adapted, full])
@pytest.mark.parametrize("family", [*CONFIGS, "gemma3_text"])
def test_no_step_saves_less(checkpoint: Checkpoint, family: str, train: Callable[[Any], Any], memory: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family)), memory=memory)
    trained = train(model)
    assert least_saved(model, memory, ROWS * LENGTH) <= saved(trained)


@pytest.mark.parametrize(("memory", "length"), [("fast", LENGTH), ("auto", 8 * LENGTH)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_of_what_a_step_saves_is_counted(
    checkpoint: Checkpoint, memory: str, length: int, dtype: torch.dtype
) -> None:
    """Left out are norms, attention, the router, the logits, and the factors that a layer packs when it runs again."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe", **LARGE), dtype), memory=memory)
    trained = adapted(model)
    counted = saved(trained, length)
    assert 0.6 * counted <= least_saved(model, memory, ROWS * length) <= counted


def test_layers_keep_the_bytes_of_the_formula(checkpoint: Checkpoint) -> None:
    """docs/design.md has 16 bytes a row, of which 4 are the router's weight in float32; in 16 bits it takes 2."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe", **LARGE), torch.bfloat16), memory="fast")
    adapted(model, r=16)
    width, hidden, top_k, rank = 32, 192, 4, 16
    kept = 2 * width + top_k * (4 * hidden + 4 * rank + 14)
    assert model_bytes(model).layers == (LayerBytes(input=2 * width, kept=kept),) * 6


def test_layers_before_the_first_that_is_trained_keep_nothing(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe", **LARGE)), memory="auto")
    trained = adapted(model, target_modules=["layers.4.self_attn.q_proj"])
    first, second = model_bytes(model).layers
    assert (first.kept, first.input) == (0, second.input), "the experts of the first come before any gradient"
    assert second.kept
    for memory in ("fast", "auto"):
        expertune.optimize(model, memory=memory)
        assert 0 < least_saved(model, memory, ROWS * LENGTH) <= saved(trained)


@pytest.mark.parametrize("train", [adapted, full])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_gradients_and_optimizer_state(
    checkpoint: Checkpoint, family: str, train: Callable[[Any], Any]
) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family), torch.float32), memory="fast")
    trained = train(model)
    counted = model_bytes(model)
    by_kind = {kind: [p for p in trained.parameters() if p.requires_grad is kind] for kind in (True, False)}
    assert (counted.trained, counted.base) == tuple(sum(p.nbytes for p in by_kind[kind]) for kind in (True, False))

    trained(**batch()).loss.backward()
    gradients = sum(p.grad.nbytes for p in by_kind[True] if p.grad is not None)
    assert 0.7 * gradients <= counted.gradients <= gradients
    for optimizer_class, state in ((torch.optim.AdamW, 2 * counted.gradients), (AdamW8bit, 2 * counted.num_gradients)):
        optimizer = optimizer_class(by_kind[True], lr=0)
        optimizer.step()
        held = sum(
            value.nbytes for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)
        )
        assert 0.6 * held <= state <= held
