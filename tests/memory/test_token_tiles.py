"""The walk in tiles of tokens: gradients as defined, and bytes that grow with the tile and not with the batch."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertune import accumulate
from expertune.backends import native_torch
from expertune.backends.protocol import Backend
from expertune.experts import experts
from expertune.memory import token_tiles
from expertune.memory.token_tiles import TokenTiles
from expertune.shapes import ExpertsLayout
from expertune.walk import ExpertsStep
from tests.cases import DEVICE, NUM_EXPERTS, pair_id, runnable
from tests.kept import kept_for_backward
from tests.numerics import assert_no_worse
from tests.test_experts import D_, F_, KINDS, SMOOTH_KINDS, Inputs, Kind, cast, define, make_inputs, outputs_and_grads

TILES = TokenTiles(least_tokens=16, least_rows=0)


def _routing(num_tokens: int, top_k: int = 2, experts: int = NUM_EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, experts, generator=generator).topk(top_k, dim=-1).indices


ROUTINGS = {
    "three tiles, the last one short": _routing(61),
    "tiles with empty experts": torch.cat([_routing(24, experts=3), _routing(27) % 2 + torch.tensor([2, 4])]),
    "top-1, all of a tile on one": torch.cat([torch.full((24, 1), 5), _routing(26, 1)]),
}


def _step(kind: Kind, backend: Backend = native_torch.BACKEND) -> ExpertsStep:
    layout = ExpertsLayout(
        num_experts=NUM_EXPERTS,
        model_width=D_,
        expert_width=F_,
        has_gate=kind.has_gate,
        is_transposed=kind.is_transposed,
        has_bias=kind.has_bias,
    )
    return ExpertsStep(layout=layout, gate=kind.gate, backend=backend)


def _walk(inputs: Inputs, kind: Kind, backend: Backend = native_torch.BACKEND, **keywords: Any) -> Tensor:
    step = _step(kind, backend)
    routings = TILES.dispatch(inputs.expert_TK, step)
    assert len(routings) > 1
    return token_tiles.experts(inputs.x, routings, inputs.weight, inputs.projections, step, **keywords)


def _whole(inputs: Inputs, kind: Kind) -> Tensor:
    step = _step(kind)
    return experts(inputs.x, step.dispatch(inputs.expert_TK), inputs.weight, inputs.projections, step)


@pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float64_agrees_with_the_definition_and_the_whole_walk(kind: Kind, expert_TK: Tensor) -> None:
    inputs = make_inputs(kind, expert_TK)
    ours = outputs_and_grads(_walk(inputs, kind), inputs)
    for truth in (define, _whole):
        for name, expected in outputs_and_grads(truth(inputs, kind), inputs).items():
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-13 * scale, msg=name)


@pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("kind", SMOOTH_KINDS.values(), ids=SMOOTH_KINDS)
@pytest.mark.parametrize(("backend", "dtype"), runnable(torch.float32, torch.bfloat16, torch.float16), ids=pair_id)
def test_no_worse_than_plain_torch(backend: Backend, dtype: torch.dtype, kind: Kind, expert_TK: Tensor) -> None:
    inputs = make_inputs(kind, expert_TK, dtype)
    exact = cast(inputs, torch.float64)
    truth = outputs_and_grads(define(exact, kind), exact)
    plain = outputs_and_grads(define(inputs, kind), inputs)
    first, second = (outputs_and_grads(_walk(inputs, kind, backend), inputs) for _ in range(2))
    for name, expected in truth.items():
        assert first[name].dtype == dtype
        assert torch.equal(first[name], second[name]), f"{name}: two runs differ"
        assert_no_worse(first[name], plain[name], expected, name)


@pytest.mark.parametrize("ranks", [(), (4, 9)], ids=str)
def test_several_adapters_and_none(ranks: tuple[int, ...]) -> None:
    kind = KINDS["concatenated transposed bias"]
    inputs = make_inputs(kind, ROUTINGS["tiles with empty experts"], ranks=ranks)
    truth = outputs_and_grads(define(inputs, kind), inputs)
    ours = outputs_and_grads(_walk(inputs, kind), inputs)
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", ["x", "router", "w1", "b2", "A1.0", "B2.0"])
def test_each_gradient_is_the_same_when_it_alone_is_wanted(trained: str) -> None:
    kind = KINDS["interleaved transposed bias, clamped"]
    inputs = make_inputs(kind, ROUTINGS["three tiles, the last one short"])
    truth = outputs_and_grads(define(inputs, kind), inputs)[f"d{trained}"]
    for name, leaf in inputs.leaves().items():
        leaf.requires_grad_(name == trained)
    out = _walk(inputs, kind)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
    out.backward(dout)
    grads = {name: leaf.grad for name, leaf in inputs.leaves().items() if leaf.grad is not None}
    assert grads.keys() == {trained}
    torch.testing.assert_close(grads[trained], truth, rtol=1e-12, atol=1e-12)


def test_left_out_it_is_zero_walks_nothing_in_forward_and_has_the_same_gradients() -> None:
    kind = KINDS["concatenated"]
    inputs = make_inputs(kind, ROUTINGS["three tiles, the last one short"])
    ran: list[str] = []

    def run(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        ran.append(function.__name__)
        return native_torch.STEPS.run(function, *args, **keywords)

    class _Spy:
        def __getattr__(self, name: str) -> Any:
            return run if name == "run" else getattr(native_torch.STEPS, name)

    spy = replace(native_torch.BACKEND, name="spy", steps=_Spy)
    truth = outputs_and_grads(_walk(inputs, kind), inputs)
    out = _walk(inputs, kind, spy, leaves_out=True)
    assert not out.any()
    assert not ran
    ours = outputs_and_grads(out, inputs)
    assert ran == ["_forward", "_backward"] * 3
    assert all(torch.equal(ours[name], truth[name]) for name in truth if name != "out")


def test_sums_of_factors_are_wider_than_factors() -> None:
    """Tiles that cancel: in bfloat16 alone `256 + 1 - 256` is nothing."""
    total: Tensor | None = None
    for value in (256.0, 1.0, -256.0):
        total = accumulate.plus(total, torch.tensor([value], dtype=torch.bfloat16))
    assert total is not None
    assert total.item() == 1


@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("num_experts", [16, 128, 256])
@pytest.mark.parametrize("num_tokens", [0, 1, 8192, 16383, 16384, 24575, 24577, 131072, 131073, 524288])
def test_tiles_are_long_even_and_aligned(num_tokens: int, num_experts: int, top_k: int) -> None:
    layout = ExpertsLayout(
        num_experts=num_experts, model_width=1, expert_width=1, has_gate=True, is_transposed=False, has_bias=False
    )
    tiles = TokenTiles()
    length = tiles.length(num_tokens, top_k, layout)
    least = max(8192, 512 * num_experts // top_k)
    assert tiles.cuts(torch.empty(num_tokens, top_k, device="meta"), layout) is (num_tokens >= 2 * least)
    if num_tokens < 2 * least:
        assert length == num_tokens
    else:
        assert length % 8 == 0
        assert least <= length < 1.5 * least + 8
        assert -(-num_tokens // length) == num_tokens // least


class _Alive(TorchDispatchMode):
    """The bytes of the tensors that are made and still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in self._known | given:
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def _peak(walk: Callable[[Inputs, Kind], Tensor], num_tokens: int) -> int:
    """The most bytes alive in forward and backward, beside what was there before: inputs, and the output's gradient."""
    kind = KINDS["concatenated"]
    inputs = make_inputs(kind, _routing(num_tokens), torch.float32)
    for leaf in (inputs.projections[0].weight, inputs.projections[1].weight):
        leaf.requires_grad_(False)
    wanted = [leaf for leaf in inputs.leaves().values() if leaf.requires_grad]
    dout_TD = torch.ones_like(inputs.x)
    with _Alive() as alive:
        out_TD = walk(inputs, kind)
        torch.autograd.grad(out_TD, wanted, dout_TD)
    return alive.most


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what is made on the CPU, where backward runs in this thread")
def test_the_peak_grows_by_what_goes_in_and_out_and_no_more() -> None:
    """A token adds its output, its gradient, the router's and its choice: nothing that is as wide as the experts."""
    top_k, wide = 2, 4
    in_and_out = 2 * D_ * wide + top_k * (wide + 12)
    short, long = _peak(_walk, 64), _peak(_walk, 64 * 8)
    tiles = 64 * 8 // 16 - 64 // 16
    ends = 4 * NUM_EXPERTS + 16  # of a tile, rounded up to where vector loads may start
    assert (long - short) <= (64 * 8 - 64) * in_and_out + tiles * ends
    whole = (_peak(_whole, 64 * 8) - _peak(_whole, 64)) / (64 * 8 - 64)
    assert whole > 4 * in_and_out, "the whole walk keeps rows, so the test can fail"


def test_saved_bytes_are_the_formula() -> None:
    kind = KINDS["concatenated"]
    inputs = make_inputs(kind, _routing(64), torch.float32)
    parameters = [leaf for name, leaf in inputs.leaves().items() if name not in ("x", "router")]
    with kept_for_backward(parameters) as saved:
        out_TD = _walk(inputs, kind)
    assert out_TD.requires_grad
    assert sum(saved.values()) == 64 * (4 * D_ + 2 * 16) + 4 * 4 * NUM_EXPERTS
