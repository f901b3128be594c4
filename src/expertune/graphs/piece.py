"""Which calls of a module are recorded: those that came before, in training, on few tokens."""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertune.graphs.pool import Pool
from expertune.graphs.recorder import Recorder
from expertune.graphs.recording import Recording, tokens_of
from expertune.graphs.rerun import Around, Rerun
from expertune.graphs.structure import NotPlainError, put_together, take_apart
from expertune.graphs.watch import Watch
from expertune.whole import copied

_SEEN = 2  # calls of a kind before the one that is recorded: the first finds kernels, the second runs as planned
_MOST_KEPT = 2  # kinds of calls that a module is recorded for with what they keep: each takes memory of its own
_MOST_RUN_AGAIN = 32  # kinds that run again: they share memory, and a graph takes some 0.3 MiB
# Above, a step waits for the device. At 8,192 tokens recording saves 14 of 188 ms of GLM's shape and none of Qwen3's
# (H200); on an H100 1 of 188, for 2.5 GiB.
MOST_TOKENS = 8192
_MOST_COUNTED = 256  # kinds of calls whose number is kept
_MOST_TRAINED = 2**27  # parameters: their gradients leave a recording by a copy


class _Found(NamedTuple):
    """The recording of a call, and the call's tensors."""

    recording: Recording
    tensors: list[Tensor]


