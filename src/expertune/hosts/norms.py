"""Root-mean-square norms in one fused operation, instead of the host's seven or eight.

The host's classes are many and nearly all alike. A class is taken over if, on random numbers, it gives what the formula
gives: `x / sqrt(mean(x²) + eps) · (w + offset)`, with offset 0, or 1 for weights that are stored around zero.
"""

import copy
import inspect
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from expertune.hosts import formulas, heads
from expertune.hosts.formulas import Found
from expertune.rms_norm import rms_norm


class Formula(NamedTuple):
    """How one class of norms differs from another.

    Args:
        eps: is added to the mean square.
        offset: is added to the weight.
        keeps_dtype: whether a result has the dtype of the input also where the weight has another.
    """

    eps: float
    offset: float
    keeps_dtype: bool


def find(model: nn.Module) -> list[tuple[nn.Module, Found[Formula]]]:
    """The norms that follow the formula, and how. Changes nothing."""
    return formulas.find(model, formulas.is_named("RMSNorm"), formula_of)


def formula_of(norm: nn.Module) -> Formula | None:
    """What a norm computes, found by trying it on random numbers on the CPU; None if it is another formula.

    None too if it does not compute there, as a kernel that someone has put in the class's place.
    """
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    parameters = dict(norm.named_parameters())
    if eps is None or list(parameters) != ["weight"] or len(inspect.signature(type(norm).forward).parameters) != 2:
        return None
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(parameters["weight"].shape, generator=draw, dtype=torch.float32)
    twin = copy.copy(norm)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    x = torch.randn(3, *weight.shape, generator=draw, dtype=torch.float32)
    x *= 10 * eps**0.5  # so small that eps counts
    host: Callable[..., Tensor] = type(norm).forward  # past hooks, which would hear of numbers that nobody sent
    try:
        given = host(twin, x)
    except (RuntimeError, ValueError):
        return None
    for offset in (0.0, 1.0):
        if formulas.agree(given, rms_norm(x, weight, eps, offset)):
            return Formula(eps, offset, keeps_dtype=host(twin, x.bfloat16()).dtype == torch.bfloat16)
    return None


def forward(norm: nn.Module, found: Found[Formula], x: Tensor) -> Tensor:
    """Ours where torch has a fused kernel, else the host's: which also is the exact one for float64."""
    weight_D = cast(Tensor, norm.weight)  # in a recording of the module, not a parameter
    formula = found.of(norm) if _is_fused(x) else None
    if formula is not None and (formula.keeps_dtype or x.dtype == weight_D.dtype):
        y = heads.normed(norm, x, weight_D, formula.eps, formula.offset)
        return rms_norm(x, weight_D, formula.eps, formula.offset) if y is None else y
    given: Tensor = type(norm).forward(norm, x)
    return given


def _is_fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()
