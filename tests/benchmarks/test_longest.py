"""The longest context is found by bisection."""

import pytest

from sft_worker import longest


@pytest.mark.parametrize("limit", [131072, 262144, 3000])
@pytest.mark.parametrize("fits", [0, 64, 1000, 1024, 1500, 16384])
@pytest.mark.parametrize("most", [100, 1023, 1024, 2047, 2500, 40_000, 100_000, 10**9])
def test_it_is_near_the_most_that_trains(fits: int, most: int, limit: int) -> None:
    tried: list[int] = []

    def trains(context: int) -> bool:
        tried.append(context)
        return context <= most

    if not fits <= min(most, limit):
        pytest.skip("what is known to train does")
    found = longest(trains, fits, limit)
    assert all(0 < context <= limit for context in tried)
    assert len(tried) == len(set(tried)) <= 20
    assert fits <= found <= max(most, fits)
    assert min(most, limit) - found <= max(1024, found // 16)