class Piece:
    """The forward of a module, replayed where such a call has been recorded. Stands in for `module.forward`.

    A piece may lie in another: it then comes to be recorded only where that one is not.

    Args:
        module: computes the same from the same inputs.
        recorder: of its model.
        function: in place of its class's forward, of the module and the arguments.
        around: of a function, one of the module and the arguments that calls it in its turn, or not; that is not part
            of what is recorded, but of the class's forward. None for nothing around.
        most_tokens: of a call that is recorded.
        unrecorded: the forward of a module that is no piece; None for its class's.
    """

    def __init__(
        self,
        module: nn.Module,
        recorder: Recorder,
        function: Callable[..., Any] | None = None,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        most_tokens: int = MOST_TOKENS,
        unrecorded: Callable[[nn.Module], Callable[..., Any]] | None = None,
    ) -> None:
        self.module = module
        self.function = function
        self._around = around
        self._most_tokens = most_tokens
        self._unrecorded = unrecorded
        self._outside: Callable[..., Any] | None = None
        self._recorder = recorder
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, Recording] = {}
        self._watch: Watch | None = None
        self._given: _Found | None = None
        self._has_looked = False  # for a recording of the call that comes, which is then what is given
        self._is_new = False  # whether the kind of call that was looked for last may yet be recorded
        self._is_retired = False
        recorder.pieces.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        if self._is_retired:
            return self._plain(self.module)(*args, **kwargs)
        if self._around is None:
            return self._inside(self.module, *args, **kwargs)
        if torch.compiler.is_compiling():  # nothing is recorded, and what is around is the class's own
            return type(self.module).forward(self.module, *args, **kwargs)
        if self._outside is None:
            self._outside = self._around(self._inside)
        return self._outside(self.module, *args, **kwargs)

    def _inside(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replay the call, record it or run it."""
        found = self._given if self._has_looked else self._find(args, kwargs)
        if found is None:
            with self._recorder.passing() if self._is_new else nullcontext():
                return self._run(args, kwargs)
        recording, tensors = found
        self._recorder.begin_replay(recording)
        out, caught = recording.replay(tensors)
        self._recorder.host.deliver(caught)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Recordings belong to one model in one process; a copy makes its own."""
        return vars(self) | {"_seen": {}, "_recordings": {}, "_watch": None, "_outside": None, "_given": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A piece of the model's copy; the module alone is copied as if it had never been one."""
        if self._recorder.is_copied(memo):
            return copied(self, memo)
        return self._plain(copy.deepcopy(self.module, memo))

    def _plain(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module that is no piece."""
        return MethodType(type(module).forward, module) if self._unrecorded is None else self._unrecorded(module)

    def retire(self) -> None:
        """Record and replay no more: whoever still holds this has the module's plain forward."""
        self.forget()
        self._is_retired = True

    @property
    def recordings(self) -> int:
        """For how many kinds of calls there are recordings."""
        return len(self._recordings)

    @property
    def runs_again(self) -> bool:
        """Whether a recording of it runs forward again in backward."""
        return self._number(keeps=False) > 0

    def holds(self, tokens: int) -> bool:
        """Whether what such a call keeps for backward has its memory already."""
        return any(recording.keeps and recording.tokens == tokens for recording in self._recordings.values())

    def running_again(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], around_again: Around, *, may_keep: bool
    ) -> AbstractContextManager[None] | None:
        """Around this very call of the module, whose backward is to run forward again: both are then replayed.

        Args:
            args, kwargs: of the call.
            around_again: around the second forward when it is recorded; nobody reads what it returns.
            may_keep: whether a recording that keeps serves as well.

        Returns:
            None where they have not been recorded, and the call is to be checkpointed.
        """
        if may_keep:
            return self._giving(self._find(args, kwargs, around_again))
        if not self._is_asked() or self._is_spared():
            return None
        self._recorder.make_way(self)
        found = self._look(args, kwargs, around_again, may_keep=False)
        return None if found is None else self._giving(found)

    @contextmanager
    def _giving(self, found: "_Found | None") -> Iterator[None]:
        self._given, self._has_looked = found, True
        try:
            yield
        finally:
            self._given, self._has_looked = None, False

    def is_same(self) -> bool:
        """Whether the module is as it was when it was first looked at; if not, it is as if never looked at."""
        if self._watch is not None and not self._watch.is_same():
            self._watch = None
        return self._watch is not None

    def forget(self) -> None:
        """Drop all recordings, and begin to count anew."""
        self._seen.clear()
        self._recorder.drop(self._recordings.values())
        self._recordings.clear()
        self._recorder.keepers.pop(self, None)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (self.function or type(self.module).forward)(self.module, *args, **kwargs)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], around_again: Around | None = None
    ) -> "_Found | None":
        """The recording for a call, perhaps made now, and the call's tensors; None if the module itself is to run."""
        if not self._is_asked():
            return None
        found = None if self._is_spared() else self._look(args, kwargs, around_again)
        if found is None:
            self._recorder.make_way(self)
        return found

    def _is_asked(self) -> bool:
        """Whether this is a call of the module as it is trained."""
        recorder = self._recorder
        is_training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return is_training and recorder.is_on and not recorder.is_passing

    def _is_spared(self) -> bool:
        """Whether memory is spared around this call: by a checkpoint, or by hooks that say what is saved for backward.

        The checkpoint that is not reentrant has such hooks, too.
        """
        is_checkpointed = self._recorder.host.is_checkpointed()
        return is_checkpointed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def _look(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        around_again: Around | None = None,
        *,
        may_keep: bool = True,
    ) -> "_Found | None":
        """The recording for a call as it is trained.

        Args:
            args, kwargs: of the call.
            around_again: around the second forward of one that runs forward again; None if none is to.
            may_keep: whether one that keeps what backward needs will do.
        """
        self._is_new = False
        recorder, host = self._recorder, self._recorder.host
        context = host.context(self.module, kwargs)
        if context is None:
            return None
        tensors: list[Tensor] = []
        try:
            read = {name: value for name, value in kwargs.items() if name not in host.ignored}
            call = take_apart((args, read), tensors)
        except NotPlainError:  # such as a cache of keys and values, which the call fills
            return None
        pool = recorder.pool(tensors[0].device)
        if pool is None or not self._pays(tensors):
            return None
        device = tensors[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kind = (call, context, autocast)
        if not recorder.has_looked(self):
            self.is_same()
        if self._watch is None:
            self.forget()
            self._watch = Watch(self.module)
            recorder.note_change()
        ways = [keeps for keeps in (True, False) if (may_keep if keeps else around_again is not None)]
        for recording in (self._recordings.get((kind, keeps)) for keeps in ways):
            if recording is not None and recording.may_begin(tensors):
                return _Found(recording, tensors)
        if self._came_before(kind):
            for keeps in ways:
                if (kind, keeps) not in self._recordings and self._may_record(tensors, pool, keeps=keeps):
                    return self._record(kind, tensors, pool, None if keeps else around_again)
        return None

    def _pays(self, tensors: list[Tensor]) -> bool:
        is_refused = type(self.module) in self._recorder.refused
        return not is_refused and tokens_of(tensors) <= self._most_tokens

    def _came_before(self, kind: Hashable) -> bool:
        """Whether such a call came so often that recording is tried; this one is counted.

        What could not be recorded is tried again after twice as many calls, for asking takes time.
        """
        if len(self._seen) > _MOST_COUNTED:
            self._seen.clear()
        seen = self._seen.get(kind, 0)
        self._seen[kind] = seen + 1
        self._is_new = seen < _SEEN
        return seen >= _SEEN and seen.bit_count() == 1

    def _may_record(self, tensors: list[Tensor], pool: Pool, *, keeps: bool) -> bool:
        assert self._watch is not None
        return (
            sum(p.numel() for p in self.module.parameters() if p.requires_grad) <= _MOST_TRAINED
            and any(tensor.requires_grad for tensor in (*tensors, *self.module.parameters()))
            and not any(tensor.is_inference() for tensor in tensors)
            and all(map(self._recorder.host.is_observer, self._watch.hooks()))
            and not any(isinstance(m, nn.Dropout) and m.p for m in self.module.modules())
            and not getattr(self.module, "attention_dropout", 0.0)
            and self._has_room(pool, tensors[0].device, keeps=keeps)
        )

    def _has_room(self, pool: Pool, device: torch.device, *, keeps: bool) -> bool:
        """For one more recording."""
        rest = self._recorder.host.rest(device)
        if not keeps:
            return self._number(keeps=False) < _MOST_RUN_AGAIN and not pool.is_short(rest)
        has_room = pool.has_room(rest)
        self._recorder.lacked_room |= not has_room
        return has_room and self._number(keeps=True) < _MOST_KEPT

    def _number(self, *, keeps: bool) -> int:
        """Of recordings that keep what backward needs, or of those that run forward again."""
        return sum(recording.keeps is keeps for recording in self._recordings.values())

    def _is_first(self, *, keeps: bool) -> bool:
        """Whether no piece whose module has this one's type has more recordings of this way."""
        alike: list[Piece] = [p for p in self._recorder.pieces if type(p.module) is type(self.module)]
        return max(p._number(keeps=keeps) for p in alike) == self._number(keeps=keeps)

    def _record(self, kind: Any, tensors: list[Tensor], pool: Pool, around_again: Around | None) -> "_Found | None":
        (call, context, autocast), device, module = kind, tensors[0].device.type, self.module
        recorder, keeps = self._recorder, around_again is None
        trained = [p for p in module.parameters() if p.requires_grad]

        def forward(inputs: Any, leaves: Any) -> Any:
            args, kwargs = put_together(call, iter(inputs))
            given: list[Tensor] = []
            before = take_apart((args, kwargs), given)
            # a weight that an earlier operation cast would be read from the cache, and be stale in every replay
            autocasts = torch.autocast(device, dtype=autocast or None, enabled=bool(autocast), cache_enabled=False)
            instead = dict(zip(trained, leaves, strict=True))
            with autocasts, _with_parameters(module, instead), recorder.recording(context) as caught:
                out = self._run(args, kwargs)
            left: list[Tensor] = []
            if take_apart((args, kwargs), left) != before or any(a is not b for a, b in zip(given, left, strict=True)):
                raise RuntimeError("it changes its arguments")
            return out, caught

        if self._is_first(keeps=keeps):  # what all kept in the last step is still held for such work
            pool.capture.make_room()
        try:
            recording = (
                Recording(forward, tensors, trained, pool)
                if around_again is None
                else Rerun(around_again, forward, tensors, trained, pool)
            )
        except RuntimeError as error:
            recorder.refused[type(module)] = str(error).splitlines()[0]
            return None
        self._recordings[kind, keeps] = recording
        if keeps:
            recorder.lacked_room = False
            recorder.keepers[self] = None
        return _Found(recording, tensors)


@contextmanager
def _with_parameters(module: nn.Module, instead: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors in place of its parameters."""
    held = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if p in instead]
    try:
        for parameters, name, p in held:
            parameters[name] = instead[p]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, p in held:
            parameters[name] = p
