"""Recording without a GPU: work that was recorded is run again."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.graphs.piece import Piece
from expertune.graphs.pool import Pool
from expertune.graphs.recorder import Recorder


@dataclass
class Rerun:
    """A graph that runs its work again, and counts."""

    work: Callable[[], None]
    count: Callable[[], None]

    def replay(self) -> None:
        self.count()
        self.work()


class _RefusingWaits(TorchDispatchMode):
    """As torch's own check of a device would, for what it would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("it waits for the device")
        return func(*args, **(kwargs or {}))


@dataclass
class FakeCapture:
    """Records nothing; may refuse."""

    replays: int = 0  # of forwards and backwards
    preparations: int = 0
    refuses: str | None = None
    recorded: list[bool] = field(default_factory=list)
    rooms: list[int] = field(default_factory=list)  # how much had been recorded when room was made

    def pool(self, _device: torch.device) -> Pool:
        return Pool(self)

    def refusing_waits(self) -> AbstractContextManager[Any]:
        return _RefusingWaits()

    def record(self, work: Callable[[], None], *, keeps: bool) -> Rerun:
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        self.recorded.append(keeps)
        work()  # as while a stream captures
        return Rerun(work, self._count_replay)

    def record_alone(self, work: Callable[[], None]) -> Rerun:
        work()
        return Rerun(work, self._count_preparation)

    def _count_replay(self) -> None:
        self.replays += 1

    def _count_preparation(self) -> None:
        self.preparations += 1

    def make_room(self) -> None:
        self.rooms.append(len(self.recorded))

    def lend(self, x: Tensor) -> Tensor:
        """Work that is run again makes it anew."""
        assert x.is_contiguous(), "read by its address alone, it would be another tensor"
        return x


def make_recorder(capture: FakeCapture) -> Recorder:
    """One that records on any device."""
    return Recorder(FakeHost(), capture.pool)


class FakeHost:
    """Listens to what `listen`, as a hook, hears of a submodule."""

    ignored = frozenset({"unread"})

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def is_checkpointed(self) -> bool:
        return False

    def rest(self, _device: torch.device) -> int:
        return 0

    def context(self, _module: nn.Module, _kwargs: dict[str, Any]) -> str:
        return ""

    def is_observer(self, hook: Callable[..., Any]) -> bool:
        return hook == self.listen

    def listen(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.heard.append(output)

    @contextmanager
    def recording(self, _context: str) -> Iterator[list[Any]]:
        before, self.heard = self.heard, []
        try:
            yield self.heard
        finally:
            self.heard = before

    def deliver(self, caught: list[Any]) -> None:
        self.heard += caught


class Toy(nn.Module):
    """Takes hidden states and a pair of tensors without gradient, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.scale = 2.0

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], **_: object) -> tuple[Tensor, None]:
        return self.frozen((self.linear(x) * pair[0]).tanh() + pair[1]) * self.scale, None


class Waits(torch.autograd.Function):
    """Doubles, after it has waited for the device: in forward or in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
        ctx.where = where
        return x * 2 * x.new_ones(()).item() if where == "forward" else x * 2

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout * 2 * dout.new_ones(()).item() if ctx.where == "backward" else dout * 2, None


def toys(recorder: Recorder, number: int) -> tuple[list[Toy], list[Toy]]:
    """So many, whose forwards are pieces; and the same as they are without."""
    torch.manual_seed(0)
    recorded = [Toy() for _ in range(number)]
    stock = copy.deepcopy(recorded)
    for toy in recorded:
        toy.forward = Piece(toy, recorder)  # type: ignore[method-assign]
    return recorded, stock


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int, length: int = 5) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = draw(1, length, 4, seed=seed).requires_grad_()
    return x, (draw(1, length, 4, seed=seed + 100), draw(1, length, 4, seed=seed + 200))


def gradients(toy: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(p.grad for p in toy.parameters())]


def assert_same(toy: Toy, stock: Toy, seed: int, length: int = 5) -> None:
    """One step of both on the same input."""
    results = []
    for module in (toy, stock):
        module.zero_grad()
        x, pair = inputs(seed, length)
        out, nothing = module(x, pair)
        assert nothing is None
        out.square().sum().backward()
        results.append([out, *gradients(module, x)])
    torch.testing.assert_close(*results)
