"""PEFT: its adapters on the experts, handed to the walk as factors instead of folded into the weights.

`target_parameters` puts a `ParamWrapper` around the experts, one a parameter, nested. Its own forward forms `W + s·BA`
for every expert. We give the outermost wrapper of one model a forward that collects the active factors of the nest and
calls the experts with them. Parameters, names, state dict, merging and saving stay PEFT's.

Its adapters on the plain linears beside the experts: `lora_layers.py`.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from packaging.version import Version
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from expertune import lora
from expertune.hosts import forwards, lora_layers
from expertune.hosts.transformers import ExpertsPlan, first_name, is_experts, is_transposed, named_experts

# PEFT before 0.19.1 wrote the factors of weights that lie as (E, O, I) with input and output swapped.
# Version 0.19.0 alone swapped the others instead.
_SWAPPED, _LAYOUT_SINCE = Version("0.19.0.dev0"), Version("0.19.1.dev0")


def wrappers_of(module: nn.Module) -> tuple[list[ParamWrapper], nn.Module]:
    """PEFT's nest of parameter wrappers, outermost first, and the module inside."""
    nest = []
    while isinstance(module, ParamWrapper):
        nest.append(module)
        module = module.base_layer
    return nest, module


def experts_in(module: nn.Module) -> nn.Module | None:
    """The experts inside PEFT's wrappers, the active ones where PEFT holds a trained copy; None if there are none.

    Args:
        module: an experts module, or what PEFT put in its place.
    """
    _, base = wrappers_of(module)
    if isinstance(base, ModulesToSaveWrapper):
        active = [name for name in base.active_adapters if name in base.modules_to_save]
        base = base.modules_to_save[active[0]] if active and not base.disable_adapters else base.original_module
    return base if is_experts(base) else None


def is_block(module: nn.Module) -> bool:
    """Whether a module holds experts: a router with its experts, and what is shared beside them."""
    is_wrapper = isinstance(module, ParamWrapper | AuxiliaryTrainingWrapper | nn.ModuleDict)
    return not is_wrapper and any(experts_in(child) is not None for child in module.children())


def trained_ranks(module: nn.Module) -> dict[str, int]:
    """The LoRA rank that is trained on each parameter of the experts, by its name; those without are left out.

    Args:
        module: as for `experts_in`.
    """
    ranks = {}
    for wrapper in wrappers_of(module)[0]:
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if rank := sum(wrapper.r[name] for name in active if wrapper.lora_A[name].weight.requires_grad):
            ranks[wrapper.parameter_name] = rank
    return ranks


def is_bound(layer: nn.Module) -> bool:
    """Whether `bind` has given this LoRA layer our forward."""
    ours = (_experts_forward, lora_layers.parameter_forward, lora_layers.lora_linear_forward)
    return any(forwards.runs(layer, forward) for forward in ours)


def bind(module: nn.Module) -> None:
    """Give a LoRA layer our forward: the outermost wrapper around experts or around a linear's weight, or a linear.

    `check` must have passed before. What is none of these is left as it is, and so is a linear with a forward of its
    own, such as Llama 4's router, whose product never comes out, and one that somebody has given another forward.
    """
    if type(module) is LoraLinear and (forwards.given(module) is None or is_bound(module)):
        forwards.give(module, partial(lora_layers.lora_linear_forward, module))
    if not isinstance(module, ParamWrapper):
        return
    nest, base = wrappers_of(module)
    if is_experts(base):
        forwards.give(module, partial(_experts_forward, module))
    elif (
        isinstance(base, nn.Linear)
        and type(base).forward is nn.Linear.forward
        and [inner.parameter_name for inner in nest] == ["weight"]
        and not forwards.is_somebody_elses(module)
    ):
        forwards.give(module, partial(lora_layers.parameter_forward, module))


def unbind(module: nn.Module) -> None:
    """Undo `bind`, unless someone has given the layer another forward since."""
    if isinstance(module, LoraLayer) and is_bound(module):
        forwards.take_back(module)


def check(model: nn.Module, plans: Mapping[int, ExpertsPlan]) -> None:
    """Refuse adapters on experts that the walk would read wrongly or not at all.

    Args:
        model: a Transformers model; PEFT leaves the configs of its adapters on it.
        plans: by the `id` of the experts module.

    Raises:
        ValueError: an adapter has another layout, or adapts what the walk does not.
    """
    _check_versions(model)
    for module in model.modules():
        nest, base = wrappers_of(module)
        if not nest or id(base) not in plans:
            continue
        if forwards.is_somebody_elses(module):
            raise ValueError(
                f"PEFT's layer around {plans[id(base)].name} has been given a forward of its own, which the walk would "
                "pass over. Take it off, or put it around the block that holds the experts."
            )
        _check(nest[0], base, plans[id(base)])


