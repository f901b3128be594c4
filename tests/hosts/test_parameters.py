"""The number of parameters, as the host counts it."""

import copy
from itertools import product

import pytest
from torch import nn

import expertune
from expertune.hosts import parameters
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_hosts(checkpoint: Checkpoint, ties: bool) -> None:
    """With tied embeddings or not, frozen, and with adapters."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe", tie_word_embeddings=ties)).requires_grad_(False))
    host = type(model).num_parameters
    for has_adapters in (False, True):
        if has_adapters:
            assert expertune.add_lora(model, r=2, target_modules=["q_proj"]).num_parameters() == host(model)
        for flags in product((False, True), repeat=2):
            assert model.num_parameters(*flags) == host(model, *flags)
            named = dict(zip(("only_trainable", "exclude_embeddings"), flags, strict=True))
            assert model.num_parameters(**named) == host(model, **named)


def test_it_follows_what_changes(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    before = model.num_parameters()
    model.extra = nn.Linear(3, 5)
    assert model.num_parameters() == before + 20
    twin = copy.deepcopy(model)
    twin.extra = None
    assert twin.num_parameters() == before
    assert model.num_parameters() == before + 20


def test_it_is_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    assert "num_parameters" in vars(model)
    expertune.restore(model)
    assert "num_parameters" not in vars(model)
    assert model.num_parameters() == parameters.count(model)
