"""Whole models on the CPU under settings of `memory` that would need a card, or a long batch."""

import pytest
from torch import nn

import expertune
from expertune.memory import policy
from expertune.memory.offload import Offload
from expertune.memory.planner import Planner
from expertune.memory.token_tiles import TokenTiles
from tests.memory.lanes import Lane

PLENTY, TOO_LITTLE = 2**40, -1


class Card:
    """A card on which nothing is ever counted, with so many bytes left.

    Args:
        left: may be set between steps.
    """

    def __init__(self, left: int = TOO_LITTLE) -> None:
        self.left = left

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def idle_part(self) -> float:
        return 0

    def free(self) -> int:
        return self.left


def lean(model: nn.Module, lane: Lane | None = None) -> None:
    """With inputs that are moved and batches that are walked in tiles, however short."""
    _set("lean", model, lane or Lane(), Card())


def auto(model: nn.Module, lane: Lane | None = None, card: Card | None = None) -> None:
    """The same in steps for which the card has too little left: all of them, unless a card is given."""
    _set("auto", model, lane or Lane(), card or Card())


def _set(memory: str, model: nn.Module, lane: Lane, card: Card) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "TokenTiles", lambda: TokenTiles(least_tokens=4, least_rows=0))
        patch.setattr(policy, "Offload", lambda: Offload(lambda _: lane, least_tokens=1))
        patch.setattr(policy, "Planner", lambda lean_from: Planner(lambda _: card, lean_from))
        expertune.optimize(model, memory=memory)
