"""Pieces that others look into: a piece within a piece, observers, hooks that come later."""

from typing import Any

import torch
from torch import Tensor, nn

from expertune.graphs.piece import Piece
from expertune.graphs.recorder import Recorder
from tests.graphs.replayed import FakeCapture, Toy, assert_same, gradients, inputs, make_recorder, toys


class Pair(nn.Module):
    """A module with a piece in it."""

    def __init__(self, inner: Toy) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.inner(x, pair)[0].tanh()


def nested(capture: FakeCapture) -> tuple[Pair, Pair, Recorder]:
    recorder = make_recorder(capture)
    (toy,), (stock,) = toys(recorder, 1)
    outer = Pair(toy)
    outer.forward = Piece(outer, recorder)  # type: ignore[method-assign]
    return outer, Pair(stock), recorder


def assert_pairs_are_same(outer: Pair, stock: Pair, seed: int) -> None:
    results = []
    for module in (outer, stock):
        module.zero_grad()
        x, pair = inputs(seed)
        out = module(x, pair)
        out.square().sum().backward()
        results.append([out, *gradients(module, x)])
    torch.testing.assert_close(*results)


def test_of_two_pieces_the_outer_is_recorded(capture: FakeCapture) -> None:
    outer, stock, recorder = nested(capture)
    for seed in range(6):
        assert_pairs_are_same(outer, stock, seed)
    assert [piece.recordings for piece in recorder.pieces] == [0, 1]
    assert capture.replays == 4 * 2


def test_of_two_pieces_the_inner_is_recorded_where_the_outer_cannot_be(capture: FakeCapture) -> None:
    """And the outer once it can: the inner is then no longer asked."""
    outer, stock, recorder = nested(capture)
    handle = outer.inner.register_forward_hook(lambda *_: None)
    for seed in range(6):
        assert_pairs_are_same(outer, stock, seed)
    assert [piece.recordings for piece in recorder.pieces] == [1, 0]
    handle.remove()
    for seed in range(6):
        assert_pairs_are_same(outer, stock, seed)
    assert [piece.recordings for piece in recorder.pieces] == [1, 1]


def test_an_observer_gets_what_is_replayed(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    """With its gradient, in each step once."""
    toy, stock = pair
    host: Any = toy.forward._recorder.host  # type: ignore[attr-defined]
    toy.frozen.register_forward_hook(host.listen)
    heard: list[Tensor] = []
    stock.frozen.register_forward_hook(lambda _module, _args, out: heard.append(out))
    for seed in range(6):
        results = []
        for module, outs in ((toy, host.heard), (stock, heard)):
            outs.clear()
            module.zero_grad()
            x, others = inputs(seed)
            out = module(x, others)[0].sum()
            (observed,) = outs
            (out + observed.square().sum()).backward()
            results.append([observed, *gradients(module, x)])
        torch.testing.assert_close(*results)
    assert capture.replays == 4 * 2


def test_a_hook_that_comes_later_is_called(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    toy, _ = pair
    for seed in range(4):
        assert_same(*pair, seed)
    before = capture.replays
    heard: list[Any] = []
    toy.linear.register_forward_hook(lambda *call: heard.append(call))
    for seed in range(4):
        assert_same(*pair, seed)
    assert len(heard) == 4
    assert capture.replays == before
