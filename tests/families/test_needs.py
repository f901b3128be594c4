"""What a step is said to take at least, against what steps of every family save and give gradients."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedModel

import expertune
from expertune.hosts.sizes import model_bytes
from tests.families import proof
from tests.families.found import families
from tests.families.tiny import tiny_model
from tests.memory.saved import SavedBytes, least_saved

NUM_TOKENS = 22  # of `proof.run`


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(families()[request.param]).float()


@pytest.mark.parametrize(
    ("is_full", "memory"),
    [
        pytest.param(False, "auto", id="lora-auto"),
        pytest.param(True, "fast", id="full-fast"),
        # each is tested with another
        pytest.param(False, "fast", id="lora-fast", marks=pytest.mark.thorough),
        pytest.param(True, "auto", id="full-auto", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("model", families(), indirect=True)
def test_no_step_takes_less(model: PreTrainedModel, is_full: bool, memory: str) -> None:
    trained: Any = copy.deepcopy(model).requires_grad_(True) if is_full else proof.with_adapters(model)
    expertune.optimize(trained, backend="native_torch", memory=memory)
    inner = trained if is_full else trained.get_base_model()
    counted = SavedBytes(trained)
    with counted.counting():
        grads = proof.run(trained)
    least = least_saved(inner, memory, NUM_TOKENS)
    assert least <= counted.peak
    assert least > 0 or not model.supports_gradient_checkpointing
    given = sum(grad.nbytes for name, grad in grads.items() if name != "out" and grad is not None)
    assert 0 < model_bytes(inner).gradients <= given
