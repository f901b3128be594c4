"""What was done to a model: noted on it, so that it is found again and undone."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.graphs.recorder import Recorder
from expertune.hosts import attention, transformers
from expertune.memory.policy import Policy
from expertune.memory.replay import RoutingReplay


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
        windows: those configs, each with what it said of windows.
        is_attention_lent: whether these name the host's while it generates.
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
    windows: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)
    is_attention_lent: bool = False
    norms: list[nn.Module] = field(default_factory=list)
    latents: list[nn.Module] = field(default_factory=list)
    rotaries: list[nn.Module] = field(default_factory=list)
    routers: list[nn.Module] = field(default_factory=list)
    mlps: list[nn.Module] = field(default_factory=list)
    memory: Policy | None = None
    recorder: Recorder | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that has read a pickled model, the host's registries know nothing of ours yet."""
        attention.register()
        transformers.register()
        vars(self).update(state)


def attached(model: nn.Module) -> Attached | None:
    """What `attach` did to this model, if it did."""
    state = getattr(model, "_expertune", None)
    return state if isinstance(state, Attached) else None
