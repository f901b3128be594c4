"""Which modules of a model are recorded: the parts of its layers that hold LoRA and no experts.

At short context their many small operations take longer to submit than to run: attention, dense layers, shared experts.
The experts' own products run longer than they take to submit, and the router stays the host's, whose outputs hooks
collect.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from expertune.graphs.piece import Piece, Recorder
from expertune.hosts import attention
from expertune.hosts.transformers import is_experts
from expertune.memory.replay import RoutingReplay

# what the loss is divided by goes with every call down to the attention, which does not read it
_IGNORED = frozenset({"num_items_in_batch"})


def recorder(replay: RoutingReplay) -> Recorder:
    """For one model.

    Args:
        replay: its routing replay, which knows when a layer is checkpointed.
    """
    return Recorder(_context, partial(_is_checkpointed, replay), _IGNORED)


def bind(layers: Sequence[nn.Module], recorder: Recorder) -> None:
    """Let the pieces of these layers be recorded, those that are not yet."""
    for layer in layers:
        for module in pieces(layer):
            if "forward" not in vars(module):
                module.forward = Piece(module, recorder)


def unbind(recorder: Recorder) -> None:
    """Undo `bind`, unless someone has given a module another forward since."""
    for piece in recorder.pieces:
        if vars(piece.module).get("forward") is piece:
            del piece.module.forward
    recorder.pieces.clear()


def pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module with LoRA and without experts, in order; a LoRA layer alone is none."""
    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            continue
        inner = list(child.modules())
        if any(is_experts(each) for each in inner):
            yield from pieces(child)
        elif any(isinstance(each, BaseTunerLayer) for each in inner):
            yield child


def status(recorder: Recorder) -> str:
    """What has been recorded, in words."""
    recorded = [piece for piece in recorder.pieces if piece.recordings]
    kinds = max((piece.recordings for piece in recorded), default=0)
    refused = "".join(f"; {kind.__name__} cannot be: {reason}" for kind, reason in recorder.refused.items())
    return f"CUDA graphs: {len(recorded)} of {len(recorder.pieces)} parts of layers, {kinds} kinds of calls{refused}"


def _is_checkpointed(replay: RoutingReplay) -> bool:
    return replay.tape is not None


def _context(module: nn.Module, kwargs: dict[str, Any]) -> Hashable | None:
    """The attention that a call runs, which the host reads from its config; None for one that is not recorded."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "")
    if implementation == attention.IMPLEMENTATION and not attention.is_whole(
        kwargs.get("attention_mask"), kwargs.get("position_ids")
    ):
        return None
    return str(implementation)
