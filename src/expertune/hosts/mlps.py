"""Dense gated MLPs, of dense layers and shared experts, as one node of autograd that keeps half as much for backward.

The hosts' classes are many and nearly all alike. One is taken over if, on random numbers, a small instance gives what
the formula gives: `down(act(gate(x)) · up(x))`, with an activation that a gate of ours knows.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.activations import Gate, HostGate
from expertune.gated_mlp import gated_mlp
from expertune.hosts import formulas, gates, lora_layers
from expertune.hosts.formulas import Found
from expertune.memory.replay import RoutingReplay

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_AGREES = 1e-5  # float32 rounding, relative; another formula is off by more than a tenth
_WIDTH, _INNER = 6, 10  # of the instance that is tried


def find(model: nn.Module) -> list[tuple[nn.Module, Found[Gate]]]:
    """The MLPs that follow the formula, and by which gate. Changes nothing."""
    return formulas.find(model, _has_parts, gate_of)


def forward(mlp: Any, found: Found[Gate], replay: RoutingReplay, x: Tensor) -> Tensor:
    """Ours where its linears are plain and frozen, all in one dtype; otherwise the host's own.

    Args:
        mlp: the module.
        found: its gate.
        replay: of its model, which knows whether the layer runs again, and in tiles.
        x: `(…, I)`.
    """
    if not torch.compiler.is_compiling() and (gate := found.of(mlp)) is not None:
        gate_proj, up_proj, down_proj = (lora_layers.plain_linear(getattr(mlp, name), x) for name in _LINEARS)
        if gate_proj is not None and up_proj is not None and down_proj is not None:
            return gated_mlp(x, gate, (gate_proj, up_proj, down_proj), _tile(replay, x))
    given: Tensor = type(mlp).forward(mlp, x)
    return given


def _tile(replay: RoutingReplay, x: Tensor) -> int | None:
    """Tokens of a tile, where the layer is a lean one and the batch long."""
    tiles = None if replay.tape is None else replay.tape.tiles
    return None if tiles is None else tiles.dense_length(x.shape[:-1].numel())


def _has_parts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in (*_LINEARS, "act_fn"))


def gate_of(mlp: nn.Module) -> Gate | None:
    """The gate with which a small MLP of this kind computes the formula; None if it computes another.

    Its class is asked, past hooks and replaced forwards.
    """
    host: Callable[..., Tensor] = type(mlp).forward
    others = mlp._modules.keys() - {*_LINEARS, "act_fn"}
    if others or mlp._parameters or mlp._buffers or len(inspect.signature(host).parameters) != 2:
        return None
    gate = gates.gate_of(mlp)
    if isinstance(gate, HostGate):
        return None
    draw = torch.Generator().manual_seed(0)
    twin = copy.copy(mlp)
    small = {name: nn.Linear(*_sides(name), dtype=torch.float32, device="cpu") for name in _LINEARS}
    for linear in small.values():
        for parameter in linear.parameters():
            parameter.data.normal_(generator=draw)
    twin._modules = mlp._modules | small
    x = torch.randn(3, _WIDTH, generator=draw, dtype=torch.float32)
    # the larger ones are beyond the clamps of a kind that has them
    return gate if all(_agree(gate, host, twin, small, scale * x) for scale in (1.0, 1e3)) else None


def _agree(gate: Gate, host: Callable[..., Tensor], twin: nn.Module, small: dict[str, nn.Linear], x: Tensor) -> bool:
    with torch.no_grad():
        h = torch.cat([F.linear(x, small[name].weight, small[name].bias) for name in _LINEARS[:2]], dim=-1)
        expected = small["down_proj"](gate.forward(h))
        try:
            given = host(twin, x)
        except (RuntimeError, ValueError, AttributeError, TypeError):  # it needs more than a small instance has
            return False
    return given.shape == expected.shape and bool((given - expected).abs().max() <= _AGREES * expected.abs().max())


def _sides(name: str) -> tuple[int, int]:
    return (_INNER, _WIDTH) if name == "down_proj" else (_WIDTH, _INNER)
