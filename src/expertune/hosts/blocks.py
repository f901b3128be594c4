"""The MoE blocks of a model, with hooks that switch the routing replay on within, and its decoders."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from expertune.hosts import peft
from expertune.memory.replay import RoutingReplay


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Each module that holds experts."""
    yield from filter(peft.is_block, model.modules())


def decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The innermost Transformers models that hold checkpointed layers."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [m for m in models if not any(inner is not m and inner in models for inner in m.modules())]


def hook(block: nn.Module, replay: RoutingReplay) -> Iterator[RemovableHandle]:
    """Switch the replay on for the router while the block runs."""
    yield block.register_forward_pre_hook(partial(_before, replay))
    yield block.register_forward_hook(partial(_after, replay), always_call=True)


def _before(replay: RoutingReplay, _block: nn.Module, _args: Any) -> None:
    replay.enter_block()


def _after(replay: RoutingReplay, _block: nn.Module, _args: Any, _output: Any) -> None:
    replay.leave_block()
