"""Routers whose choice and scores are one operation, instead of the host's six to twenty.

The host's classes are many, their formulas few: the softmax or the sigmoids of some logits, the highest `top_k` of them
(with a bias that counts for the choice alone, and among the best groups of experts alone), normalised by their sum or
not. A class is taken over if, on random numbers, it gives what the formula gives.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.hosts import formulas
from expertune.hosts.formulas import Found
from expertune.memory.replay import RoutingReplay, Tape
from expertune.router import choose, has_kernel, route
from expertune.shapes import RoutingRule

_BIAS = "e_score_correction_bias"
_NUM_TOKENS = 5


class Formula(NamedTuple):
    """How one class of routers differs from another.

    Args:
        rule: of its choice and scores.
        is_wide: whether it multiplies in float32; under autocast that is autocast's dtype all the same.
        flattens: whether it takes batches of sequences, and gives tokens.
    """

    rule: RoutingRule
    is_wide: bool
    flattens: bool


def find(model: nn.Module) -> list[tuple[nn.Module, Found[Formula]]]:
    """The routers that follow a formula, and which. Changes nothing."""
    return formulas.find(model, formulas.is_named("Router"), formula_of)


def has_bias(router: nn.Module) -> bool:
    """Whether a router adds a bias to what it compares."""
    return isinstance(getattr(router, _BIAS, None), Tensor)


def forward(router: Any, found: Found[Formula], replay: RoutingReplay, hidden_states: Tensor) -> Any:
    """Logits, scores and experts; the host's own where there is no kernel for it.

    Scores are in float32 also where the host rounds them: they only weight what the walk sums in float32.

    Args:
        router: the module.
        found: its class's formula.
        replay: knows whether the layer runs for the second time, and by which choice then.
        hidden_states: `(…, D)`.
    """
    formula = found.formula
    is_read = hidden_states.dim() == 2 or formula.flattens
    if not is_read or not has_kernel(hidden_states, len(router.weight), formula.rule) or found.of(router) is None:
        return type(router).forward(router, hidden_states)
    return routed(router, formula, replay.tape, hidden_states)


def routed(router: Any, formula: Formula, tape: Tape | None, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """The formula's logits, scores and experts.

    Args:
        router, hidden_states: as for `forward`.
        formula: the router's.
        tape: that runs.
    """
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE, bias_E = _logits(router, formula.is_wide, x_TD), getattr(router, _BIAS, None)
    index_TK = None if tape is None else tape.chosen(lambda: choose(logits_TE, bias_E, formula.rule))
    return logits_TE, *route(logits_TE, bias_E, formula.rule, index_TK)


def _logits(router: Any, is_wide: bool, x_TD: Tensor) -> Tensor:
    weight_ED, bias_E = router.weight, getattr(router, "bias", None)
    # autocast narrows again at once what was widened: to the same numbers, by copies there and back
    if is_wide and not torch.is_autocast_enabled(x_TD.device.type):
        x_TD, weight_ED = x_TD.float(), weight_ED.float()
    return F.linear(x_TD, weight_ED, bias_E)


def formula_of(router: nn.Module) -> Formula | None:
    """What a router computes, found by trying it on random numbers on the CPU; None if it is none of our formulas."""
    parameters, buffers = dict(router.named_parameters()), dict(router.named_buffers())
    takes = list(inspect.signature(type(router).forward).parameters)
    is_plain = takes == ["self", "hidden_states"] and not list(router.children())
    if not is_plain or not {"weight"} <= parameters.keys() <= {"weight", "bias"} or not buffers.keys() <= {_BIAS}:
        return None
    if not isinstance(getattr(router, "top_k", None), int):
        return None
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.randn(x.shape, generator=draw) for name, x in (parameters | buffers).items()}
    x_BTD = torch.randn(1, _NUM_TOKENS, parameters["weight"].shape[1], generator=draw)
    values["weight"] *= x_BTD.shape[-1] ** -0.5
    wide, narrow = (_twin(router, parameters.keys(), values, dtype) for dtype in (torch.float32, torch.bfloat16))
    try:
        return _try(wide, narrow, x_BTD)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it is built or called in another way
        return None


def _twin(router: nn.Module, names: Iterable[str], values: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The router with other numbers, in training, where some hosts add noise."""
    twin = copy.copy(router)
    twin._parameters = {name: nn.Parameter(values[name].to(dtype), requires_grad=False) for name in names}
    twin._buffers = {name: value.to(dtype) for name, value in values.items() if name not in twin._parameters}
    twin.training = True
    return twin


def _try(router: Any, narrow: Any, x_BTD: Tensor) -> Formula | None:
    """The formula whose numbers and gradients are a router's, and whose logits are those of its twin in bfloat16."""
    host = type(router).forward
    logits_TE = host(narrow, x_BTD[0].bfloat16())[0]
    is_wide, flattens = logits_TE.dtype == torch.float32, host(router, x_BTD)[0].dim() == 2
    if not torch.equal(_logits(narrow, is_wide, x_BTD[0].bfloat16()), logits_TE):
        return None
    given = _numbers(lambda x_TD: host(router, x_TD), x_BTD[0])
    scale, groups = float(getattr(router, "routed_scaling_factor", 1.0)), int(getattr(router, "num_group", None) or 1)
    used = int(router.topk_group) if groups > 1 else 1
    for is_sigmoid, is_normed in product((False, True), repeat=2):
        formula = Formula(RoutingRule(router.top_k, is_sigmoid, is_normed, scale, groups, used), is_wide, flattens)
        mine = _numbers(partial(routed, router, formula, None), x_BTD[0])
        if all(map(formulas.agree, given, mine)):
            return formula
    return None


def _numbers(function: Callable[[Tensor], tuple[Tensor, ...]], x_TD: Tensor) -> list[Tensor]:
    """Logits, the scores of all experts, in whatever order they were chosen, and the gradients by either."""
    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        logits_TE, score_TK, index_TK = function(x_TD)
        score_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, score_TK)
        outs = [logits_TE, score_TE]
        towards = torch.linspace(-1, 1, score_TE.numel()).view_as(score_TE)
        grads = [torch.autograd.grad(out, x_TD, towards, retain_graph=True)[0] for out in outs]
    return [out.detach() for out in (*outs, *grads)]
