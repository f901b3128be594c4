"""Gates against autograd of the host's own definition, in float64, at and beyond the clamps too."""

import pytest
import torch
import torch.nn.functional as F

from expertune.activations import ClampedSwiGlu, Gate, GeGlu, HostGate, ReluSquared, SwiGlu


def _glu(activation, is_concatenated):  # type: ignore[no-untyped-def]
    def definition(h):  # type: ignore[no-untyped-def]
        gate, up = h.chunk(2, -1) if is_concatenated else (h[..., ::2], h[..., 1::2])
        return activation(gate) * up

    return definition


def _clamped(h):  # type: ignore[no-untyped-def]
    gate, up = h[..., ::2].clamp(max=1.0), h[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


GATES = {
    "silu": (SwiGlu(), _glu(F.silu, True)),
    "silu interleaved": (SwiGlu(is_concatenated=False), _glu(F.silu, False)),
    "gelu": (GeGlu("none"), _glu(F.gelu, True)),
    "gelu tanh interleaved": (
        GeGlu("tanh", is_concatenated=False),
        _glu(lambda gate: F.gelu(gate, approximate="tanh"), False),
    ),
    "clamped": (ClampedSwiGlu(1.702, 1.0), _clamped),
    "clamped, not shifted": (
        ClampedSwiGlu(1.0, 1.0, shift=0.0, is_concatenated=True),
        lambda h: F.silu(h[..., :5].clamp(max=1.0)) * h[..., 5:].clamp(-1.0, 1.0),
    ),
    "host": (HostGate(_clamped), _clamped),
    "relu²": (ReluSquared(), lambda h: F.relu(h).square()),
    "no gate": (HostGate(lambda h: F.relu(h).square()), lambda h: F.relu(h).square()),
}


@pytest.mark.parametrize(("gate", "definition"), GATES.values(), ids=GATES)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_matches_autograd(gate: Gate, definition, num_rows: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    h_NG = torch.randn(num_rows, 10, dtype=torch.float64) * 2
    if num_rows:
        h_NG[0, :4] = torch.tensor([1.0, -1.0, 5.0, -5.0])  # at the clamp and beyond it
    leaf = h_NG.clone().requires_grad_()
    expected = definition(leaf)
    da_NF = torch.randn_like(expected)
    (expected_dh,) = torch.autograd.grad(expected, leaf, da_NF)
    before = h_NG.clone()
    a_NF, dh_NG = gate.backward(h_NG, da_NF)
    torch.testing.assert_close(gate.forward(h_NG), expected.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a_NF, expected.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dh_NG, expected_dh, rtol=1e-13, atol=1e-13)
    assert torch.equal(h_NG, before), "a gate wrote into what was saved for backward"
