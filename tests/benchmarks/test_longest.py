"""The longest context is found by bisection."""

import pytest

from sft_worker import longest

CASES = [
    (fits, most, limit)
    for limit in (131072, 262144, 3000)
    for most in (100, 1023, 1024, 2047, 2500, 40_000, 100_000, 10**9)
    for fits in (0, 64, 1000, 1024, 1500, 16384)
    if fits <= min(most, limit)
]


@pytest.mark.parametrize(("fits", "most", "limit"), CASES)
def test_it_is_near_the_most_that_trains(fits: int, most: int, limit: int) -> None:
    tried: list[int] = []

    def trains(context: int) -> bool:
        tried.append(context)
        return context <= most

    found = longest(trains, fits, limit)
    assert all(0 < context <= limit for context in tried)
    assert len(tried) == len(set(tried)) <= 20
    assert fits <= found <= most
    assert min(most, limit) - found <= max(1024, found // 16)
