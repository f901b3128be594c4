"""What `optimize` does to one model instance, and how it is undone: plans on the experts, hooks on their blocks.

A hook before the decoder gives PEFT wrappers that came later (`get_peft_model`, `SFTTrainer(peft_config=…)`,
`PeftModel.from_pretrained`) our forward, and its checkpoint function a routing replay; hooks around each MoE block
switch that replay on for the router.
"""

import copy
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.graphs.recorder import Recorder
from expertune.hosts import (
    angles,
    attention,
    bitsandbytes,
    continuous_batching,
    data_parallel,
    formulas,
    forwards,
    graphs,
    latent_attention,
    llama4,
    mlps,
    norms,
    peft,
    recompute,
    rotary,
    router,
    samples,
    transformers,
    trl_head,
    windows,
)
from expertune.hosts.attached import Attached, attached
from expertune.hosts.blocks import blocks, decoders, hook


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
    found = _find(model, state)
    peft.check(model, {id(module): plan for module, plan in found.plans})
    taken = [each for each in decoders(model) if is_attention_ours and not attention.why_not(each, model)]
    if (before := attached(model)) is not None:
        state.memory = before.memory
    detach(model)
    model._expertune = state
    try:
        state.attentions = [each for decoder in taken for each in attention.take_over(decoder)]
        state.windows = [(config, windows.said(config)) for config, _ in state.attentions]
        _bind(model, state, found)
        _hook(model, state)
        if state.memory is not None:
            recompute.take_in(model, state)
        if uses_graphs:
            _make_recorder(model, state)
        bind_all(model)
    except BaseException:  # Ctrl-C, too
        detach(model)
        raise
    return state


class _Found(NamedTuple):
    """What is ours of a model: its experts with their plans, and modules with the formulas that they follow."""

    plans: list[tuple[nn.Module, transformers.ExpertsPlan]]
    norms: list[tuple[nn.Module, Any]]
    latents: list[nn.Module]
    rotaries: list[nn.Module]
    routers: list[tuple[nn.Module, Any]]
    mlps: list[tuple[nn.Module, Any]]


def _find(model: PreTrainedModel, state: Attached) -> _Found:
    """Look, and change nothing."""
    # where formulas are tried, wherever the caller makes tensors by default, and whatever is drawn next
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        plans = [
            (module, transformers.make_plan(name, module, _model_type(module, model), state.requested, state.replay))
            for name, module in transformers.named_experts(model)
        ]
        return _Found(
            plans,
            norms.find(model),
            latent_attention.find(model),
            rotary.find(model),
            router.find(model),
            mlps.find(model),
        )


def _bind(model: PreTrainedModel, state: Attached, found: _Found) -> None:
    """Give modules our forwards, and experts their plans."""
    state.norms = formulas.bind(found.norms, norms.forward)
    state.latents = forwards.bind(found.latents, latent_attention.forward)
    state.rotaries = forwards.bind(found.rotaries, rotary.forward)
    state.routers = formulas.bind(found.routers, router.forward, state.replay)
    state.mlps = formulas.bind(found.mlps, mlps.forward, state.replay)
    transformers.register()
    configs: dict[int, Any] = {}
    for module, plan in found.plans:
        module._expertune = plan  # type: ignore[assignment]
        if llama4.is_experts(module):
            llama4.bind([module], transformers.experts_forward)
        else:
            module.config = _own_config(module.config, configs)
    state.blocks = list(blocks(model))
    llama4.bind(filter(llama4.is_block, state.blocks), llama4.block_forward)
    state.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _make_recorder(model: PreTrainedModel, state: Attached) -> None:
    state.recorder = Recorder(graphs.TransformersHost(state.replay, partial(_rest, state)))
    state.recorder.whole = model
    state.handles += [each for decoder in decoders(model) for each in graphs.hook(decoder, state.recorder)]


