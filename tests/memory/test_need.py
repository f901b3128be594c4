"""What is known of a step's need: never less than was seen, and no more than follows from it."""

import random

from expertune.memory.need import Need


def _need(*steps: tuple[int, float, float]) -> Need:
    need = Need()
    for tokens, least, most in steps:
        need.learn(tokens, least, most)
    return need


def test_nothing_is_known_at_first() -> None:
    assert Need().of(1) is None


def test_a_shorter_batch_takes_no_more_and_a_longer_one_no_more_than_it_scaled() -> None:
    need = _need((100, 500, 500))
    assert [need.of(tokens) for tokens in (1, 100, 101, 200)] == [500, 500, 505, 1000]


def test_a_longer_batch_says_more_of_long_ones_and_a_shorter_one_of_short_ones() -> None:
    need = _need((100, 500, 500), (200, 600, 600))
    assert [need.of(tokens) for tokens in (50, 100, 110, 150, 200, 400)] == [500, 500, 550, 600, 600, 1200]


def test_what_was_seen_refutes_what_was_scaled() -> None:
    need = _need((100, 500, 500), (200, 5000, 5000))
    assert [need.of(tokens) for tokens in (100, 200)] == [5000, 5000]


def test_where_only_a_bound_was_seen_what_follows_from_others_stands() -> None:
    need = _need((100, 500, 500), (200, 0, 5000))
    assert [need.of(tokens) for tokens in (100, 200, 300)] == [500, 1000, 1500]
    assert _need((100, 500, 500), (200, 700, 800)).of(200) == 800
    assert _need((100, 500, 500), (200, 1100, 1300)).of(200) == 1100


def test_a_length_that_took_less_once_more_may_take_as_much_again() -> None:
    need = _need((100, 500, 500), (100, 300, 300))
    assert need.of(100) == 500
    need.learn(100, 700, 700)
    assert need.of(100) == 700


def test_it_never_falls_below_an_affine_truth_and_holds_little() -> None:
    """Of steps that take `1000 + 3 T`, in any order, some seen only as bounds."""
    chance = random.Random(0)
    need = Need()
    for _ in range(300):
        tokens = chance.randint(1, 10_000)
        truth = 1000 + 3 * tokens
        is_exact = chance.random() < 0.5
        need.learn(tokens, truth if is_exact else 0, truth if is_exact else truth + chance.randint(0, 5000))
        for other in (1, tokens, 10_000, chance.randint(1, 20_000)):
            known = need.of(other)
            assert known is not None
            assert known >= (1000 + 3 * other) * (1 - 1e-12)
    assert need.of(10_000) is not None