def _check(wrapper: ParamWrapper, base: nn.Module, plan: ExpertsPlan) -> None:
    known = (first_name(base), "down_proj")
    if wrapper.parameter_name not in known:
        raise ValueError(
            f"an adapter targets {plan.name}.{wrapper.parameter_name}, which the walk cannot adapt; "
            f"target {' or '.join(known)} instead."
        )
    layout = plan.layout
    widths = (layout.model_width, layout.first_width)
    if wrapper.parameter_name == "down_proj":
        widths = (layout.expert_width, layout.model_width)
    if _is_turned(base):
        widths = (widths[1], widths[0])
    for name, a in wrapper.lora_A.items():
        expected = (layout.num_experts * wrapper.r[name], widths[0]), (widths[1], wrapper.r[name] * layout.num_experts)
        came = tuple(a.weight.shape), tuple(wrapper.lora_B[name].weight.shape)
        if came != expected:
            raise ValueError(
                f"adapter {name!r} on {plan.name}.{wrapper.parameter_name} has factors of shapes {came}, expected "
                f"{expected}, the layout of PEFT 0.19.1 and later. Train it again, or convert it with the PEFT that "
                "wrote it."
            )


def adapter_and_base(name_or_path: str) -> tuple[dict[str, Any] | None, str]:
    """The saved config of an adapter, None for a whole model, and the hub id or folder of the base model.

    Raises:
        ValueError: the config does not say which that is.
    """
    adapter = Path(name_or_path) / "adapter_config.json"
    if not adapter.is_file():
        return None, name_or_path
    saved = json.loads(adapter.read_text(encoding="utf-8"))
    base = saved.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name_or_path} does not say which model it was trained on: write its hub id or folder as "
            "base_model_name_or_path into adapter_config.json."
        )
    return saved, base


def check_saved(saved: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse an adapter on experts in an older PEFT's layout before PEFT reads it.

    Args:
        saved: what `adapter_config.json` says; PEFT rewrites some of it while it loads.
        model: the base model.

    Raises:
        ValueError: the factors lie with input and output swapped.
    """
    # PEFT 0.17, the first with target_parameters, wrote no version
    version = saved.get("peft_version") or "0.17"
    targets = saved.get("target_parameters") or ()
    for path, experts in named_experts(model):
        names = [f"{path}.{first_name(experts)}", f"{path}.down_proj"]
        if _is_swapped(version, experts) and any(
            f".{name}".endswith(f".{target}") for name in names for target in targets
        ):
            raise _swapped("of this folder", version, experts)


def lost_when_read(model: PeftModel) -> list[str]:
    """The names, in a saved file, of an adapter's tensors that PEFT would not find again when it reads the file.

    PEFT renames what it reads by Transformers' rules for a family's checkpoints, and some of these rules match names
    that are right already. Nothing but the adapters' own values is written.
    """
    lost: set[str] = set()
    for name in model.peft_config:
        # "auto", as which embeddings are saved, would ask the hub
        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        lost.update(set_peft_model_state_dict(model, saved, adapter_name=name).unexpected_keys)
    return sorted(lost)


def _check_versions(model: nn.Module) -> None:
    """Refuse adapters of an older PEFT's layout that PEFT has loaded already; square experts hide it from their shapes.

    Raises:
        ValueError: names the adapter.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if not getattr(config, "target_parameters", None):
            continue
        for module in model.modules():
            nest, base = wrappers_of(module)
            if not nest or name not in nest[0].lora_A or not is_experts(base):
                continue
            if not _is_swapped(config.peft_version, base):
                continue
            # PEFT writes this pattern when it fuses one adapter an expert, of Transformers 4, to today's layout
            if rf".*\.{first_name(base)}" not in config.rank_pattern:
                raise _swapped(repr(name), config.peft_version, base)


def _is_swapped(version: str, experts: nn.Module) -> bool:
    """Whether PEFT of this version laid out the factors of these experts otherwise than today's does."""
    written_by = Version(version.split("@")[0])
    if written_by < _SWAPPED:
        return not _says_transposed(experts)
    return written_by < _LAYOUT_SINCE


def _says_transposed(experts: nn.Module) -> bool:
    """Whether PEFT sees that the weights of these experts lie as `(E, I, O)`."""
    return bool(getattr(experts, "is_transposed", False))


def _is_turned(experts: nn.Module) -> bool:
    """Whether PEFT takes the input of these experts for their output, and lays its factors beside the wrong ends.

    The product of both factors is added to the weight all the same, so it is an adapter as good as another.
    """
    return is_transposed(experts) and not _says_transposed(experts)


def _swapped(which: str, version: str, experts: nn.Module) -> ValueError:
    return ValueError(
        f"the adapter {which} was written by PEFT {version}, which lays out the factors of {type(experts).__name__} "
        "with input and output swapped. Read by PEFT 0.19.1 or later it is another function. Merge it with the PEFT "
        "that wrote it, or train it again."
    )


def _experts_forward(wrapper: ParamWrapper, *args: Any, **kwargs: Any) -> Any:
    """Instead of `ParamWrapper.forward`: call the experts with the active factors of the whole nest."""
    nest, base = wrappers_of(wrapper)
    if "_expertune" not in vars(base):  # the model was restored, and somebody has kept this
        return ParamWrapper.forward(wrapper, *args, **kwargs)
    lora_layers.refuse_mixed_batches(kwargs)
    factors = {inner.parameter_name: lora_layers.active_factors(inner) for inner in nest}
    if _is_turned(base):
        num_experts = len(cast(Tensor, base.down_proj))
        factors = {name: tuple(lora.turn(adapter, num_experts) for adapter in held) for name, held in factors.items()}
    adapters = factors.get(first_name(base), ()), factors.get("down_proj", ())
    return base(*args, **kwargs, adapters=adapters)
