"""Rotary position embeddings of the host's attention in one fused operation, instead of the host's 26.

Hosts rotate queries and keys by a function of their module, `apply_rotary_pos_emb`, and there is one a model type,
nearly all alike. One is taken over if, on random numbers, it gives what the formula gives. The attention's own code
then runs as it is, with another function under that name: on this instance alone, the host's module is left as it is.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from expertune.attention.rotary import Rotation, formula, rotate, why_not
from expertune.hosts import forwards, heads, siblings
from expertune.hosts.formulas import agree
from expertune.hosts.twins import twin

_NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")


def find(model: nn.Module) -> list[nn.Module]:
    """The attentions that rotate by the formula. Changes nothing."""
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and _with_ours(type(module).forward) is not None
    ]


def forward(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention's own forward, with our rotation, and its linears and norms computed together in recordings.

    A compiler, which fuses these itself, gets the host's.
    """
    host = type(attention).forward
    if torch.compiler.is_compiling():
        return host(attention, *args, **kwargs)
    angles = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    with siblings.together(attention), heads.rotated_by(_only(host), attention, angles):
        return (_with_ours(host) or host)(attention, *args, **kwargs)


def rotation_in(module: nn.Module) -> Rotation | None:
    """By which formula a module rotates that runs `forward`; None if it does not, or knows several."""
    return _only(type(module).forward) if forwards.runs(module, forward) else None


@cache
def rotation_of(function: Callable[..., Any]) -> Rotation | None:
    """Which formula a host's function follows, found by trying it on random numbers; None if it is another one."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    for interleaved, shared, half_width in product((False, True), repeat=3):
        rotation = Rotation(interleaved, shared, half_width, passes=False)
        if _follows(function, rotation, beside=0) and _keeps_dtype(function, rotation):
            return rotation._replace(passes=_follows(function, rotation, beside=4))
    return None


def _follows(function: Callable[..., Any], rotation: Rotation, beside: int) -> bool:
    """Whether the function gives what the formula gives, for heads wider by some elements than what is rotated."""
    q, k, cos, sin = _random(rotation, beside)
    try:
        given = function(q, k, cos, sin)
    except (RuntimeError, ValueError):  # shapes that it does not know, or a device
        return False
    ours = [formula(x, cos, sin, rotation) for x in (q, k)]
    return all(map(agree, given, ours))


def _keeps_dtype(function: Callable[..., Any], rotation: Rotation) -> bool:
    q, k, cos, sin = (x.bfloat16() for x in _random(rotation, beside=0))
    return all(x.dtype == torch.bfloat16 for x in function(q, k, cos, sin))


def _random(rotation: Rotation, beside: int) -> list[Tensor]:
    """Queries, keys and two kinds of angles, in float32."""
    width = 4 if rotation.half_width else 8
    shapes = ((2, 2, 3, 8 + beside), (2, 1, 3, 8 + beside), (2, 3, width), (2, 3, width))
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float32) for shape in shapes]


@cache
def _with_ours(forward: Callable[..., Any]) -> FunctionType | None:
    """An attention's forward with our rotation in place of its module's; None if it has none that we know."""
    if not (known := _known(forward)):
        return None
    code = inspect.unwrap(forward)
    return twin(code, {name: _ours_or(code.__globals__[name], rotation) for name, rotation in known.items()})


@cache
def _only(forward: Callable[..., Any]) -> Rotation | None:
    """By which formula an attention's forward rotates; None if we know none, or several."""
    known = [*_known(forward).values()]
    return known[0] if len(known) == 1 else None


def _known(forward: Callable[..., Any]) -> dict[str, Rotation]:
    """The names of the rotations that an attention's forward calls, where we know the formula."""
    code = inspect.unwrap(forward)
    if not isinstance(code, FunctionType):
        return {}
    functions = {name: code.__globals__.get(name) for name in _NAMES if name in code.__code__.co_names}
    rotations = {name: rotation_of(function) for name, function in functions.items() if function is not None}
    return {name: rotation for name, rotation in rotations.items() if rotation is not None}


def _ours_or(host: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    """A host's function, by ours where it can be."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs not in ({}, {"unsqueeze_dim": 1}) or why_not(q, k, cos, sin, rotation) is not None:
            return host(q, k, cos, sin, *args, **kwargs)
        return heads.turned(q, k, cos, sin) or rotate(q, k, cos, sin, rotation)

    return rotated
