"""Whole models on the CPU under settings of `memory` that would need a card, or a long batch."""

import pytest
from torch import nn

import expertune
from expertune.memory import policy
from expertune.memory.offload import Offload
from expertune.memory.token_tiles import TokenTiles
from tests.memory.lanes import Lane


def lean(model: nn.Module, lane: Lane | None = None) -> None:
    """With inputs that are moved and batches that are walked in tiles, however short."""
    lane = lane or Lane()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "TokenTiles", lambda: TokenTiles(least_tokens=4, least_rows=0))
        patch.setattr(policy, "Offload", lambda: Offload(lambda _: lane, least_tokens=1))
        expertune.optimize(model, memory="lean")
