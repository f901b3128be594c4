"""PEFT's adapters on plain linears: its equation in two operations an adapter instead of six, or in one node.

In a training step of short context such small operations take longer to submit than to run.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from expertune.hosts import forwards, siblings
from expertune.shapes import LoraFactors
from expertune.split_linear import Linear


def active_factors(wrapper: LoraLayer) -> tuple[LoraFactors, ...]:
    """The factors that count now, as PEFT's own forward decides it."""
    if wrapper.disable_adapters:
        if wrapper.merged:
            wrapper.unmerge()
        return ()
    if wrapper.merged:
        return ()
    return tuple(
        LoraFactors(a=wrapper.lora_A[name].weight, b=wrapper.lora_B[name].weight, scale=wrapper.scaling[name])
        for name in wrapper.active_adapters
        if name in wrapper.lora_A
    )


def refuse_mixed_batches(kwargs: dict[str, Any]) -> None:
    """Take PEFT's `adapter_names` out of a call's keywords, or refuse it."""
    if kwargs.pop("adapter_names", None) is not None:
        raise ValueError("adapters on experts cannot be mixed within a batch; call the model once an adapter.")


def parameter_forward(wrapper: ParamWrapper, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`xW + s(xA)B` for a linear whose weight is targeted as a parameter."""
    if _is_watched(wrapper.base_layer):  # PEFT adapts the weight, so hooks see what the adapter adds
        return cast(Tensor, ParamWrapper.forward(wrapper, x, *args, **kwargs))
    refuse_mixed_batches(kwargs)
    factors = active_factors(wrapper)  # first: it may unmerge
    return _add_low_rank(cast(Tensor, wrapper.base_layer(x, *args, **kwargs)), x, factors)


def lora_linear_forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same for PEFT's own layer, where it does nothing but that; otherwise PEFT's own forward."""
    if args or kwargs or not _is_plain(layer):
        return cast(Tensor, LoraLinear.forward(layer, x, *args, **kwargs))
    base, factors = layer.base_layer, active_factors(layer)
    linear = _one_node(base, x, factors)
    if linear is not None and linear.adapter is not None:
        return siblings.compute(layer, x, linear, _adapted)
    return _add_low_rank(cast(Tensor, base(x)), x, factors)


def _adapted(layer: nn.Module, x: Tensor) -> Linear | None:
    """What a layer that nobody looks on at computes of `x` by `lora_linears`; None if by something else."""
    if not forwards.runs(layer, lora_linear_forward) or "_old_forward" in vars(layer):  # a hook of Accelerate
        return None
    linear = plain_linear(layer, x)
    if linear is None or linear.adapter is None:
        return None
    weight_OI = linear.weight_OI
    return linear if weight_OI.shape[1] == x.shape[-1] and weight_OI.device == x.device else None


def _is_plain(layer: LoraLinear) -> bool:
    """Whether its active adapters do nothing but `s(xA)B`."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return not (layer.merged or layer.disable_adapters or layer.lora_variant) and all(
        isinstance(layer.lora_dropout[name], nn.Identity)
        and not _is_watched(layer.lora_dropout[name])
        and not layer.lora_bias[name]
        and _is_torchs_linear(layer.lora_A[name])
        and _is_torchs_linear(layer.lora_B[name])
        for name in names
    )


def plain_linear(layer: Any, x: Tensor) -> Linear | None:
    """What a linear computes of `x`, if it is frozen, with at most one plain adapter, and nobody looks on; else None.

    Args:
        layer: a linear, or what PEFT put in its place.
        x: in the dtype in which everything is computed.
    """
    base, factors = layer, cast(tuple[LoraFactors, ...], ())
    if _adds_plainly(layer) and not _is_watched(layer):
        base, factors = layer.base_layer, active_factors(layer)
    return _one_node(base, x, factors)


def _one_node(base: Any, x: Tensor, factors: tuple[LoraFactors, ...]) -> Linear | None:
    """A linear and its factors, if it is frozen, nobody looks on, and all is computed in one dtype; else None."""
    if len(factors) > 1 or not _is_frozen_linear(base) or not _computes_in(base.weight.dtype, x, *factors):
        return None
    is_mixed = base.bias is not None and base.bias.dtype != base.weight.dtype
    return None if is_mixed else Linear(base.weight, base.bias, *factors)


def _adds_plainly(layer: Any) -> bool:
    """Whether a module is PEFT's, around a linear or its weight, and computes `xW + s(xA)B` by PEFT's code or ours."""
    if type(layer) is ParamWrapper:
        return forwards.runs(layer, parameter_forward) and not (layer.merged or layer.disable_adapters)
    is_theirs_or_ours = forwards.given(layer) is None or forwards.runs(layer, lora_linear_forward)
    return type(layer) is LoraLinear and is_theirs_or_ours and _is_plain(layer)


def _is_frozen_linear(base: nn.Module) -> bool:
    """Whether a module is torch's own frozen linear, and nobody looks on while it runs."""
    is_torchs = _is_torchs_linear(base)
    return is_torchs and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))


def _is_torchs_linear(module: nn.Module) -> bool:
    """Whether a module is torch's own linear, and nobody looks on while it runs."""
    return type(module) is nn.Linear and "forward" not in vars(module) and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _computes_in(dtype: torch.dtype, x: Tensor, *adapters: LoraFactors) -> bool:
    """Whether PEFT would compute everything in one dtype: by autocast, or because nothing has another."""
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype == torch.get_autocast_dtype(x.device.type) == dtype
    return x.dtype == dtype and all(adapter.a.dtype == adapter.b.dtype == dtype for adapter in adapters)


def _add_low_rank(result: Tensor, x: Tensor, adapters: tuple[LoraFactors, ...]) -> Tensor:
    """`result + Σ s(xA)B`, in the dtypes of PEFT's own LoRA linear."""
    dtype = result.dtype
    # PEFT widens x to the factors' dtype even where autocast narrows it again at once
    is_cast_later = torch.is_autocast_enabled(x.device.type)
    for adapter in adapters:
        mid = F.linear(x if is_cast_later else x.to(adapter.a.dtype), adapter.a)
        if is_cast_later or result.dtype == adapter.b.dtype:
            flat = torch.addmm(result.flatten(0, -2), mid.flatten(0, -2), adapter.b.mT, alpha=adapter.scale)
            result = flat.view(result.shape)
        else:
            result = result + F.linear(mid, adapter.b) * adapter.scale
    return result.to(dtype)
