"""What the pieces of one model have in common: the memory of their recordings, and when it is given back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from expertune.graphs.capture import CudaCapture
from expertune.graphs.host import Host
from expertune.graphs.pool import Pool
from expertune.graphs.watch import Watch
from expertune.memory.meter import meter_of
from expertune.whole import OfAModel

_PAYS = 20  # replays of a recording, after which it has been worth making
_MOST_RELEASES = 3  # of recordings that had not paid

PoolOf: TypeAlias = Callable[[torch.device], Pool | None]


class Recorder(OfAModel):
    """The pieces of one model.

    Args:
        host: whose model it is.
        pool_of: of a device; None for one without graphs.
    """

    def __init__(self, host: Host, pool_of: PoolOf | None = None) -> None:
        self.host = host
        self.pieces: list[Any] = []  # each is a `Piece`, which knows this
        self.keepers: dict[Any, None] = {}  # those with recordings that keep what backward needs, in order
        self.refused: dict[type[nn.Module], str] = {}
        self.pools: dict[torch.device, Pool | None] = {}
        self.is_passing = False  # whether pieces run as they are
        self.lacked_room = False
        self._pool_of = pool_of or cuda_pool
        self._together: dict[Any, Together] = {}  # of each piece that has been looked at before
        self._has_changed = False  # a module, since it was settled which are looked at together
        self._is_within = False  # a forward of the model
        self._looked: set[Together] = set()  # at, in this forward
        self._served: dict[Any, None] = {}  # recordings that were replayed in this forward, or in the last, in order
        self._prepared: set[Any] = set()  # recordings, in this forward
        self._releases = 0
        self._replays = 0  # since the last release

    def pool(self, device: torch.device) -> Pool | None:
        """Of a device; None if nothing is recorded there."""
        if device not in self.pools:
            self.pools[device] = self._pool_of(device)
        return self.pools[device]

    def __getstate__(self) -> dict[str, Any]:
        """Recordings belong to one model in one process."""
        new: dict[str, Any] = {"pools": {}, "keepers": {}, "_together": {}, "_served": {}}
        return vars(self) | new | {"_looked": set(), "_prepared": set(), "_is_within": False}

    def begin(self, tokens: int) -> None:
        """A forward of the model begins, in which no module changes.

        What recordings read of parameters alone is computed now: until the first layer is called, the device waits.
        Without gradients nothing is replayed, and adapters may be off for as long: a reference is not looked at.

        Args:
            tokens: of the batch.
        """
        self._is_within = True
        self._looked.clear()
        self._prepared.clear()
        if not torch.is_grad_enabled():
            return
        served, self._served = self._served, {}
        for recording in served:
            if recording.tokens == tokens and not recording.is_pending:
                self._prepare(recording)
        if self._has_changed:
            self._has_changed = False
            self._together = dict(together([piece for piece in self.pieces if piece.is_same()]))

    def end(self) -> None:
        """It has ended."""
        self._is_within = False

    def has_looked(self, piece: Any) -> bool:
        """Whether a piece knows if its module has changed: in a forward, several are looked at together.

        Args:
            piece: that is called.
        """
        group = self._together.get(piece) if self._is_within else None
        if group is not None and group not in self._looked:
            self._looked.add(group)
            group.look()
        return group is not None

    def note_change(self) -> None:
        """The module of a piece has changed, or is watched for the first time."""
        self._has_changed = True

    @contextmanager
    def recording(self, context: Any) -> Iterator[Any]:
        """Around a forward that is recorded: see `Host.recording`."""
        with self.passing(), self.host.recording(context) as caught:
            yield caught

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around what pieces lie in that run as they are."""
        was, self.is_passing = self.is_passing, True
        try:
            yield
        finally:
            self.is_passing = was

    def release(self) -> None:
        """Give the memory of all recordings back: it is wanted for something else."""
        if self._replays < _PAYS * sum(piece.recordings for piece in self.pieces):
            self._releases += 1
        self._replays = 0
        for piece in self.pieces:
            piece.forget()
        self.pools.clear()

    def begin_replay(self, recording: Any) -> None:
        """A recording serves once more.

        Args:
            recording: a `Recording`, which is prepared where it has not been in this forward.
        """
        self._replays += 1
        self._served[recording] = None
        if not self._is_within or recording not in self._prepared or not recording.is_prepared():
            self._prepare(recording)

    def drop(self, recordings: Iterable[Any]) -> None:
        """Recordings serve no more, and their memory may be wanted."""
        for recording in recordings:
            self._served.pop(recording, None)
            self._prepared.discard(recording)

    def _prepare(self, recording: Any) -> None:
        recording.prepare()
        self._prepared.add(recording)

    def make_way(self, piece: Any) -> None:
        """Give memory back if a step that recordings do not serve may want it: looked at once a step.

        Args:
            piece: whose call they do not serve.
        """
        if piece is not next(iter(self.keepers), None):
            return
        pools = [(device, pool) for device, pool in self.pools.items() if pool is not None]
        if any(pool.is_short(self.host.rest(device)) for device, pool in pools):
            self.release()

    @property
    def is_on(self) -> bool:
        """Whether it still pays to record."""
        return self._releases < _MOST_RELEASES


class Together:
    """Pieces whose modules are looked at together, which takes half the time of looking at each.

    Args:
        pieces: as they are.
    """

    def __init__(self, pieces: Sequence[Any]) -> None:
        self._pieces = pieces
        self._watch = Watch(*(piece.module for piece in pieces))

    def look(self) -> None:
        """Let those that have changed forget what they knew."""
        if not self._watch.is_same():
            for piece in self._pieces:
                piece.is_same()


def together(pieces: Sequence[Any]) -> Iterator[tuple[Any, Together]]:
    """Of each piece those that it is looked at with: one, two, four, … in the order in which they run.

    So the device has the first layers' work while the CPU looks at the others.
    """
    start, size = 0, 1
    while start < len(pieces):
        group = Together(pieces[start : start + size])
        yield from ((piece, group) for piece in pieces[start : start + size])
        start, size = start + size, 2 * size


def cuda_pool(device: torch.device) -> Pool | None:
    """A pool for CUDA graphs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return Pool(CudaCapture(device), meter_of(device))
