"""Routing replay: the second run of a checkpointed layer chooses as the first, whatever its numbers say."""

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertune.memory.replay import RoutingReplay
from tests.memory.checkpoints import CHECKPOINTS, checkpoint_layer


class _Layer(nn.Module):
    """Routes by `topk` of scores that drift from run to run, as rounding does at near ties."""

    def __init__(self, replay: RoutingReplay, drift: float = 100.0) -> None:
        super().__init__()
        self.drift = drift
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.replay = replay
        self.chosen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        drift = torch.zeros(6, dtype=torch.float64)
        drift[len(self.chosen)] = self.drift  # the run's own number decides the choice
        self.replay.enter_block()
        values, index = torch.topk(x @ self.weight + drift, 2, dim=-1)
        self.replay.leave_block()
        self.chosen.append(index)
        return x * values.sum(-1, keepdim=True)


@pytest.mark.parametrize("host_checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_recompute_routes_as_forward_did(host_checkpoint: Any) -> None:
    torch.manual_seed(0)
    replay = RoutingReplay()
    layer = _Layer(replay)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    replay.wrap(host_checkpoint)(layer.forward, x).sum().backward()
    first, second = layer.chosen
    assert torch.equal(first, second)
    # without replay the second run chooses otherwise, so the test can fail
    layer.chosen = []
    host_checkpoint(layer.forward, x).sum().backward()
    assert not torch.equal(*layer.chosen)


@pytest.mark.parametrize("host_checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_gradients_are_those_without_checkpointing(host_checkpoint: Any) -> None:
    torch.manual_seed(0)
    replay = RoutingReplay()
    layer = _Layer(replay, drift=0.0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone(), layer.weight.grad.clone()  # type: ignore[union-attr]
    layer.chosen, x.grad, layer.weight.grad = [], None, None
    replay.wrap(host_checkpoint)(layer.forward, x).sum().backward()
    torch.testing.assert_close((x.grad, layer.weight.grad), expected)


def test_a_block_that_raises_leaves_nothing_behind() -> None:
    replay = RoutingReplay()

    def broken(x: Tensor) -> Tensor:
        replay.enter_block()
        try:
            raise RuntimeError("inside")
        finally:
            replay.leave_block()

    with pytest.raises(RuntimeError, match="inside"):
        replay.wrap(CHECKPOINTS["non-reentrant"])(broken, torch.ones(2, requires_grad=True))
    assert not replay._tapes
    assert not replay._modes


@pytest.mark.parametrize("number", [1, 2], ids=["the first run", "the second run"])
@pytest.mark.parametrize("host_checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_block_that_ctrl_c_ends_leaves_nothing_behind(host_checkpoint: Any, number: int) -> None:
    """torch calls the hook behind a module after errors, but not after Ctrl-C."""
    replay, runs = RoutingReplay(), []

    def stopped(x: Tensor) -> Tensor:
        replay.enter_block()
        runs.append(x)
        values = x.topk(1).values
        if len(runs) == number:
            raise KeyboardInterrupt
        replay.leave_block()
        return x * values

    with pytest.raises(KeyboardInterrupt):
        replay.wrap(host_checkpoint)(stopped, torch.ones(2, requires_grad=True)).sum().backward()
    assert not replay._tapes
    assert not replay._modes
    assert not torch._C._len_torch_function_stack()


class TestCheckpointLayer:
    """Which of torch's two ways a layer takes shows in whether its first run builds a graph."""

    def _ran_with_grad(self, *args: Tensor, **keywords: Tensor) -> bool:
        modes = []

        def layer(x: Tensor, **kw: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return x * 2 + sum(kw.values())  # type: ignore[no-any-return]

        out = checkpoint_layer(partial(layer, **keywords), *args)
        if out.requires_grad:
            out.sum().backward()
        return modes[0]

    def test_takes_the_cheap_way_where_it_is_right(self) -> None:
        assert not self._ran_with_grad(torch.ones(2, requires_grad=True), bias=torch.ones(2))

    def test_a_keyword_with_gradient_takes_the_other(self) -> None:
        bias = torch.ones(2, requires_grad=True)
        assert self._ran_with_grad(torch.ones(2, requires_grad=True), bias=bias)
        torch.testing.assert_close(bias.grad, torch.ones(2))

    def test_so_does_an_object_that_holds_one(self) -> None:
        values = SimpleNamespace(layers=[SimpleNamespace(keys=torch.ones(2, requires_grad=True))])
        modes = []

        def layer(x: Tensor, cache: Any) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return x * cache.layers[0].keys

        checkpoint_layer(layer, torch.ones(2, requires_grad=True), cache=values).sum().backward()
        assert modes[0]
        torch.testing.assert_close(values.layers[0].keys.grad, torch.ones(2))

    def test_an_input_without_gradient_takes_the_other(self) -> None:
        assert self._ran_with_grad(torch.ones(2), bias=torch.ones(2))


class _Looks(torch.autograd.Function):
    """Does nothing, and notes in backward what is left of an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: list[Any], left: list[Any]) -> Tensor:
        ctx.outputs, ctx.left = outputs, left
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        ctx.left += [ref() for ref in ctx.outputs]
        return dout, None, None


@pytest.mark.parametrize("asks", [False, True], ids=["backward", "grad"])
def test_what_comes_out_of_the_second_run_is_not_held_while_it_is_differentiated(asks: bool) -> None:
    outputs: list[Any] = []
    left: list[Any] = []

    def layer(x: Tensor) -> Tensor:
        out = _Looks.apply(x, outputs, left) + x  # type: ignore[no-untyped-call]
        outputs.append(weakref.ref(out))
        return out  # type: ignore[no-any-return]

    x = torch.ones(2, requires_grad=True)
    out = CHECKPOINTS["ours"](layer, x).sum()
    (grad,) = torch.autograd.grad(out, x) if asks else (out.backward(), x.grad)[1:]
    torch.testing.assert_close(grad, torch.full((2,), 2.0))
    assert len(left) == 2
    assert left[1] is None


def test_what_was_made_of_the_choice_is_kept_for_the_second_run() -> None:
    replay = RoutingReplay()
    made: list[int] = []

    def layer(x: Tensor, chooses: bool) -> Tensor:
        replay.enter_block()
        if chooses:
            torch.topk(x, 1)
        replay.leave_block()
        tape = replay.tape
        assert tape is not None
        # twice a run, as a host that walks its tokens in two halves
        firsts = [tape.once(lambda: made.append(len(made)) or len(made)) for _ in range(2)]
        assert not chooses or firsts == [1, 2]
        return x * 2

    for chooses, expected in ((True, 2), (False, 4)):
        made.clear()
        x = torch.ones(2, 3, requires_grad=True)
        replay.wrap(CHECKPOINTS["ours"])(layer, x, chooses).sum().backward()
        assert len(made) == expected
