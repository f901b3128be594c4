"""Factors stay packed from forward to backward where that costs little memory, and nowhere else."""

from typing import Any

import pytest
import torch

from expertune.hosts import transformers as host
from tests.conftest import Checkpoint
from tests.hosts.recorded import both, make, step, tokens


def test_factors_are_kept_packed_where_a_layer_is_recorded_or_checkpointed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the factors beside every layer's activations would be dear at short context."""
    real, kept = host.experts, []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append(kwargs["keeps_packed"])
        return real(*args, **kwargs)

    monkeypatch.setattr(host, "experts", spy)
    ours, _, _ = both(checkpoint("qwen3_moe"), memory="fast")
    for seed in range(2):
        step(ours, tokens(seed))
    assert kept == [False] * 4
    kept.clear()
    step(ours, tokens(2))
    assert kept and all(kept), "recorded"
    step(ours, tokens(3, length=13))
    assert kept[-2:] == [False] * 2, "recording is over"
    kept.clear()
    step(make(checkpoint("qwen3_moe"), "", graphs=False, memory="lean"), tokens(0))
    assert kept == [True] * 4, "once and again"
