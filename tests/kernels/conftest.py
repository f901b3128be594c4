"""Attention's backward with other bounds than a card's."""

from typing import Any

import pytest


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """On the bytes of the gradient of scores."""
    from expertune.attention import backward

    monkeypatch.setattr(backward, "_LEAST", request.param)
    monkeypatch.setattr(backward, "_A_TOKEN", 0)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of samples that were cut in halves, of which none is too short."""
    from expertune.attention import backward, backward_halves

    lengths: list[int] = []
    sample = backward_halves.sample

    def counted(kernels: Any, given: Any, *others: Any) -> None:
        lengths.append(len(given.q_THD))
        sample(kernels, given, *others)

    monkeypatch.setattr(backward_halves, "sample", counted)
    monkeypatch.setattr(backward, "_FEWEST_WAVES", 0)
    return lengths
