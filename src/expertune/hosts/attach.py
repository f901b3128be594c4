"""What `optimize` does to one model instance, and how it is undone: plans on the experts, hooks on their blocks.

A hook before the decoder gives PEFT wrappers that came later (`get_peft_model`, `SFTTrainer(peft_config=…)`,
`PeftModel.from_pretrained`) our forward, and its checkpoint function a routing replay; hooks around each MoE block
switch that replay on for the router.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.graphs.recorder import Recorder
from expertune.hosts import (
    adapter_states,
    angles,
    attention,
    collected,
    formulas,
    forwards,
    graphs,
    latent_attention,
    llama4,
    mlps,
    norms,
    peft,
    rotary,
    router,
    samples,
    transformers,
    trl_head,
)
from expertune.hosts.widths import width_of
from expertune.memory.checkpoint import LayerCheckpoint
from expertune.memory.leave_out import LeaveOut
from expertune.memory.policy import Policy, policy_of
from expertune.memory.replay import LayerMemory, ReplayingCheckpoint, RoutingReplay


@dataclass(kw_only=True)
class Attached:
    """What was done to a model. Lies on it as `_expertune`.

    Args:
        requested: the backend asked for.
        replay: its routing replay.
        handles: its hooks.
        blocks: its MoE blocks.
        layers: its layers that can be checkpointed.
        adapters: the names of PEFT's adapters when wrappers were last bound.
        attentions: the configs of decoders that attend through ours, each with the attention that it named.
        norms: those that run our forward.
        latents: the attentions that put their heads together by our function.
        rotaries: the others that rotate queries and keys by our function.
        routers: those that choose and score by our function.
        mlps: the dense ones that run as one node of autograd.
        memory: what its layers spare memory by; None where nobody has set it.
        recorder: of the parts that are replayed as CUDA graphs; None if none is to be.
    """

    requested: str
    replay: RoutingReplay = field(default_factory=RoutingReplay)
    handles: list[RemovableHandle] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    layers: list[GradientCheckpointingLayer] = field(default_factory=list)
    adapters: tuple[str, ...] = ()
    attentions: list[tuple[Any, str]] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    latents: list[nn.Module] = field(default_factory=list)
    rotaries: list[nn.Module] = field(default_factory=list)
    routers: list[nn.Module] = field(default_factory=list)
    mlps: list[nn.Module] = field(default_factory=list)
    memory: Policy | None = None
    recorder: Recorder | None = None


def attached(model: nn.Module) -> Attached | None:
    """What `attach` did to this model, if it did."""
    state = getattr(model, "_expertune", None)
    return state if isinstance(state, Attached) else None


def attach(
    model: PreTrainedModel, requested: str, *, is_attention_ours: bool = True, uses_graphs: bool = True
) -> Attached:
    """Hand the experts of this model to the walk, and its attention to ours, instead of what an earlier `attach` did.

    All plans are made and all adapters are checked before anything is changed.

    Args:
        model: the model.
        requested: the backend asked for.
        is_attention_ours: whether ours takes over where the host's would form all scores.
        uses_graphs: whether parts of layers may be replayed as CUDA graphs.

    Raises:
        ValueError: experts, an adapter or the backend asked for cannot be honoured, or nothing would run better.
    """
    transformers.refuse_unknown_experts(model)
    _refuse_unknown_blocks(model)
    _refuse_all_the_hosts(model, is_attention_ours)
    state = Attached(requested=requested)
    # where formulas are tried, wherever the caller makes tensors by default, and whatever is drawn next
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        plans = [
            (module, transformers.make_plan(name, module, _model_type(module, model), requested, state.replay))
            for name, module in transformers.named_experts(model)
        ]
        found_norms, found_latents, found_rotaries = norms.find(model), latent_attention.find(model), rotary.find(model)
        found_routers, found_mlps = router.find(model), mlps.find(model)
    peft.check(model, {id(module): plan for module, plan in plans})
    taken = [each for each in decoders(model) if attention.is_ours(each) or not attention.why_not(each, model)]
    if (before := attached(model)) is not None:
        state.memory = before.memory
    detach(model)
    if is_attention_ours:
        state.attentions = [each for decoder in taken for each in attention.take_over(decoder)]
    state.norms = formulas.bind(found_norms, norms.forward)
    state.latents = forwards.bind(found_latents, latent_attention.forward)
    state.rotaries = forwards.bind(found_rotaries, rotary.forward)
    state.routers = formulas.bind(found_routers, router.forward, state.replay)
    state.mlps = formulas.bind(found_mlps, mlps.forward, state.replay)
    transformers.register()
    configs: dict[int, Any] = {}
    for module, plan in plans:
        module._expertune = plan  # type: ignore[assignment]
        if llama4.is_experts(module):
            llama4.bind([module], transformers.experts_forward)
        else:
            module.config = _own_config(module.config, configs)
    state.blocks = list(blocks(model))
    llama4.bind(filter(llama4.is_block, state.blocks), llama4.block_forward)
    state.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    _hook(model, state)
    if state.memory is not None:
        _spare([layer for layer in state.layers if layer.gradient_checkpointing], model, state)
    if uses_graphs:
        state.recorder = Recorder(graphs.TransformersHost(state.replay, partial(_rest, state)))
        state.handles += [each for decoder in decoders(model) for each in graphs.hook(decoder, state.recorder)]
    model._expertune = state
    bind_all(model)
    return state


def _rest(state: Attached, device: torch.device) -> float:
    """What the planner of a model has measured of a step beside what its layers keep, in bytes."""
    return 0 if state.memory is None or state.memory.planner is None else state.memory.planner.rest(device)


def _hook(model: PreTrainedModel, state: Attached) -> None:
    """Ours around the blocks, and before the decoders."""
    for block in state.blocks:
        state.handles.append(block.register_forward_pre_hook(partial(_before_block, state.replay)))
        state.handles.append(block.register_forward_hook(partial(_after_block, state.replay), always_call=True))
    for decoder in decoders(model):
        state.handles.append(decoder.register_forward_pre_hook(partial(_before_decoder, model, state)))
    state.handles += samples.hook(model, decoders(model))
    state.handles += [handle for decoder in decoders(model) for handle in angles.hook(decoder)]


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; adapters stay where PEFT put them and run as stock PEFT again."""
    state = attached(model)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    forwards.unbind(state.norms, norms.forward)
    if state.recorder is not None:
        graphs.unbind(state.recorder)
    forwards.unbind(state.latents, latent_attention.forward)
    forwards.unbind(state.rotaries, rotary.forward)
    forwards.unbind(state.routers, router.forward)
    forwards.unbind(state.mlps, mlps.forward)
    trl_head.unbind(model)
    attention.give_back(state.attentions)
    forwards.unbind(state.blocks, llama4.block_forward)
    for _, module in transformers.named_experts(model):  # also those that PEFT copied, to save them whole
        if llama4.is_experts(module):
            forwards.unbind([module], transformers.experts_forward)
        else:
            module.config = transformers.plan_of(module).host_config
        del module._expertune
    for layer in _checkpointed(model):
        layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.host
    for module in model.modules():
        peft.unbind(module)
    del model._expertune


