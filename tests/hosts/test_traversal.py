"""The number of parameters, as the host counts it, and training, as the host sets it."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import expertune
from expertune.hosts import traversal
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
    silu = model.model.layers[0].mlp.experts.act_fn
    silu.register_parameter("first", nn.Parameter(torch.ones(7)))
    assert model.num_parameters() == before + 27
    assert any(parameter is silu.first for parameter in model.parameters())
    model.extra.bias = None
    assert model.num_parameters() == before + 22
    assert model.num_parameters(only_trainable=True) == before + 22
    model.extra.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == before + 7


@pytest.mark.parametrize("ties", [False, True])
def test_parameters_come_in_the_hosts_order(checkpoint: Checkpoint, ties: bool) -> None:
    """Also of what PEFT has wrapped, after modules have come and gone, and of a copy."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe", tie_word_embeddings=ties)))
    wrapped = expertune.add_lora(model, r=2, target_modules=["q_proj", "gate_up_proj"])
    assert traversal.is_bound(wrapped, "parameters")

    def check(outer: nn.Module) -> None:
        theirs = list(nn.Module.parameters(outer))
        assert list(map(id, outer.parameters())) == list(map(id, theirs))
        assert list(map(id, outer.parameters(recurse=False))) == list(
            map(id, nn.Module.parameters(outer, recurse=False))
        )

    def check_all() -> None:
        check(model)
        check(wrapped)

    check_all()
    block = model.model.layers[0].mlp
    block.gate, block.extra = nn.Linear(3, 5), nn.ModuleList([nn.Linear(2, 2)])
    check_all()
    block.extra[0] = nn.Embedding(3, 3)
    check_all()
    block.extra[0].weight = nn.Parameter(block.extra[0].weight.detach().clone())
    block.extra[0].register_parameter("none", None)
    check_all()
    del block.extra
    check_all()
    twin = copy.deepcopy(wrapped)
    twin.extra = nn.Linear(2, 2)
    check(twin)
    check(twin.get_base_model())
    check_all()


def test_gradients_are_dropped_as_torch_drops_them(checkpoint: Checkpoint) -> None:
    wrapped = expertune.add_lora(expertune.optimize(load_tiny(checkpoint("qwen3_moe"))), r=2, target_modules=["q_proj"])
    wrapped(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    trained = [p for p in nn.Module.parameters(wrapped) if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    wrapped.zero_grad()
    assert all(p.grad is None for p in trained)


def test_every_module_trains_as_the_hosts_do(checkpoint: Checkpoint) -> None:
    """Dropout too, and what has been set apart; the whole model, and as what PEFT wraps."""
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    wrapped = expertune.add_lora(model, r=2, target_modules=["q_proj"], lora_dropout=0.1)
    for mode in (True, False):
        for outer in (model, wrapped):
            for module in wrapped.modules():
                vars(module)["training"] = not mode
            model.lm_head.training = mode
            assert outer.train(mode) is outer
            assert {module.training for module in outer.modules()} == {mode}
    assert not wrapped.train().eval().training
    assert not model.lm_head.training
    with pytest.raises(ValueError, match="boolean"):
        model.train("yes")


def test_a_module_with_a_way_of_its_own_is_asked(checkpoint: Checkpoint) -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False) if mode else super().train(mode)

    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    model.of_a_class = Frozen(nn.Dropout())
    model.of_its_own = nn.Sequential(nn.Dropout())
    asked: list[bool] = []
    vars(model.of_its_own)["train"] = asked.append
    model.train()
    assert model.training
    assert not model.of_a_class.training
    assert not model.of_a_class[0].training
    assert asked == [True]


def test_a_model_with_a_way_of_its_own_is_left_to_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    asked: list[bool] = []
    monkeypatch.setattr(type(model), "train", lambda self, mode=True: asked.append(mode) or self)
    assert model.train(False) is model
    assert asked == [False]


def test_they_are_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    names = {"parameters", "num_parameters", "train"}
    assert names <= set(vars(model))
    expertune.restore(model)
    assert not names & set(vars(model))
    model.train = other = lambda mode=True: model
    expertune.optimize(model)
    expertune.restore(model)
    assert model.train is other
