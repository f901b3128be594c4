"""What a card can run, and the tables that are shipped."""

from dataclasses import replace

import pytest

from expertune.kernels.tuning.configs import (
    Config,
    LinearConfig,
    LinearShape,
    Shape,
    ShrinkConfig,
    ShrinkShape,
    why_not,
)
from expertune.kernels.tuning.tables import OPERATIONS, candidates, shipped

LINEAR = LinearShape(2048, 1536, 16, True)
SHRINK = ShrinkShape(2048, 16, True, True)
# a card of each kind and two that no table names
CARDS = [(0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
SHAPES: list[Shape] = [LINEAR, LinearShape(64, 64, 0, False), SHRINK, ShrinkShape(2048, 8, False, True)]
SHAPES += [ShrinkShape(7168, rank, False, False) for rank in (64, 128, 512)]


@pytest.mark.parametrize(
    ("config", "shape", "card", "itemsize", "words"),
    [
        (LinearConfig(256, 64, 8, 4), LINEAR, (9, 0), 2, None),
        (LinearConfig(256, 64, 8, 4), LINEAR, (9, 0), 4, "384 KiB of shared memory, the card has 227"),
        (LinearConfig(256, 64, 8, 4), LINEAR, (8, 0), 2, "192 KiB of shared memory, the card has 163"),
        (LinearConfig(256, 64, 8, 3), LINEAR, (8, 0), 2, None),
        (LinearConfig(256, 64, 8, 3), LINEAR, (8, 9), 2, "144 KiB of shared memory, the card has 99"),
        (LinearConfig(128, 64, 8, 3), LINEAR, (12, 0), 2, None),
        (LinearConfig(128, 64, 8, 3), LINEAR, (7, 5), 2, "96 KiB of shared memory, the card has 64"),
        (LinearConfig(256, 16, 8, 1), LINEAR, (7, 5), 4, "128 KiB of shared memory"),  # the tile that is stored
        (LinearConfig(256, 64, 4, 3), LINEAR, (9, 0), 2, "256 registers a thread for its sums, 128 can be had"),
        (LinearConfig(512, 16, 16, 2), LINEAR, (9, 0), 2, "128 registers a thread for its sums, 64 can be had"),
        (LinearConfig(64, 32, 4, 3), LINEAR, (9, 0), 4, "64 registers a thread for its sums, 32 can be had"),
        (LinearConfig(96, 64, 4, 3), LINEAR, (9, 0), 2, "columns must be a power of two, got 96"),
        (LinearConfig(64, 8, 4, 3), LINEAR, (9, 0), 2, "depth must be from 16 to 1024, got 8"),
        (LinearConfig(64, 64, 0, 3), LINEAR, (9, 0), 2, "num_warps must be from 1 to 16, got 0"),
        (LinearConfig(64, 64, 4, -1), LINEAR, (9, 0), 2, "num_stages must be from 1 to 8, got -1"),
        (ShrinkConfig(128, 64, 4, 3), SHRINK, (7, 5), 2, None),
        (ShrinkConfig(128, 64, 4, 3), replace(SHRINK, rank=100), (7, 5), 2, "96 KiB"),
    ],
)
def test_why_not(config: Config, shape: Shape, card: tuple[int, int], itemsize: int, words: str | None) -> None:
    reason = why_not(config, shape, card, itemsize)
    assert reason is None if words is None else reason is not None and words in reason


@pytest.mark.parametrize("rows", [32, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_card_has_a_configuration_that_fits_and_candidates(
    shape: Shape, card: tuple[int, int], itemsize: int, rows: int
) -> None:
    current = shipped(shape, card, itemsize, rows)
    assert why_not(current, shape, card, itemsize) is None
    tried = candidates(shape, card, itemsize, current)
    assert tried[0] == current
    assert 2 <= len(tried) <= 12
    assert len(set(tried)) == len(tried)
    assert {type(config) for config in tried} == {OPERATIONS[type(shape)].config}
    assert all(why_not(config, shape, card, itemsize) is None for config in tried)


def test_what_was_measured_on_hopper_is_shipped() -> None:
    few, some, many = ShrinkConfig(128, 128, 8, 3), ShrinkConfig(128, 64, 4, 3), ShrinkConfig(128, 128, 4, 3)
    assert shipped(LINEAR, (9, 0), 2, 256) == LinearConfig(256, 64, 8, 4)
    for is_gathered, by_rows in ((True, {128: few, 256: some, 1024: many}), (False, {128: few, 256: some, 1024: some})):
        for rows, config in by_rows.items():
            assert shipped(replace(SHRINK, is_gathered=is_gathered), (9, 0), 2, rows) == config


@pytest.mark.parametrize(("rank", "block"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (512, 128)])
def test_ranks_a_program(rank: int, block: int) -> None:
    assert ShrinkConfig(128, 64, 4, 3).block(rank) == block