def bind_all(model: PreTrainedModel) -> None:
    """Give every LoRA layer that is there already our forward, and record layers with one.

    Raises:
        ValueError: an adapter cannot be honoured.
    """
    plans = {id(module): transformers.plan_of(module) for _, module in transformers.named_experts(model)}
    peft.check(model, plans)
    inner = {id(w) for module in model.modules() for w in peft.wrappers_of(module)[0][1:]}
    for module in model.modules():
        if id(module) not in inner:
            peft.bind(module)
    if (state := attached(model)) is None:
        return
    state.adapters = _adapters_of(model)
    if state.recorder is not None:
        graphs.bind(state.layers, state.recorder)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Each module that holds experts: the MoE blocks."""
    yield from filter(peft.is_block, model.modules())


def _refuse_unknown_blocks(model: nn.Module) -> None:
    """Refuse a block that holds Llama 4's experts and is not Llama 4's: it would not know how to call them.

    Raises:
        ValueError: names the first of them.
    """
    names = {id(module): transformers.clean(path) for path, module in model.named_modules()}
    for block in blocks(model):
        held = [experts for child in block.children() if (experts := peft.experts_in(child)) is not None]
        if any(map(llama4.is_experts, held)) and not llama4.is_block(block):
            raise ValueError(
                f"{names[id(block)]} ({type(block).__name__}) calls Llama 4's experts with code of its own, which the "
                "walk cannot read. Train it as stock Transformers does."
            )


def _refuse_all_the_hosts(model: PreTrainedModel, is_attention_ours: bool) -> None:
    """Refuse a model without experts whose attention stays the host's.

    What is asked is the model and its config, not the device: norms and rotary embeddings, fused on CUDA alone, do not
    count.

    Raises:
        ValueError: says why the attention is not ours.
    """
    if any(transformers.named_experts(model)):
        return
    kept: dict[str, str] = {}
    for decoder in decoders(model):
        reason = attention.why_not(decoder, model) if is_attention_ours else "attention='host' was asked for"
        if reason is None or (is_attention_ours and attention.is_ours(decoder)):
            if attention.forms_scores(decoder):
                return
            reason = "the host's own needs no matrix of scores"
        kept[type(decoder).__name__] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
    raise ValueError(
        f"found no experts in {type(model).__name__}, and no attention that would run better than the host's "
        f"({reasons}), so there is nothing to optimize. Train it with PEFT and TRL as it is. If it should have "
        "experts, see docs/add-a-family.md, or report the model type "
        f"({getattr(model.config, 'model_type', 'unknown')})."
    )


def _model_type(module: nn.Module, model: PreTrainedModel) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", model.config.model_type))


def _own_config(config: Any, copies: dict[int, Any]) -> Any:
    """A copy of the host's config that names the walk, one for all modules that share it.

    The config itself may be shared with other models, and is what the host saves, so it stays as it is.
    """
    if id(config) not in copies:
        copies[id(config)] = copy.deepcopy(config)
        copies[id(config)]._experts_implementation = transformers.IMPLEMENTATION
    return copies[id(config)]


def _checkpointed(model: nn.Module) -> list[Any]:
    """The layers whose checkpoint function is ours."""
    return [module for module in model.modules() if _is_replayed(module)]


def _checkpoint(layer: Any, model: PreTrainedModel, state: Attached) -> None:
    """Give a layer our own checkpoint function, with what the setting of memory adds to it."""
    assert state.memory is not None
    planner, offload, plan = state.memory.planner, state.memory.offload, None
    if planner is not None:
        number, width = state.layers.index(layer), width_of(layer, model.config)
        plan = planner.layer(number, layer, width, partial(graphs.holds, layer))
    leave_out, moving, again = LeaveOut(partial(_is_watched, layer)), None, None
    if offload is not None:
        moving = partial(offload.moving, stays=layer is state.layers[-1])
        around = partial(state.replay.leaving_out, leave_out)
        again = partial(graphs.running_again, layer, offload.least_tokens, around)
    memory = LayerMemory(plan, moving, state.memory.tiles, again, collected.returning)
    ours = partial(collected.checkpoint_collecting, LayerCheckpoint(layer, adapter_states.note))
    host = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = state.replay.wrap(ours, host, memory, leave_out)


def _replay(layer: Any, state: Attached) -> None:
    """Replay the routing under the host's checkpoint function, and keep that for `detach`."""
    layer._gradient_checkpointing_func = state.replay.wrap(
        layer._gradient_checkpointing_func, leave_out=LeaveOut(partial(_is_watched, layer))
    )


