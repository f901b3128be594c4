"""How many kinds of calls are recorded, in which way, and what becomes of their memory where it is wanted."""

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expertune.graphs.piece import MOST_TOKENS, Piece
from expertune.graphs.pool import Pool
from tests.graphs.replayed import FakeCapture, Toy, assert_same, inputs, make_recorder, toys
from tests.hosts.memories import PLENTY, TOO_LITTLE, Card


def test_only_so_many_tokens_and_kinds_are_kept(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    for length, recordings in ((MOST_TOKENS + 1, 0), (3, 1), (4, 2), (5, 2)):
        for seed in range(4):
            assert_same(*pair, seed, length)
        assert len(capture.recorded) == 2 * recordings


def test_room_is_made_once_for_all_that_are_recorded_together(capture: FakeCapture) -> None:
    pairs = list(zip(*toys(make_recorder(capture), 3), strict=True))
    for length in (3, 4):
        for seed in range(4):
            for toy, stock in pairs:
                assert_same(toy, stock, seed, length)
    assert len(capture.recorded) == 2 * 2 * 3
    assert capture.rooms == [0, 2 * 3]


def test_room_is_made_for_those_that_run_again_too(capture: FakeCapture) -> None:
    """Beside one that keeps."""
    (kept, *others), (stock, *_) = toys(make_recorder(capture), 3)
    for seed in range(4):
        assert_same(kept, stock, seed)
    for _ in range(3):
        found = [cast(Piece, toy.forward).running_again(inputs(0), {}, nullcontext, may_keep=False) for toy in others]
    assert None not in found
    assert capture.recorded == [True, False, *[False] * 4]
    assert capture.rooms == [0, 2]


def test_kinds_beyond_those_that_keep_run_again(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    piece: Any = pair[0].forward
    recorded: list[bool] = []
    for length, keeps in ((3, True), (4, True), (5, False), (6, False)):
        for seed in range(4):
            assert capture.recorded == recorded + ([keeps, False] if seed == 3 else [])
            args, before = inputs(seed, length), capture.replays
            with piece.running_again(args, {}, nullcontext, may_keep=True):
                torch.testing.assert_close(*[toy(*args) for toy in pair])
            assert capture.replays == before + (seed >= 2)
        recorded += [keeps, False]
    assert piece.running_again(inputs(0, 3), {}, nullcontext, may_keep=False) is None
    assert capture.recorded == recorded


def test_memory_is_given_back_once_the_layer_runs_twice_and_memory_is_short(
    pair: tuple[Toy, Toy], capture: FakeCapture
) -> None:
    toy, _ = pair
    card = Card(PLENTY)
    piece: Any = toy.forward
    piece._recorder._pool_of = lambda _: Pool(capture, card)

    def run_twice() -> None:
        x, others = inputs(0)
        checkpoint(toy, x, others, use_reentrant=False)[0].sum().backward()

    for _ in range(4):
        card.left = PLENTY
        for seed in range(3):
            assert_same(*pair, seed)
        recorded = piece.recordings
        run_twice()
        assert piece.recordings == recorded
        card.left = TOO_LITTLE
        run_twice()
        assert piece.recordings == 0
    assert len(capture.recorded) == 3 * 2  # then it no longer tries


@pytest.mark.parametrize("is_short", [False, True])
def test_memory_is_given_back_for_calls_that_are_not_recorded_if_it_is_short(
    pair: tuple[Toy, Toy], capture: FakeCapture, is_short: bool
) -> None:
    card = Card(PLENTY)
    piece: Any = pair[0].forward
    piece._recorder._pool_of = lambda _: Pool(capture, card)
    for seed in range(4):
        assert_same(*pair, seed)
    assert piece.holds(5)
    assert not piece.holds(4)
    card.left = TOO_LITTLE if is_short else 0
    assert_same(*pair, 4, length=4)
    assert piece.recordings == (0 if is_short else 1)
