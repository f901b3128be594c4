"""The angles of rotary embeddings, kept from one batch to the next where they follow from its shape alone.

A decoder that is given no positions counts them, and its embedding makes cosines and sines of them: a dozen small
operations in every step, in a time in which the device waits for Python. The same tensors again are known to be the
same, too: recorded layers (`graphs/`) need not copy them.
"""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertune.graphs.watch import Watch
from expertune.hosts import attention, forwards

_MOST_BYTES = 2**24  # that are kept of an embedding's angles
_GIVEN = ("position_ids", "cache_position", "cache", "past_key_values")  # by which positions may be others


class _Kept(NamedTuple):
    """What an embedding gave.

    Args:
        call: of which call, as far as that decides it.
        angles: cosines and sines.
        watch: of the embedding.
        read: its buffers.
        versions: of these and of the angles.
    """

    call: Hashable
    angles: tuple[Tensor, ...]
    watch: Watch
    read: list[Tensor]
    versions: list[int]

    @classmethod
    def of(cls, call: Hashable, angles: tuple[Tensor, ...], module: nn.Module) -> "_Kept":
        """As they are now: some embeddings change themselves with the length of a batch."""
        read = list(module.buffers())
        return cls(call, angles, Watch(module), read, _versions(angles, read))

    def has_stayed(self) -> bool:
        """Whether the embedding would give the same, and nobody has written to what it gave."""
        return _versions(self.angles, self.read) == self.versions and self.watch.is_same()


class Angles:
    """Of one decoder, whose embeddings share it."""

    def __init__(self) -> None:
        self.follow_from_shape = False  # in the forward of the decoder that runs
        self._kept: dict[Hashable, _Kept] = {}  # by the embedding and what else it is asked for
        self._positions: dict[Hashable, Tensor] = {}  # that each was first asked for in this forward

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a decoder makes its own."""
        return vars(Angles())

    def begin(self, *, follow_from_shape: bool) -> None:
        """A forward of the decoder begins."""
        self.follow_from_shape = follow_from_shape

    def end(self) -> None:
        """It has ended."""
        self.follow_from_shape = False
        self._positions.clear()

    def of(self, module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Any:
        """What the embedding gives; see `forward`."""
        kind = (id(module), layer_type)
        if self._positions.setdefault(kind, position_ids) is not position_ids:  # those of something else
            return _forward(module, x, position_ids, layer_type)
        call = (x.dtype, x.device, position_ids.dtype, position_ids.shape)
        kept = self._kept.get(kind)
        if kept is not None and kept.call == call and kept.has_stayed():
            return kept.angles
        angles = _forward(module, x, position_ids, layer_type)
        self._kept.pop(kind, None)
        if _may_be_kept(angles):
            self._kept[kind] = _Kept.of(call, angles, module)
        return angles


def hook(decoder: nn.Module) -> Iterator[Any]:
    """Let a decoder's embeddings keep what they give. Yields what undoes that, each by `remove()`."""
    angles = Angles()
    modules = [m for m in decoder.children() if type(m).__name__.endswith("RotaryEmbedding") and _is_known(m)]
    if modules:
        yield _Undo(partial(forwards.unbind, forwards.bind(modules, forward, angles), forward))
        yield decoder.register_forward_pre_hook(partial(_begin, angles), with_kwargs=True)
        yield decoder.register_forward_hook(partial(_end, angles), always_call=True)


def _begin(angles: Angles, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    mask = kwargs.get("attention_mask")
    is_usual = len(args) <= 1 and all(kwargs.get(name) is None for name in _GIVEN)
    angles.begin(follow_from_shape=is_usual and (mask is None or attention.hides_nothing(mask)))


def _end(angles: Angles, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        angles.end()


class _Undo(NamedTuple):
    """A handle, as hooks have one."""

    remove: Callable[[], None]


def forward(module: nn.Module, angles: Angles, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """An embedding's forward, as a decoder calls it.

    Args:
        module: the embedding.
        angles: of its decoder.
        x: has the dtype and device of what is given.
        position_ids: counted by the decoder, where it was given none.
        layer_type: for which angles are wanted, of an embedding that has several; else None.
    """
    if not torch.compiler.is_compiling() and angles.follow_from_shape:
        return angles.of(module, x, position_ids, layer_type)
    return _forward(module, x, position_ids, layer_type)


def _forward(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Any:
    """The host's."""
    types = () if layer_type is None else (layer_type,)
    return type(module).forward(module, x, position_ids, *types)


def _is_known(module: nn.Module) -> bool:
    """Whether it is called as others are, and all that decides what it gives can be seen: no parameters, no modules."""
    names = list(inspect.signature(type(module).forward).parameters)
    is_alone = not module._parameters and not module._modules
    return is_alone and names[1:3] == ["x", "position_ids"] and names[3:] in ([], ["layer_type"])


def _versions(*groups: Iterable[Tensor]) -> list[int]:
    return [tensor._version for tensor in chain.from_iterable(groups)]


def _may_be_kept(angles: Any) -> bool:
    is_plain = isinstance(angles, tuple) and all(type(t) is Tensor and not t.requires_grad for t in angles)
    return is_plain and not torch.is_inference_mode_enabled() and sum(t.nbytes for t in angles) <= _MOST_BYTES
