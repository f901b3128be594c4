"""Factors stay packed from forward to backward where that costs little memory, and nowhere else."""

from typing import Any

import pytest
import torch

from expertune.hosts import transformers as host
from tests.conftest import Checkpoint
from tests.hosts.recorded import both, make, step, tokens


def test_factors_are_kept_packed_where_a_layer_is_recorded_or_checkpointed_or_keeps_more(
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
    kept.clear()
    plain = make(checkpoint("qwen3_moe"), "", graphs=False, memory="fast")
    factors = [
        p for name, p in plain.named_parameters() if "lora" in name and ".layers.0." in name and "experts" in name
    ]
    experts = next(m for m in plain.modules() if hasattr(m, "num_experts") and hasattr(m, "gate_up_proj"))
    a_token = plain.config.num_experts_per_tok * experts.gate_up_proj.shape[1]  # numbers of `h`
    enough = -(-3 * sum(p.numel() for p in factors) // a_token)
    for length in (enough - 1, enough):
        step(plain, tokens(0, batch=1, length=length))
    assert kept == [False, False, True, True], "a third of what is kept in any case, or less"
