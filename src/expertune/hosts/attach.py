"""What `optimize` does to one model instance, and how it is undone: plans on the experts, hooks on their blocks.

A hook before the decoder gives PEFT wrappers that came later (`get_peft_model`, `SFTTrainer(peft_config=…)`,
`PeftModel.from_pretrained`) our forward, and its checkpoint function a routing replay; hooks around each MoE block
switch that replay on for the router.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.hosts import peft, transformers
from expertune.memory.checkpoint import checkpoint_layer
from expertune.memory.replay import ReplayingCheckpoint, RoutingReplay


@dataclass(kw_only=True)
class Attached:
    """What was done to a model. Lies on it as `_expertune`.

    Args:
        requested: the backend asked for.
        replay: its routing replay.
        handles: its hooks.
        previous: each experts config with the implementation that it named before.
        blocks: its MoE blocks.
        layers: its layers that can be checkpointed.
        adapters: the names of PEFT's adapters when wrappers were last bound.
    """

    requested: str
    replay: RoutingReplay = field(default_factory=RoutingReplay)
    handles: list[RemovableHandle] = field(default_factory=list)
    previous: list[tuple[Any, str | None]] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    layers: list[GradientCheckpointingLayer] = field(default_factory=list)
    adapters: tuple[str, ...] = ()


def attached(model: nn.Module) -> Attached | None:
    """What `attach` did to this model, if it did."""
    state = getattr(model, "_expertune", None)
    return state if isinstance(state, Attached) else None


def attach(model: PreTrainedModel, requested: str) -> Attached:
    """Hand the experts of this model to the walk. All plans are made before anything is changed.

    Raises:
        ValueError: an experts module, an adapter or the backend asked for cannot be honoured.
    """
    state = Attached(requested=requested)
    plans = [
        (module, transformers.make_plan(name, module, _model_type(module, model), requested))
        for name, module in transformers.named_experts(model)
    ]
    if not plans:
        return state
    transformers.register()
    for module, plan in plans:
        module._expertune = plan  # type: ignore[assignment]
    try:
        bind_all(model)
    except ValueError:
        _forget(model)
        raise
    configs: dict[int, Any] = {id(module.config): module.config for module, _ in plans}
    for config in configs.values():
        state.previous.append((config, config._experts_implementation))
        config._experts_implementation = transformers.IMPLEMENTATION
    state.blocks = list(blocks(model))
    state.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in state.blocks:
        state.handles.append(block.register_forward_pre_hook(partial(_before_block, state.replay)))
        state.handles.append(block.register_forward_hook(partial(_after_block, state.replay), always_call=True))
    for decoder in _decoders(model):
        state.handles.append(decoder.register_forward_pre_hook(partial(_before_decoder, model, state)))
    state.adapters = _adapters_of(model)
    model._expertune = state
    return state


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; adapters stay where PEFT put them and run as stock PEFT again."""
    state = attached(model)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for config, implementation in state.previous:
        config._experts_implementation = implementation
    for layer in model.modules():
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, ReplayingCheckpoint):
            layer._gradient_checkpointing_func = checkpoint.checkpoint
    _forget(model)
    del model._expertune


def bind_all(model: PreTrainedModel) -> None:
    """Give every PEFT wrapper that is there already our forward."""
    peft.check_versions(model)
    inner = {id(w) for module in model.modules() for w in peft.wrappers_of(module)[0][1:]}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and id(module) not in inner:
            peft.bind(module)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Each module that holds experts: the MoE blocks."""
    for module in model.modules():
        if not isinstance(module, ParamWrapper) and any(
            transformers.is_experts(peft.wrappers_of(child)[1]) for child in module.children()
        ):
            yield module


def _model_type(module: nn.Module, model: PreTrainedModel) -> str:
    return str(getattr(module.config, "model_type", model.config.model_type))


def _forget(model: nn.Module) -> None:
    """Take plans and bound forwards off."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            peft.unbind(module)
        elif transformers.is_experts(module):
            vars(module).pop("_expertune", None)


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The innermost Transformers models that hold checkpointed layers."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [m for m in models if not any(inner is not m and inner in models for inner in m.modules())]


def _adapters_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that PEFT put into a Transformers model; it leaves their configs on it."""
    return tuple(getattr(model, "peft_config", {}))


def _before_block(replay: RoutingReplay, _block: nn.Module, _args: Any) -> None:
    replay.enter_block()


def _after_block(replay: RoutingReplay, _block: nn.Module, _args: Any, _output: Any) -> None:
    replay.leave_block()


def _before_decoder(model: PreTrainedModel, state: Attached, _decoder: nn.Module, _args: Any) -> None:
    """Take in what changed since the last batch: new adapters, or gradient checkpointing turned on by a trainer."""
    if state.adapters != _adapters_of(model) or any(
        isinstance(child, ParamWrapper) and not peft.is_bound(child)
        for block in state.blocks
        for child in block._modules.values()
    ):
        bind_all(model)
        state.adapters = _adapters_of(model)
    for layer in state.layers:
        if layer.gradient_checkpointing and not isinstance(layer._gradient_checkpointing_func, ReplayingCheckpoint):
            layer._gradient_checkpointing_func = state.replay.wrap(layer._gradient_checkpointing_func)


def set_checkpointing(model: PreTrainedModel, state: Attached, *, enabled: bool) -> None:
    """Turn gradient checkpointing on, with our own choice of torch's two ways and the routing replayed, or off."""
    if not model.supports_gradient_checkpointing:
        return
    if not enabled:
        # renamed in transformers 5.2x; the old name warns there and ends with version 6
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in state.layers:
        layer._gradient_checkpointing_func = state.replay.wrap(checkpoint_layer)
