"""Which modules of a model are recorded: its layers with LoRA; where a layer cannot be, its parts.

A layer cannot be where samples are packed or padded: its attention depends on where they lie, its experts do not.

At short context the many small operations of a layer take longer to submit than to run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from expertune.graphs.piece import MOST_TOKENS, Piece
from expertune.graphs.recorder import Recorder
from expertune.graphs.rerun import Around
from expertune.hosts import attention, blocks, collected, forwards, latent_attention, mlps, peft, rotary, samples
from expertune.hosts.current import recording
from expertune.hosts.transformers import is_experts
from expertune.hosts.twins import twin_around
from expertune.memory.planner import Way
from expertune.memory.replay import RoutingReplay

_OBSERVERS = (output_capturing.__name__, blocks.__name__)  # whose hooks do nothing else
_OURS = (latent_attention.forward, mlps.forward, rotary.forward)  # forwards of modules that are recorded
# Above, a block by itself waits for the device: at 4,096 tokens of Qwen3's shape it takes the device 2.2 ms and the CPU
# of an H200's machine 2.5 to submit, at 16,384 6.1 and 2.9.
_MOST_TOKENS_OF_BLOCK = 4096


@dataclass(frozen=True)
class _Forward:
    """A forward of ours as a function of any module.

    Args:
        forward: takes the module, and these others after it.
    """

    forward: Callable[..., Any]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "_Forward | None":
        """The one that a module runs, if it may be recorded."""
        if any(forwards.runs(module, forward) for forward in _OURS):
            given = forwards.given(module)
            return cls(given.func, given.args[1:])
        return None

    def of_module(self, module: nn.Module) -> Callable[..., Any]:
        """As it is given to a module."""
        return partial(self.forward, module, *self.others)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(module, *self.others, *args, **kwargs)


class TransformersHost:
    """Of one model: see `expertune.graphs.host.Host`.

    Transformers collects what a caller asked for, such as the routers' logits, by hooks that append to lists. They are
    given other lists while a layer is recorded.

    Args:
        replay: the model's routing replay, which knows when a layer is checkpointed.
        rest: see `Host.rest`.
    """

    # what the loss is divided by goes with every call down to the attention, which does not read it
    ignored = frozenset({"num_items_in_batch"})

    def __init__(self, replay: RoutingReplay, rest: Callable[[torch.device], float]) -> None:
        self._replay = replay
        self._configs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # of modules, or of a part of theirs
        self.rest = rest

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model has other modules."""
        return {name: value for name, value in vars(self).items() if name != "_configs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _configs=WeakKeyDictionary())

    def is_checkpointed(self) -> bool:
        """Whether a tape is running."""
        return self._replay.tape is not None

    def context(self, module: nn.Module, kwargs: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
        """The attention that the call runs, which the host reads from its config, and what is collected from it."""
        if module not in self._configs:
            self._configs[module] = next((m.config for m in module.modules() if hasattr(m, "config")), None)
        implementation = str(getattr(self._configs[module], "_attn_implementation", ""))
        return None if attention.waits(implementation, kwargs) else (implementation, collected.names())

    def is_observer(self, hook: Callable[..., Any]) -> bool:
        """See `is_observer`."""
        return is_observer(hook)

    @contextmanager
    def recording(self, context: tuple[str, tuple[str, ...]]) -> Iterator[dict[str, list[Any]]]:
        """Lists in place of those that the hooks append to; what an attention calls may be computed together."""
        _, names = context
        with recording.being(True), collected.catching(names) as caught:
            yield caught

    def deliver(self, caught: dict[str, list[Any]]) -> None:
        """Append to those lists."""
        collected.deliver(caught)


def is_observer(hook: Callable[..., Any]) -> bool:
    """Whether a hook is Transformers', or our own around a block, which serves checkpointed layers alone."""
    return getattr(getattr(hook, "func", hook), "__module__", None) in _OBSERVERS


def bind(layers: Sequence[nn.Module], recorder: Recorder) -> None:
    """Let the pieces of these layers be recorded, those that are not yet."""
    for layer in layers:
        for module in parts(layer):
            ours = _Forward.of(module)
            if ours is not None or forwards.given(module) is None:
                wrapper = _checkpointing(type(module).forward) if ours is None else None
                around = None if wrapper is None else partial(twin_around, wrapper, "forward")
                function = ours if wrapper is None else _Inside(type(module))
                most_tokens = _MOST_TOKENS_OF_BLOCK if module is not layer and peft.is_block(module) else MOST_TOKENS
                unrecorded = None if ours is None else ours.of_module
                forwards.give(module, Piece(module, recorder, function, around, most_tokens, unrecorded))


class _Inside:
    """The forward of a layer's class inside of what checkpoints it. Looked up there, for pickle knows no other way.

    Args:
        kind: the class.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self._kind = kind

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Of the layer, and the arguments."""
        wrapper: Any = _checkpointing(self._kind.forward)
        return wrapper.__wrapped__(layer, *args, **kwargs)


@cache
def _checkpointing(forward: Callable[..., Any]) -> FunctionType | None:
    """A class's forward if it is the host's code that checkpoints a layer, around that of the layer; else None.

    Up to 5.1x, Transformers checkpoints the call of a layer, so a forward runs inside; later its class's forward does
    it. What is recorded must lie inside: the planner is asked outside, in every step.
    """
    if not isinstance(forward, FunctionType) or "_gradient_checkpointing_func" not in forward.__code__.co_names:
        return None
    held = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    is_around = "forward" in held and held["forward"].cell_contents is getattr(forward, "__wrapped__", None)
    return forward if is_around else None


def hook(decoder: nn.Module, recorder: Recorder) -> Iterator[RemovableHandle]:
    """Tell when a decoder's forward begins and ends; a copy of the model tells its own recorder."""
    yield decoder.register_forward_pre_hook(partial(_begin, recorder), with_kwargs=True)
    yield decoder.register_forward_hook(partial(_end, recorder), always_call=True)


def _begin(recorder: Recorder, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        recorder.begin(_num_tokens(args, kwargs))


def _end(recorder: Recorder, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        recorder.end()


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a decoder's batch; 0 if that cannot be seen."""
    x = samples.input_of(args, kwargs)
    return 0 if x is None else x.shape[:2].numel()


def unbind(recorder: Recorder) -> None:
    """Undo `bind`, unless someone has given a module another forward since."""
    for piece in recorder.pieces:
        piece.retire()
        if forwards.given(piece.module) is not piece:
            continue
        forwards.take_back(piece.module)
        if isinstance(piece.function, _Forward):
            forwards.give(piece.module, piece.function.of_module(piece.module))
    recorder.pieces.clear()


def holds(layer: nn.Module, tokens: int) -> bool:
    """Whether what a layer keeps of so many tokens lies in the memory of its recording."""
    piece = forwards.given(layer)
    return isinstance(piece, Piece) and piece.holds(tokens)


def running_again(
    layer: nn.Module, below: int, around_again: Around, way: Way, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AbstractContextManager[None] | None:
    """Around a call of a layer that spares memory: replays it, and in backward again. None if it cannot be.

    A layer that may keep, but for which no more is recorded that does, runs again too: replayed twice it takes less
    time than submitted once.

    Args:
        layer: the layer.
        below: tokens from which on more is done to spare memory.
        around_again: see `Piece.running_again`.
        way: in which the layer was to run.
        args, kwargs: of the call.
    """
    piece = forwards.given(layer)
    if not isinstance(piece, Piece) or not args or args[0].shape[:-1].numel() >= below:
        return None
    return piece.running_again(args, kwargs, around_again, may_keep=way is Way.KEEP)


def parts(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer with LoRA, and then, for where it cannot be recorded as a whole, its parts."""
    if _has_adapters(layer):
        yield layer
        yield from _inside(layer)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module: blocks of experts, and the largest with LoRA and without experts; a LoRA layer is none."""
    for child in module.children():
        if isinstance(child, BaseTunerLayer) or not _has_adapters(child):
            continue
        has_experts = any(map(is_experts, child.modules()))
        if peft.is_block(child) or not has_experts:
            yield child
        if has_experts:
            yield from _inside(child)


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(each, BaseTunerLayer) for each in module.modules())


def status(recorder: Recorder) -> str:
    """What has been recorded, in words."""
    layers = [piece for piece in recorder.pieces if isinstance(piece.module, GradientCheckpointingLayer)]
    recorded = [piece for piece in recorder.pieces if piece.recordings]
    whole = sum(piece in layers for piece in recorded)
    kinds = max((piece.recordings for piece in recorded), default=0)
    parts_alone = f" and {len(recorded) - whole} parts of layers" if len(recorded) > whole else ""
    again = sum(piece.runs_again for piece in layers)
    runs_again = f", {again} of the layers run forward again in backward" if again else ""
    refused = "".join(f"; {kind.__name__} cannot be: {reason}" for kind, reason in recorder.refused.items())
    short = "; there was no room for more" if recorder.lacked_room else ""
    ended = "" if recorder.is_on else "; no more are made, because their memory was wanted again and again"
    said = f"CUDA graphs: {whole} of {len(layers)} layers{parts_alone}, {kinds} kinds of calls"
    return f"{said}{runs_again}{refused}{short}{ended}"