def _rest(state: Attached, device: torch.device) -> float:
    """What the planner of a model has measured of a step beside what its layers keep, in bytes."""
    return 0 if state.memory is None or state.memory.planner is None else state.memory.planner.rest(device)


def _hook(model: PreTrainedModel, state: Attached) -> None:
    """Ours around the blocks, before the decoders, and around the optimizer's steps."""
    for block in state.blocks:
        state.handles += hook(block, state.replay)
    for decoder in decoders(model):
        state.handles.append(decoder.register_forward_pre_hook(partial(_before_decoder, model, state)))
        state.handles += recompute.hook(decoder)
    state.handles += samples.hook(model, decoders(model))
    state.handles += [handle for decoder in decoders(model) for handle in angles.hook(decoder)]
    bitsandbytes.take_over(model)
    continuous_batching.bind(model, state)
    data_parallel.bind(model)


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
    bitsandbytes.give_back(model)
    continuous_batching.unbind(model)
    data_parallel.unbind(model)
    attention.give_back(state.attentions)
    forwards.unbind(state.blocks, llama4.block_forward)
    for _, module in transformers.named_experts(model):  # also those that PEFT copied, to save them whole
        if not isinstance(getattr(module, "_expertune", None), transformers.ExpertsPlan):
            continue  # an interrupt came before its turn
        if llama4.is_experts(module):
            forwards.unbind([module], transformers.experts_forward)
        else:
            module.config = transformers.plan_of(module).host_config
        del module._expertune
    recompute.give_back(model)
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


def _refuse_unknown_blocks(model: nn.Module) -> None:
    """Refuse a block that holds Llama 4's experts and is not Llama 4's: it would not know how to call them.

    Raises:
        ValueError: names the first of them.
    """
    names = {id(module): transformers.clean(path) for path, module in model.named_modules()}
    for block in blocks(model):
        held = [experts for child in block.children() if (experts := peft.experts_in(child)) is not None]
        is_known = llama4.is_block(block) and not forwards.is_somebody_elses(block)
        if any(map(llama4.is_experts, held)) and not is_known:
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
        if reason is None:
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


def _attend_again(model: PreTrainedModel, state: Attached) -> None:
    """Take over the attention of decoders that have been given back theirs, unless someone has chosen another since."""
    had = {id(config): name for config, name in state.attentions}
    lent = [each for each in decoders(model) if had.get(id(each.config)) == each.config._attn_implementation]
    if lent:
        state.attentions = [each for decoder in lent for each in attention.take_over(decoder)]
        state.is_attention_lent = False


def _adapters_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that PEFT put into a Transformers model; it leaves their configs on it."""
    return tuple(getattr(model, "peft_config", {}))


def _before_decoder(model: PreTrainedModel, state: Attached, decoder: PreTrainedModel, _args: Any) -> None:
    """Take in what changed since the last batch: new adapters, a trainer's own forward or gradient checkpointing.

    Raises:
        ValueError: `torch.jit.trace` calls, which cannot follow operators of ours; or windows have changed.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise ValueError(
            "torch.jit.trace cannot follow expertune's operators. Call expertune.restore(model) first, or use "
            "torch.export, which can."
        )
    if state.is_attention_lent and continuous_batching.has_ended(model, decoder):
        _attend_again(model, state)
    if state.windows and attention.is_ours(decoder):
        windows.refuse_others(decoder.config, state.windows)
    trl_head.bind(model)
    recompute.take_in(model, state)
    inside = chain.from_iterable(block._modules.values() for block in state.blocks)
    if state.adapters != _adapters_of(model) or any(map(_is_unbound, inside)):
        bind_all(model)


def _is_unbound(module: nn.Module | None) -> bool:
    """Whether PEFT has wrapped these experts since wrappers were last bound."""
    return (
        isinstance(module, ParamWrapper)
        and forwards.given(module) is None
        and transformers.is_experts(peft.wrappers_of(module)[1])
    )
