"""What tests of recordings begin with."""

import pytest

from tests.graphs.replayed import FakeCapture, Toy, make_recorder, toys


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


@pytest.fixture
def pair(capture: FakeCapture) -> tuple[Toy, Toy]:
    (toy,), (stock,) = toys(make_recorder(capture), 1)
    return toy, stock
