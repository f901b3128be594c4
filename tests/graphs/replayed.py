"""Recording without a GPU: work that was recorded is run again."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expertune.graphs.piece import Piece, Recorder
from expertune.graphs.pool import Pool


@dataclass
class Rerun:
    """A graph that runs its work again, and counts."""

    work: Callable[[], None]
    capture: "FakeCapture"

    def replay(self) -> None:
        self.capture.replays += 1
        self.work()


@dataclass
class FakeCapture:
    """Records nothing; may refuse."""

    replays: int = 0
    refuses: str | None = None
    recorded: list[bool] = field(default_factory=list)

    def record(self, work: Callable[[], None], *, keeps: bool) -> Rerun:
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        self.recorded.append(keeps)
        return Rerun(work, self)


def make_recorder(capture: FakeCapture) -> Recorder:
    """One that records on any device."""
    return Recorder(lambda module, kwargs: "", lambda: False, frozenset({"unread"}), lambda device: Pool(capture))


class Toy(nn.Module):
    """Takes hidden states and a pair of tensors without gradient, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.scale = 2.0

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], **_: object) -> tuple[Tensor, None]:
        return self.frozen((self.linear(x) * pair[0]).tanh() + pair[1]) * self.scale, None


def recorded_toy(capture: FakeCapture) -> Toy:
    """A toy whose forward is a piece."""
    torch.manual_seed(0)
    toy = Toy()
    toy.forward = Piece(toy, make_recorder(capture))  # type: ignore[method-assign]
    return toy
