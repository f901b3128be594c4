"""For how many recordings there is room, and that what they hold is not planned for twice."""

import pytest
import torch

import expertune
from expertune.graphs.pool import Pool
from expertune.hosts.attached import attached
from expertune.memory import policy
from expertune.memory.planner import Planner
from tests.conftest import Checkpoint
from tests.graphs.replayed import FakeCapture
from tests.hosts import memories
from tests.hosts.recorded import both, recorder_of, step, tokens


def test_explain_says_that_there_was_no_room(checkpoint: Checkpoint) -> None:
    ours, _, capture = both(checkpoint("qwen3_moe"))
    recorder = recorder_of(ours)
    card = memories.Card(memories.TOO_LITTLE)
    recorder._pool_of = lambda _: Pool(capture, card)
    for _ in range(4):
        step(ours, torch.randint(3, 60, (2, 9)))
    assert "0 of 2 layers, 0 kinds of calls; there was no room for more" in str(expertune.explain(ours))
    card.left = memories.PLENTY
    step(ours, torch.randint(3, 60, (2, 9)))
    assert str(expertune.explain(ours).graphs) == "CUDA graphs: 2 of 2 layers, 1 kinds of calls"


class Filling(memories.Card):
    """A card of which 100 bytes more are taken whenever it is asked: whatever is measured takes as many."""

    taken = 0

    def allocated(self) -> int:
        self.taken += 100
        return self.taken

    def free(self) -> int:
        return self.left - self.taken


def test_a_recorded_layer_needs_no_room_to_keep(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    card = Filling(memories.PLENTY)
    memories.auto(ours, card=card)
    recorder = recorder_of(ours)
    recorder._pool_of = lambda _: Pool(capture, card)
    for seed in range(7):
        if seed == 5:
            card.left = card.taken + 50  # of the 100 that the second run of a layer took
        before = capture.replays
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
        assert capture.replays - before == (4 if seed >= 3 else 0)
    torch.testing.assert_close(*[step(model, tokens(7, length=11)) for model in (ours, stock)])
    assert sum(piece.recordings for piece in recorder.pieces) == 0, "there was no room beside those of other calls"


@pytest.mark.parametrize(("left", "recorded"), [(499, 1), (500, 2), (10**6, 2)])
def test_recordings_take_half_of_what_is_free_at_most(checkpoint: Checkpoint, left: int, recorded: int) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    recorder = recorder_of(ours)
    pool = Pool(capture, Filling(left))
    recorder._pool_of = lambda _: pool
    for seed in range(5):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert f"{recorded} of 2 layers, 1 kinds of calls" in str(expertune.explain(ours))


def test_what_the_rest_of_a_step_takes_is_left_free() -> None:
    pool = Pool(FakeCapture(), memories.Card(100))
    assert pool.has_room(100)
    assert not pool.has_room(101)


def test_the_rest_of_a_step_is_what_the_planner_has_measured(checkpoint: Checkpoint) -> None:
    ours, _, _ = both(checkpoint("qwen3_moe"))
    memories.auto(ours, card=memories.Card(memories.PLENTY))
    state = attached(ours.get_base_model())
    assert state is not None
    assert state.recorder is not None
    assert state.recorder.host.rest(torch.device("cpu")) == 0
    assert state.memory is not None
    assert state.memory.planner is not None
    part = state.memory.planner._part(torch.device("cpu"))
    assert part is not None
    part.rise = 7
    assert state.recorder.host.rest(torch.device("cpu")) == 7


def test_a_layer_that_may_keep_without_room_for_a_recording_runs_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    plenty = memories.Card(memories.PLENTY)
    monkeypatch.setattr(policy, "Planner", lambda lean_from: Planner(lambda _: plenty, lean_from))
    expertune.optimize(ours, memory="auto")
    recorder = recorder_of(ours)
    pool = Pool(capture, Filling(499))
    recorder._pool_of = lambda _: pool
    for seed in range(9):
        before = capture.replays
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert capture.recorded == [True, False, False, False]
    assert capture.replays - before == 2 * 2
    said = "2 of 2 layers, 1 kinds of calls, 1 of the layers run forward again in backward; there was no room for more"
    assert said in str(expertune.explain(ours).graphs)


class Idling(memories.Card):
    """A card whose allocator holds memory for no tensor: such a part of what tensors take."""

    def __init__(self, part: float) -> None:
        super().__init__(memories.PLENTY)
        self.part = part

    def idle_part(self) -> float:
        return self.part


@pytest.mark.parametrize(("part", "rooms"), [(0.05, [0]), (0.051, [0, 0, 2])])
def test_what_layers_leave_idle_before_they_are_recorded_is_given_back(
    checkpoint: Checkpoint, part: float, rooms: list[int]
) -> None:
    """Where it is much; before the first layer in any case."""
    ours, _, capture = both(checkpoint("qwen3_moe"))
    recorder = recorder_of(ours)
    pool = Pool(capture, Idling(part))
    recorder._pool_of = lambda _: pool
    for seed in range(4):
        step(ours, tokens(seed))
    assert capture.recorded == [True, False] * 2
    assert capture.rooms == rooms
