"""What a recorded forward reads of parameters alone is computed before the layers run: the same, and not too often."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from expertune import prepare
from expertune.activations import SwiGlu
from expertune.gated_mlp import gated_mlp
from expertune.graphs.piece import Piece
from expertune.graphs.recorder import Recorder
from expertune.lora_linears import lora_linears
from expertune.shapes import LoraFactors
from expertune.split_linear import Linear
from tests.conftest import Checkpoint
from tests.graphs.replayed import FakeCapture, draw, make_recorder
from tests.hosts.recorded import both, step, tokens

WIDTH, LENGTH = 8, 5


class Adapted(nn.Module):
    """A linear and a dense MLP in bfloat16, whose factors are in float32."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter((draw(WIDTH, WIDTH, seed=seed + i) / 4).bfloat16(), requires_grad=False) for i in range(4)
        )
        self.factors = nn.ParameterList(
            nn.Parameter(draw(*shape, seed=seed + 9 + i) / 4) for i, shape in enumerate([(2, WIDTH), (WIDTH, 2)] * 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, gate, down = (
            LoraFactors(a=self.factors[i], b=self.factors[i + 1], scale=0.5) for i in range(0, len(self.factors), 2)
        )
        linears = [Linear(self.weights[1], None, gate), Linear(self.weights[2]), Linear(self.weights[3], None, down)]
        x = x + lora_linears(x, [Linear(self.weights[0], None, first)])[0]
        return x + gated_mlp(x, SwiGlu(), (linears[0], linears[1], linears[2]))


@pytest.fixture
def recorder(capture: FakeCapture) -> Recorder:
    return make_recorder(capture)


@pytest.fixture
def stacks(recorder: Recorder) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Layers whose forwards are pieces; and the same as they are without."""
    recorded = nn.ModuleList(Adapted(100 * i) for i in range(2))
    stock = copy.deepcopy(recorded)
    for layer in recorded:
        layer.forward = Piece(layer, recorder)
    return recorded, stock


def _run(layers: nn.ModuleList, seed: int, length: int = LENGTH) -> Tensor:
    x = draw(1, length, WIDTH, seed=seed).bfloat16().requires_grad_()
    for layer in layers:
        x = layer(x)
    return x


def _assert_same_step(stacks: tuple[nn.ModuleList, nn.ModuleList], seed: int, length: int = LENGTH) -> None:
    """Outputs and gradients; then parameters change, as an optimizer changes them."""
    results = []
    for layers in stacks:
        layers.zero_grad()
        out = _run(layers, seed, length)
        out.float().square().sum().backward()
        trained = [p for p in layers.parameters() if p.requires_grad]
        results.append([out, *(p.grad for p in trained)])
        with torch.no_grad():
            for p in trained:
                p *= 0.9
    assert all(map(torch.equal, *results))


def test_in_a_forward_of_the_model_all_are_prepared_before_the_first_layer(
    recorder: Recorder, capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    for seed in range(6):
        before = capture.preparations
        recorder.begin(LENGTH)
        begun = capture.preparations - before
        _assert_same_step(stacks, seed)
        recorder.end()
        assert begun == (2 if seed > 2 else 0), "those that the forward before was served by"
        assert capture.preparations - before == (2 if seed >= 2 else 0)
    assert capture.replays == 4 * 2 * 2


def test_each_is_made_once(
    recorder: Recorder, stacks: tuple[nn.ModuleList, nn.ModuleList], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step, however often the layers ran before they were recorded."""
    made, cast = [], prepare._cast
    monkeypatch.setattr(prepare, "_cast", lambda *given: made.append(given) or cast(*given))
    counts = []
    for seed in range(5):
        made.clear()
        recorder.begin(LENGTH)
        _run(stacks[0], seed).float().square().sum().backward()
        recorder.end()
        counts.append(len(made))
    assert counts[-1] == counts[0] > 0


def test_outside_of_one_each_is_prepared_when_it_is_called(
    capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    for seed in range(6):
        _assert_same_step(stacks, seed)
    assert capture.preparations == 4 * 2
    assert capture.replays == 4 * 2 * 2


def test_of_batches_of_other_lengths_those_that_serve_are_prepared(
    recorder: Recorder, capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    for seed in range(12):
        recorder.begin(LENGTH + seed % 2)
        _assert_same_step(stacks, seed, LENGTH + seed % 2)
        recorder.end()
    assert capture.replays == 8 * 2 * 2
    assert capture.preparations == 8 * 2


def test_not_without_gradients(
    recorder: Recorder, capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    for seed in range(3):
        _assert_same_step(stacks, seed)
    before = capture.preparations
    with torch.no_grad():
        recorder.begin(LENGTH)
        assert torch.equal(_run(stacks[0], 7), _run(stacks[1], 7))
        recorder.end()
    assert capture.preparations == before


def test_not_while_a_backward_is_to_come(
    recorder: Recorder, capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    """It reads what was computed for its forward."""
    for seed in range(3):
        _assert_same_step(stacks, seed)
    out = _run(stacks[0], 7)
    before = capture.preparations
    recorder.begin(LENGTH)
    recorder.end()
    assert capture.preparations == before
    out.float().sum().backward()
    _assert_same_step(stacks, 8)


def test_a_models_layers(checkpoint: Checkpoint) -> None:
    """The decoder's forward says when."""
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    first, prepared = ours.get_base_model().model.layers[0], []
    for seed in range(6):
        for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
            if p.requires_grad:
                with torch.no_grad():
                    p.add_(0.01), q.add_(0.01)
        handle = first.register_forward_pre_hook(lambda *_: prepared.append(capture.preparations))
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
        handle.remove()
    assert prepared == [0, 0, 0, 4, 6, 8]
    assert capture.preparations == 4 * 2


def test_factors_that_change_within_a_forward_are_read_as_they_are(
    recorder: Recorder, capture: FakeCapture, stacks: tuple[nn.ModuleList, nn.ModuleList]
) -> None:
    """By a hook, say, that adds noise to them."""

    def halve(layer: nn.Module, _args: object) -> None:
        with torch.no_grad():
            layer.factors[0].mul_(0.5)

    for layers in stacks:
        layers[1].register_forward_pre_hook(halve)
    for seed in range(6):
        recorder.begin(LENGTH)
        _assert_same_step(stacks, seed)
        recorder.end()
    assert capture.replays == 4 * 2 * 2


def test_a_recording_that_is_forgotten_is_gone(recorder: Recorder, stacks: tuple[nn.ModuleList, nn.ModuleList]) -> None:
    """Its memory is wanted for another, in the same forward."""
    for seed in range(4):
        recorder.begin(LENGTH)
        _assert_same_step(stacks, seed)
        recorder.end()
    recorder.begin(LENGTH)
    recordings = [weakref.ref(made) for piece in recorder.pieces for made in piece._recordings.values()]
    for piece in recorder.pieces:
        piece.forget()
    for pool in recorder.pools.values():
        assert pool is not None
        pool._begun.clear()  # as the next that begins does
    gc.collect()
    assert len(recordings) == 2
    assert not any(ref() for ref in recordings)
    recorder.end()
