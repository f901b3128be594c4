"""Which of our gates an experts module computes: found by trying them, so no model need be named.

A gate that none of ours gives runs as the host's own function: right, but slower.
"""

import copy
from collections.abc import Iterator
from itertools import product
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from expertune.activations import ClampedSwiGlu, Gate, GeGlu, HostGate, ReluSquared, SwiGlu
from expertune.hosts.formulas import agree

_FUSED: dict[str, Gate] = {
    "silu": SwiGlu(),
    "swish": SwiGlu(),
    "gelu": GeGlu("none"),
    "gelu_pytorch_tanh": GeGlu("tanh"),
}
# the names that hosts give to the settings of a clamped gate
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")


def gate_of(experts: nn.Module) -> Gate:
    """Our own gate where it gives the same numbers, the host's function otherwise."""
    module: Any = experts
    if not getattr(module, "has_gate", True):
        if type(module.act_fn) is type(ACT2FN["relu2"]):
            return ReluSquared()
        return HostGate(module.act_fn, name=f"{type(module.act_fn).__name__}, no gate")
    # Llama 4's experts have no such function, and compute what the default one does
    apply_gate = getattr(type(module), "_apply_gate", _default_apply_gate)
    if apply_gate is _default_apply_gate:
        for name, gate in _FUSED.items():
            if type(module.act_fn) is type(ACT2FN[name]):
                return gate
    draw = torch.Generator().manual_seed(0)
    normal_NG = torch.randn(64, 16, generator=draw, dtype=torch.float32, device="cpu")
    for gate in _candidates(module):
        h_NG = normal_NG * (2 * gate.limit if isinstance(gate, ClampedSwiGlu) else 1)  # beyond its clamps
        if agree(apply_gate(module, h_NG), gate.forward(h_NG)):
            return gate
    return HostGate(MethodType(apply_gate, _without_weights(module)))


def _without_weights(experts: nn.Module) -> nn.Module:
    """What a gate reads of an experts module: its settings and activation. A gate outlives its model, in caches."""
    twin = copy.copy(experts)
    twin._parameters = {}
    return twin


def _candidates(module: Any) -> Iterator[Gate]:
    """The gates of ours that the settings of a module could mean."""
    limits, alphas = (
        [value for name in names if isinstance(value := getattr(module, name, None), int | float)]
        for names in (_LIMITS, _ALPHAS)
    )
    alphas = list(dict.fromkeys([*alphas, 1.0]))
    for limit, alpha, shift, is_concatenated in product(limits, alphas, (0.0, 1.0), (True, False)):
        yield ClampedSwiGlu(alpha=alpha, limit=limit, shift=shift, is_concatenated=is_concatenated)
    for is_concatenated in (True, False):
        yield SwiGlu(is_concatenated=is_concatenated)
        yield GeGlu("none", is_concatenated=is_concatenated)
        yield GeGlu("tanh", is_concatenated=is_concatenated)
