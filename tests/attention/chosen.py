"""Which kernels attended."""

import pytest

from expertune.attention import attend as attending
from expertune.attention.kernels import Kernel


def kernels_chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of those that are chosen from now on, in order."""
    seen: list[str] = []

    def spy(kernels: tuple[Kernel, ...], *args: object) -> tuple[Kernel, list[str]]:
        chosen, why = choose(kernels, *args)
        seen.append(chosen.name)
        return chosen, why

    choose = attending.choose
    monkeypatch.setattr(attending, "choose", spy)
    return seen