def _is_watched(layer: nn.Module) -> bool:
    """Whether hooks lie on a layer or in it that are neither ours nor Transformers'."""
    hooks = (hooks for m in layer.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks)
    return not all(graphs.is_observer(hook) for each in hooks for hook in each.values())


def decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
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
    """Take in what changed since the last batch: new adapters, a trainer's own forward or gradient checkpointing.

    Trainers turn that on by default (TRL does). Where `memory` was set, it says what runs again; elsewhere theirs does.
    """
    trl_head.bind(model)
    theirs = [layer for layer in state.layers if layer.gradient_checkpointing and not _is_replayed(layer)]
    if state.memory is not None:
        _spare(theirs, model, state)
    inside = chain.from_iterable(block._modules.values() for block in state.blocks)
    if state.adapters != _adapters_of(model) or any(map(_is_unbound, inside)):
        bind_all(model)
    if state.memory is None and state.blocks:
        for layer in theirs:
            _replay(layer, state)


def _is_replayed(layer: Any) -> bool:
    return isinstance(getattr(layer, "_gradient_checkpointing_func", None), ReplayingCheckpoint)


def _is_unbound(module: nn.Module | None) -> bool:
    """Whether PEFT has wrapped these experts since wrappers were last bound."""
    return (
        isinstance(module, ParamWrapper)
        and forwards.given(module) is None
        and transformers.is_experts(peft.wrappers_of(module)[1])
    )


def set_memory(model: PreTrainedModel, state: Attached, memory: str) -> None:
    """Spare memory in this way from now on, and in no other that was set before.

    Gradient checkpointing is turned on, with our own choice of torch's two ways and the routing replayed, or off.

    Args:
        model: the model.
        state: what was done to it.
        memory: see `expertune.memory.policy.policy_of`.
    """
    state.memory = policy_of(memory)
    for _, module in transformers.named_experts(model):
        transformers.plan_of(module).tiles = state.memory.tiles if state.memory.planner is None else None
    if not model.supports_gradient_checkpointing:
        return
    if memory != "fast":
        # renamed in transformers 5.2x; the old names warn there and end with version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    _spare(state.layers, model, state)


def _spare(layers: Sequence[Any], model: PreTrainedModel, state: Attached) -> None:
    """Let layers with gradient checkpointing on run again as the setting of memory says, if at all."""
    assert state.memory is not None
    if layers and state.memory.name == "fast":
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        return
    for layer in layers:
        _checkpoint(layer, model, state)
