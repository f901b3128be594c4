"""Which device a process takes, on machines of made-up devices."""

import pytest
import torch

from expertune.hosts.own_device import take_own_device


@pytest.mark.parametrize(
    ("rank", "count", "before", "after"),
    [
        (None, 2, 0, 0),
        ("0", 2, 0, 0),
        ("1", 2, 0, 1),
        ("1", 1, 0, 0),  # each process sees but its own
        ("1", 4, 3, 3),  # chosen before
    ],
)
def test_takes_the_device_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, count: int, before: int, after: int
) -> None:
    current = [before]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert take_own_device() == after == current[0]
