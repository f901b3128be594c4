"""A piece gives what its module gives, value and gradients, however calls come; and records when it should."""

import copy
import gc
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertune.graphs import recording
from expertune.graphs.piece import Piece
from expertune.graphs.recorder import together
from tests.graphs.replayed import FakeCapture, Toy, Waits, assert_same, gradients, inputs, make_recorder, toys


def test_the_third_call_of_a_kind_is_recorded_and_all_are_right(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    for seed in range(6):
        assert_same(*pair, seed)
        assert capture.recorded == ([True, False] if seed >= 2 else [])
        assert capture.replays == max(0, 2 * (seed - 1))


def test_gradients_leave_by_themselves_or_side_by_side(
    capture: FakeCapture, pair: tuple[Toy, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight's is large here, a bias's small."""
    monkeypatch.setattr(recording, "_LARGE", 64)
    for seed in range(5):
        assert_same(*pair, seed)
    assert capture.replays == 6


class TwoTypes(Toy):
    """Gives out two tensors of different dtypes, as layers with a router in float32 do."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], **_: object) -> tuple[Tensor, Tensor]:
        out, _nothing = super().forward(x, pair)
        return out.bfloat16(), out


def test_outputs_of_two_types(capture: FakeCapture) -> None:
    toy, stock = TwoTypes(), TwoTypes()
    stock.load_state_dict(toy.state_dict())
    toy.forward = Piece(toy, make_recorder(capture))  # type: ignore[method-assign]
    for seed in range(5):
        results = []
        for module in (toy, stock):
            module.zero_grad()
            x, others = inputs(seed)
            narrow, wide = module(x, others)
            assert narrow.dtype == torch.bfloat16
            (narrow.float().sum() + wide.square().sum()).backward()
            results.append(gradients(module, x))
        torch.testing.assert_close(*results)
    assert capture.replays == 6


def test_what_was_given_out_does_not_change(pair: tuple[Toy, Toy]) -> None:
    toy, _ = pair
    for seed in range(3):
        toy.zero_grad()
        x, others = inputs(seed)
        out, _ = toy(x, others)
        out.sum().backward()
    kept = [out, x.grad, toy.linear.weight.grad]
    values = [each.clone() for each in kept]
    toy.zero_grad()
    y, others = inputs(7)
    toy(y, others)[0].sum().backward()
    torch.testing.assert_close(kept, values, rtol=0, atol=0)


def test_gradients_of_several_passes_add_up(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    for module in pair:
        for seed in range(6):
            x, others = inputs(seed)
            module(x, others)[0].square().sum().backward()
    assert capture.replays == 8
    torch.testing.assert_close(*[[p.grad for p in module.parameters()] for module in pair])


def test_two_forwards_before_a_backward(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    toy, stock = pair
    for seed in range(3):
        assert_same(toy, stock, seed)
    before = capture.replays
    for module in pair:
        module.zero_grad()
        (x, a), (y, b) = inputs(11), inputs(12)
        (module(x, a)[0] * module(y, b)[0]).sum().backward()
    assert capture.replays == before + 2  # the second ran as it is
    torch.testing.assert_close(*[[p.grad for p in module.parameters()] for module in pair])


def test_a_forward_without_backward_leaves_no_trace(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    for seed in range(3):
        assert_same(*pair, seed)
    x, others = inputs(5)
    pair[0](x, others)
    before = capture.replays
    assert_same(*pair, 6)
    assert capture.replays == before + 2


def test_backward_twice_with_retain_graph(pair: tuple[Toy, Toy]) -> None:
    for module in pair:
        for seed in range(4):
            module.zero_grad()
            x, others = inputs(seed)
            out = module(x, others)[0].square().sum()
            out.backward(retain_graph=True)
            out.backward()
    torch.testing.assert_close(*[[p.grad for p in module.parameters()] for module in pair])


def test_a_backward_that_comes_too_late_is_refused(pair: tuple[Toy, Toy]) -> None:
    toy, stock = pair
    for seed in range(3):
        assert_same(toy, stock, seed)
    x, others = inputs(5)
    out = toy(x, others)[0].sum()
    out.backward()
    with pytest.raises(RuntimeError, match=r"a second time, without retain_graph=True .* graphs=False"):
        out.backward()


def assert_stacks_are_same(layers: list[Toy], stock: list[Toy], x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """One step through all layers of both, each layer with its pair."""
    results = []
    for stack in (layers, stock):
        hidden = x
        for layer, pair in zip(stack, pairs, strict=True):
            layer.zero_grad()
            hidden = layer(hidden, pair)[0]
        hidden.square().sum().backward()
        results.append([p.grad for layer in stack for p in layer.parameters()])
    torch.testing.assert_close(*results)


def test_layers_share_what_all_get(capture: FakeCapture) -> None:
    recorder = make_recorder(capture)
    layers, stock = toys(recorder, 3)
    for seed in range(5):
        x, others = inputs(seed)
        assert_stacks_are_same(layers, stock, x, [others] * 3)
    (pool,) = recorder.pools.values()
    assert pool is not None
    assert len(pool._shared[False]) == 2
    assert capture.replays == 3 * 3 * 2


def test_what_layers_shared_goes_with_their_recordings(capture: FakeCapture) -> None:
    recorder = make_recorder(capture)
    layers, stock = toys(recorder, 2)
    for seed in range(12):
        if seed % 4 == 0:
            for layer in (*layers, *stock):
                layer.linear.bias.requires_grad_(seed % 8 == 0)
        x, others = inputs(seed)
        assert_stacks_are_same(layers, stock, x, [others] * 2)
    assert len(capture.recorded) > 2 * 2
    (pool,) = recorder.pools.values()
    assert pool is not None
    gc.collect()
    assert len(pool._shared[False]) == 2


def test_layers_that_no_longer_share_are_right_too(capture: FakeCapture) -> None:
    """Recorded with one pair for both layers, then called with one each: the second must not read the first's."""
    layers, stock = toys(make_recorder(capture), 2)
    for seed in range(5):
        x, first = inputs(seed)
        second = first if seed < 3 else inputs(seed + 50)[1]
        assert_stacks_are_same(layers, stock, x, [first, second])


def test_an_input_written_to_in_place_is_read_anew(pair: tuple[Toy, Toy]) -> None:
    _, others = inputs(0)
    for seed in range(5):
        with torch.no_grad():
            others[0].fill_(seed)
        results = []
        for module in pair:
            module.zero_grad()
            x, _ = inputs(seed)
            out = module(x, others)[0]
            out.sum().backward()
            results.append([out, *gradients(module, x)])
        torch.testing.assert_close(*results)


def change_scale(toy: Toy) -> None:
    toy.scale = 3.0


def replace_weight(toy: Toy) -> None:
    toy.linear.weight = nn.Parameter(torch.ones(4, 4))


def freeze(toy: Toy) -> None:
    toy.linear.bias.requires_grad_(False)


def move(toy: Toy) -> None:
    toy.linear.weight.data = toy.linear.weight.data * 2


def replace_linear(toy: Toy) -> None:
    toy.linear = nn.Linear(4, 4).requires_grad_(False)
    nn.init.ones_(toy.linear.weight)
    nn.init.zeros_(toy.linear.bias)


@pytest.mark.parametrize("change", [change_scale, replace_weight, freeze, move, replace_linear])
def test_a_module_that_changed_is_recorded_anew(capture: FakeCapture, pair: tuple[Toy, Toy], change: Any) -> None:
    for seed in range(3):
        assert_same(*pair, seed)
    for module in pair:
        change(module)
    for seed in range(3, 7):
        assert_same(*pair, seed)
    assert len(capture.recorded) == 4


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("change", [change_scale, replace_weight, freeze, move, replace_linear])
def test_of_several_that_are_looked_at_together_the_one_that_changed_is_recorded_anew(
    capture: FakeCapture, change: Any, number: int
) -> None:
    recorder = make_recorder(capture)
    pairs = list(zip(*toys(recorder, 4), strict=True))
    for seed in range(7):
        if seed == 4:
            for module in pairs[number]:
                change(module)
        recorder.begin(5)
        for toy, stock in pairs:
            assert_same(toy, stock, seed)
        recorder.end()
    assert len(capture.recorded) == 2 * 5
    for module in pairs[number - 1]:  # and by itself, outside of a forward of the model
        change(module)
    assert_same(*pairs[number - 1], seed=7)


def test_the_first_are_looked_at_before_the_many(capture: FakeCapture) -> None:
    recorder = make_recorder(capture)
    toys(recorder, 9)
    groups = [group for _, group in together(recorder.pieces)]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [1, 2, 4, 2]


def test_what_is_not_recorded(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    toy, _ = pair
    x, others = inputs(0)
    for _ in range(5):
        with torch.no_grad():
            toy(x, others)
        checkpoint(toy, x, others, use_reentrant=False)[0].sum().backward()
        toy(x, others, cache=[object()])[0].sum().backward()
        with torch.inference_mode():
            toy(x, others)
    for length in range(6, 12):
        toy(*inputs(0, length))[0].sum().backward()
    assert capture.recorded == []
    hooked = toy.linear.register_forward_hook(lambda *_: None)
    for _ in range(5):
        toy(x, others)[0].sum().backward()
    assert capture.recorded == []
    hooked.remove()
    for unread in range(5):
        toy(x, others, unread=unread)[0].sum().backward()
    assert capture.recorded == [True, False]


class Writer(Toy):
    """Leaves something in a list that it gets."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], notes: list[Any]) -> Tensor:  # type: ignore[override]
        notes.append(x * 2)
        return super().forward(x, pair)[0]


def test_a_module_that_changes_its_arguments_is_not_recorded(capture: FakeCapture) -> None:
    recorder = make_recorder(capture)
    writer = Writer()
    writer.forward = Piece(writer, recorder)  # type: ignore[method-assign]
    for seed in range(5):
        notes: list[Any] = []
        writer(*inputs(seed), notes).sum().backward()
        assert len(notes) == 1
    assert recorder.refused == {Writer: "it changes its arguments"}


class Named(NamedTuple):
    x: Tensor
    y: Tensor


class Namer(Toy):
    """Returns a tuple of a type of its own."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Named:  # type: ignore[override]
        return Named(super().forward(x, pair)[0], x * 2)


def test_a_result_of_a_type_of_its_own_stays_one(capture: FakeCapture) -> None:
    recorder = make_recorder(capture)
    namer = Namer()
    namer.forward = Piece(namer, recorder)  # type: ignore[method-assign]
    for seed in range(5):
        out = namer(*inputs(seed))
        assert type(out) is Named
        (out.x.sum() + out.y.sum()).backward()
    assert recorder.refused == {Namer: "it takes or returns a Named"}
    assert not capture.replays


def test_an_argument_of_a_type_of_its_own_is_read_by_the_module(capture: FakeCapture, pair: tuple[Toy, Toy]) -> None:
    toy, _ = pair
    x, others = inputs(0)
    for _ in range(5):
        toy(x, Named(*others))[0].sum().backward()
    assert not capture.recorded


def test_dropout_that_is_turned_on_ends_a_recording(pair: tuple[Toy, Toy], capture: FakeCapture) -> None:
    for toy in pair:
        toy.linear = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Dropout(0.0))  # type: ignore[assignment]
    pair[1].load_state_dict(pair[0].state_dict())
    for seed in range(4):
        assert_same(*pair, seed)
    assert capture.replays == 2 * 2
    for toy in pair:
        toy.linear[1].p = 1.0
    assert_same(*pair, 4)
    assert capture.replays == 2 * 2


def test_a_module_that_cannot_be_recorded_runs_as_it_is(pair: tuple[Toy, Toy], capture: FakeCapture) -> None:
    capture.refuses = "operation not permitted when stream is capturing\nmore"
    for seed in range(5):
        assert_same(*pair, seed)
    toy, _ = pair
    recorder = toy.forward._recorder  # type: ignore[attr-defined]
    assert recorder.refused == {Toy: "operation not permitted when stream is capturing"}
    assert capture.replays == 0


class Waiter(Toy):
    """Waits."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], **_: object) -> tuple[Tensor, None]:
        return Waits.apply(super().forward(x, pair)[0], self.where), None  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_module_that_waits_is_not_recorded(capture: FakeCapture, where: str) -> None:
    recorder, toy, stock = make_recorder(capture), Waiter(where), Waiter(where)
    stock.load_state_dict(toy.state_dict())
    toy.forward = Piece(toy, recorder)  # type: ignore[method-assign]
    for seed in range(5):
        assert_same(toy, stock, seed)
    assert recorder.refused == {Waiter: "it waits for the device"}
    assert not capture.recorded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_records_for_itself(pair: tuple[Toy, Toy], copied: Any) -> None:
    toy, _ = pair
    for _ in range(4):
        toy(*inputs(0))[0].sum().backward()
    twin = copied(toy)
    assert twin.forward.module is twin
    assert twin.forward.recordings == 0
    with torch.no_grad():
        twin.linear.weight.zero_()
    assert not torch.equal(twin(*inputs(0))[0], toy(*inputs(0))[0])


def test_parameters_that_are_stepped_before_backward_are_refused_as_by_torch(pair: tuple[Toy, Toy]) -> None:
    """Gradients would be of neither what they were nor what they are."""
    toy, stock = pair
    for seed in range(5):
        assert_same(toy, stock, seed)
    of_graphs = "modified by an inplace operation since the forward that is differentiated"  # which ask nobody else
    for module, words in ((toy, of_graphs), (stock, "modified by an inplace operation")):
        out, _ = module(*inputs(9))
        with torch.no_grad():
            module.linear.weight.add_(1)
        with pytest.raises(RuntimeError, match=words):
            out.sum().backward()
    assert_same(toy, stock, 10)
