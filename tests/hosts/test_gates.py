"""Gates found by trying: ours where the numbers agree, also beyond a clamp, and the host's own where they do not."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.activations import ClampedSwiGlu, Gate, GeGlu, HostGate, ReluSquared, SwiGlu
from expertune.hosts.gates import gate_of
from tests.families.found import families
from tests.families.proof import experts_of
from tests.families.tiny import tiny_model

UNSHIFTED = ClampedSwiGlu(1.0, 10.0, shift=0.0, is_concatenated=True)
FOUND: dict[str, Gate] = {
    "qwen3_moe": SwiGlu(),
    "gemma4": GeGlu("tanh"),
    "gpt_oss": ClampedSwiGlu(1.702, 7.0),
    "openai_privacy_filter": ClampedSwiGlu(1.702, 7.0, is_concatenated=True),
    "deepseek_v4": UNSHIFTED,
    "hy_v4": UNSHIFTED,
    "glm5_next": UNSHIFTED,
    "lfm2_moe": SwiGlu(),
    "nemotron_h": ReluSquared(),
}


@pytest.mark.parametrize("family", FOUND)
def test_the_gate_of_a_family(family: str) -> None:
    if family not in families():
        pytest.skip("this version of the host does not know it")
    for module in experts_of(tiny_model(families()[family])).values():
        assert gate_of(module) == FOUND[family]


class _Experts(nn.Module):
    """A host's gate with settings."""

    def __init__(self, gate: Any, **settings: float) -> None:
        super().__init__()
        vars(self).update(settings)
        self._gate = gate

    def _apply_gate(self, h: Tensor) -> Tensor:
        result: Tensor = self._gate(*h.chunk(2, -1))
        return result


def test_a_gate_of_its_own_stays_the_hosts() -> None:
    softer = _Experts(lambda g, u: F.silu(g.clamp(max=3.0)) * u, limit=3.0)  # clamps one side alone
    gate = gate_of(softer)
    assert isinstance(gate, HostGate)
    h = torch.linspace(-8, 8, 40).view(4, 10)
    assert torch.equal(gate.forward(h), softer._apply_gate(h))


def test_a_gate_of_the_hosts_keeps_no_weights_alive() -> None:
    softer = _Experts(lambda g, u: F.silu(g.clamp(max=3.0)) * u, limit=3.0)
    softer.gate_up_proj = nn.Parameter(torch.ones(2, 4, 4))
    weight, gate = weakref.ref(softer.gate_up_proj), gate_of(softer)
    del softer
    gc.collect()
    assert weight() is None
    assert gate.forward(torch.ones(1, 4)).shape == (1, 2)


def test_settings_are_tried_and_not_trusted() -> None:
    plain = _Experts(lambda g, u: F.silu(g) * u, limit=3.0, alpha=2.0)
    assert gate_of(plain) == SwiGlu()
