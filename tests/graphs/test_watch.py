"""Whether modules are as they were: whatever is done to them is seen, and items are read only where one was set."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from expertune.graphs.watch import Watch
from tests.graphs.replayed import Toy


@pytest.fixture
def toy() -> Toy:
    toy = Toy()
    toy.linear.register_buffer("table", torch.zeros(2))
    return toy


def _swap(toy: Toy) -> None:
    toy.linear._parameters["weight"] = nn.Parameter(toy.linear.weight.detach().clone())


def _move(toy: Toy) -> None:
    toy.linear.weight.data = toy.linear.weight.data.clone()


def _exchange(toy: Toy) -> None:
    toy._modules["linear"], toy._modules["frozen"] = toy.frozen, toy.linear


def _hook(toy: Toy) -> None:
    toy.linear.register_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Toy], object]] = {
    "another parameter": _swap,
    "another place of one": _move,
    "a parameter that is trained now": lambda toy: toy.frozen.requires_grad_(True),
    "a parameter less": lambda toy: toy.linear.register_parameter("bias", None),
    "another buffer": lambda toy: setattr(toy.linear, "table", torch.zeros(2)),
    "a module more": lambda toy: toy.linear.add_module("more", nn.Identity()),
    "modules in each other's places": _exchange,
    "a setting": lambda toy: setattr(toy, "scale", 3.0),
    "a hook inside": _hook,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(toy: Toy, change: Callable[[Toy], object]) -> None:
    watch = Watch(toy)
    assert watch.is_same()
    change(toy)
    assert not watch.is_same()
    assert not watch.is_same(), "also when it is asked again"


def test_what_was_put_back_is_the_same_and_items_are_read_only_where_one_was_set(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(toy)
    reads: list[Tensor] = []
    read_items = watch._read_items
    monkeypatch.setattr(watch, "_read_items", lambda: reads.append(toy.linear.weight) or read_items())
    weight = toy.linear.weight
    assert watch.is_same()
    assert not reads
    _swap(toy)
    assert not watch.is_same()
    toy.linear._parameters["weight"] = weight
    assert watch.is_same()
    assert len(reads) == 2
    assert watch.is_same()
    assert len(reads) == 2
