"""The experts' output is left out of a recomputation only where nothing after the experts is saved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.memory.leave_out import LeaveOut
from expertune.memory.replay import RoutingReplay
from tests.memory.checkpoints import checkpoint_layer


class _Experts(torch.autograd.Function):
    """Triples its input, or yields zeros with the same gradient."""

    @staticmethod
    def forward(_ctx: object, x: Tensor, leaves_out: bool) -> Tensor:
        return torch.zeros_like(x) if leaves_out else 3 * x

    @staticmethod
    def backward(_ctx: object, dout: Tensor) -> tuple[Tensor, None]:
        return 3 * dout, None


class _Keeping(torch.autograd.Function):
    """Squares its input, which it keeps on its context without saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return 2 * ctx.x * dout


def _keeping(out: Tensor) -> Tensor:
    kept: Tensor = _Keeping.apply(out)  # type: ignore[no-untyped-call]
    return kept


class _Layer(nn.Module):
    """Dropout, experts, and what comes after them."""

    def __init__(self, replay: RoutingReplay, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.replay = replay
        self.after = after
        self.left_out: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        tape = self.replay.tape
        assert tape is not None
        dropped = F.dropout(x, 0.5)
        self.left_out.append(tape.leave_out.is_on)
        out: Tensor = _Experts.apply(dropped, tape.leave_out.is_on)  # type: ignore[no-untyped-call]
        tape.leave_out.begin(out)
        return x + self.after(out)


def _grad(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("after", "runs"),
    [
        (lambda out: 2 * out.view(3, 2, 2).flatten(1), [[False, True], [False, True]]),
        (lambda out: out.square(), [[False, True, False], [False, False]]),
        (lambda out: (out + 1).tanh(), [[False, True, False], [False, False]]),
        (_keeping, [[False, True, False], [False, False]]),
    ],
    ids=["nothing saved", "the output saved", "what was made of it saved", "the output kept by a custom function"],
)
def test_gradients_and_runs(after: Callable[[Tensor], Tensor], runs: list[list[bool]]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    replay = RoutingReplay()
    layer = _Layer(replay, after)
    wrapped = replay.wrap(checkpoint_layer)

    def plain(x: Tensor) -> Tensor:
        return x + after(3 * F.dropout(x, 0.5))

    for expected in runs:
        layer.left_out = []
        torch.testing.assert_close(_grad(lambda x: wrapped(layer, x), x), _grad(plain, x))
        assert layer.left_out == expected


def test_the_other_checkpoint_leaves_nothing_out() -> None:
    replay = RoutingReplay()
    layer = _Layer(replay, lambda out: out)
    wrapped = replay.wrap(torch.utils.checkpoint.checkpoint)
    x = torch.ones(2, requires_grad=True)
    wrapped(layer, x, use_reentrant=False).sum().backward()
    assert not any(layer.left_out)


def test_a_run_of_its_own_leaves_out_what_was_right_and_says_if_it_no_longer_is() -> None:
    replay, leave_out = RoutingReplay(), LeaveOut()
    layer = _Layer(replay, lambda out: out)
    x = torch.ones(2, requires_grad=True)

    def run() -> list[bool]:
        layer.left_out = []
        with replay.leaving_out(leave_out):
            layer(x)
        return layer.left_out

    assert run() == [False], "nothing is known"
    replay.wrap(checkpoint_layer, leave_out=leave_out)(layer, x).sum().backward()
    assert run() == [True]
    assert not leave_out.is_on
    layer.after = torch.square
    with pytest.raises(RuntimeError, match="reads the experts' output"):
        run()
    assert run() == [False]


def test_a_run_of_its_own_is_in_full_while_somebody_looks_on() -> None:
    is_watched = False
    replay, leave_out = RoutingReplay(), LeaveOut(lambda: is_watched)
    layer = _Layer(replay, lambda out: out)
    x = torch.ones(2, requires_grad=True)
    replay.wrap(checkpoint_layer, leave_out=leave_out)(layer, x).sum().backward()
    is_watched, layer.left_out = True, []
    with replay.leaving_out(leave_out):
        layer(x)
    assert layer.left_out == [False]
