"""Plans: memory is shared by what is not alive together, and is not held early where it is much."""

import pytest
import torch

from expertune.kernels import plan as plans
from expertune.kernels.plan import Buffer, Form, Plan, Pointee, plan
from expertune.kernels.submit import Spot


def _buffer(num_bytes: int) -> Buffer:
    return Buffer(Form((num_bytes,), (1,), torch.uint8))


def _plan(launches: list[list[tuple[int | Buffer, int]]], results: list[Buffer]) -> Plan:
    for i, pointees in enumerate(launches):
        for owner, _ in pointees:
            if isinstance(owner, Buffer):
                owner.last = i
                owner.first = i if owner.first is None else owner.first
    return plan([[Pointee(*pointee) for pointee in pointees] for pointees in launches], 2, results)


def test_what_is_not_alive_together_shares_a_block() -> None:
    a, b, c, out = (_buffer(size) for size in (1000, 300, 900, 500))
    made = _plan([[(0, 0), (a, 0)], [(a, 16), (b, 0)], [(b, 0), (c, 0)], [(c, 0), (1, 8), (out, 0)]], [out])
    (stretch,) = made.stretches
    assert stretch.launches == range(4)
    assert stretch.born == [(2, out.form), (3, Form((1024 + 512,), (1,), torch.uint8))], "c takes the place of a"
    assert stretch.dead == [3]
    assert made.spots == [
        [Spot(0, 0), Spot(3, 0)],
        [Spot(3, 16), Spot(3, 1024)],
        [Spot(3, 1024), Spot(3, 0)],
        [Spot(3, 0), Spot(1, 8), Spot(2, 0)],
    ]


def test_large_tensors_live_from_their_first_to_their_last_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST_AT_ONCE", 100)
    a, b, out = (_buffer(size) for size in (1000, 1000, 500))
    made = _plan([[(0, 0), (a, 0)], [(a, 0), (b, 0)], [(b, 0), (out, 0)]], [out])
    assert [(s.launches, [p for p, _ in s.born], s.dead) for s in made.stretches] == [
        (range(1), [3], []),
        (range(1, 2), [4], [3]),
        (range(2, 3), [2], [4]),
    ]
    assert made.num_places == 5
    assert made.spots[2] == [Spot(4, 0), Spot(2, 0)]


def test_what_is_taken_in_all_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, num_stretches in ((1523, 2), (1524, 1)):
        monkeypatch.setattr(plans, "_MOST_AT_ONCE", most)
        a, out = _buffer(1000), _buffer(500)
        assert len(_plan([[(a, 0)], [(1, 0), (out, 0)]], [out]).stretches) == num_stretches
