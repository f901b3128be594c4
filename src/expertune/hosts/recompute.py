"""Which layers of a model run again in backward, and how: as the setting of memory says, or as the host does."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.hosts import adapter_states, collected, forwards, graphs, samples, transformers
from expertune.hosts.attached import Attached
from expertune.hosts.widths import width_of
from expertune.memory.checkpoint import LayerCheckpoint
from expertune.memory.leave_out import LeaveOut
from expertune.memory.policy import policy_of
from expertune.memory.replay import LayerMemory, ReplayingCheckpoint


def set_memory(model: PreTrainedModel, state: Attached, memory: str) -> None:
    """Spare memory in this way from now on, and in no other that was set before.

    Gradient checkpointing is turned on, with a node of autograd of our own and the routing replayed, or off.

    Args:
        model: the model.
        state: what was done to it.
        memory: see `expertune.memory.policy.policy_of`.
    """
    state.memory = policy_of(memory)
    if state.memory.planner is not None:
        state.memory.planner.whole = model
    for _, module in transformers.named_experts(model):
        transformers.plan_of(module).tiles = state.memory.tiles if state.memory.planner is None else None
    if not model.supports_gradient_checkpointing:
        return
    if memory != "fast":
        # renamed in transformers 5.2x; the old names warn there and end with version 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    _spare(state.layers, model, state)


def take_in(model: PreTrainedModel, state: Attached) -> None:
    """Take in the layers whose checkpointing was turned on since the last batch; trainers do (TRL by default).

    Where `memory` was set, it says what runs again; elsewhere the host's function does, with the routing replayed.
    """
    theirs = [layer for layer in state.layers if layer.gradient_checkpointing and not _is_ours(layer)]
    if state.memory is not None:
        _spare(theirs, model, state)
    elif state.blocks:
        for layer in theirs:
            host = layer._gradient_checkpointing_func
            leave_out = LeaveOut(partial(_is_watched, layer))
            layer._gradient_checkpointing_func = state.replay.wrap(host, leave_out=leave_out)


def hook(decoder: nn.Module) -> Iterator[RemovableHandle]:
    """Let a decoder's layers run once where it is called with a cache of earlier keys and values.

    The host's checkpoint drops a cache: attention would see the tokens of the call alone.
    """
    beside = _BesideACache()
    yield decoder.register_forward_pre_hook(beside.begin, with_kwargs=True)
    yield decoder.register_forward_hook(beside.end, always_call=True)


class _BesideACache:
    """Two hooks around a decoder's forward, and which layers they have turned checkpointing off for."""

    def __init__(self) -> None:
        self._layers: list[GradientCheckpointingLayer] = []

    def begin(self, decoder: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before."""
        self.end()  # of a call that Ctrl-C ended: torch then calls no hook
        if decoder.training and samples.has_cache(kwargs) and not torch.compiler.is_compiling():
            layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
            self._layers = [layer for layer in layers if layer.gradient_checkpointing]
            for layer in self._layers:
                layer.gradient_checkpointing = False

    def end(self, *_: Any) -> None:
        """Behind."""
        for layer in self._layers:
            layer.gradient_checkpointing = True
        self._layers = []


def give_back(model: nn.Module) -> None:
    """Give layers the host's checkpoint function again."""
    layers: list[Any] = [module for module in model.modules() if _is_ours(module)]
    for layer in layers:
        layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.host


def _spare(layers: Sequence[Any], model: PreTrainedModel, state: Attached) -> None:
    """Let layers with gradient checkpointing on run again as the setting of memory says, if at all."""
    assert state.memory is not None
    if layers and state.memory.name == "fast":
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        return
    for layer in layers:
        _checkpoint(layer, model, state)


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


def _is_watched(layer: nn.Module) -> bool:
    """Whether hooks lie on a layer or in it, or on all modules, that are neither ours nor Transformers'.

    Or a module of it runs a forward that somebody has given to it alone, which may look at what comes of the experts.
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    for module in layer.modules():
        hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if forwards.is_somebody_elses(module) or not all(map(graphs.is_observer, hooks)):
            return True
    return False


def _is_ours(layer: Any) -> bool:
    return isinstance(getattr(layer, "_gradient_checkpointing_func", None), ReplayingCheckpoint)
