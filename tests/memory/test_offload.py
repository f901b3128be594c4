"""Inputs of layers that are moved to the host: the same gradients, nothing read or freed too early, little brought."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef

from expertune.memory import offload as memory_offload
from expertune.memory.offload import Offload
from expertune.memory.replay import LayerMemory, RoutingReplay
from tests.memory.checkpoints import CHECKPOINTS, checkpoint_layer
from tests.memory.lanes import Lane

LAYERS, TOKENS, D_ = 6, 8, 4


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D_, D_, dtype=torch.float64)
        self.saw: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.saw()
        return x + self.linear(x).sin()


class _Model(nn.Module):
    """Checkpointed layers, as hosts call them: the name `x` is all that holds an input."""

    def __init__(self, host_checkpoint: Any = checkpoint_layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.replay = RoutingReplay()
        self.checkpoint = host_checkpoint
        self.inputs: list[StorageWeakRef] = []
        self.use(None)

    def use(self, offload: Offload | None) -> "_Model":
        last = self.layers[-1]
        self.calls = [
            self.replay.wrap(
                self.checkpoint,
                memory=LayerMemory(moving=None if offload is None else partial(offload.moving, stays=layer is last)),
            )
            for layer in self.layers
        ]
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        self.inputs = []
        for call, layer in zip(self.calls, self.layers, strict=True):
            self.inputs.append(StorageWeakRef(x.untyped_storage()))
            x = call(layer, x)
        return x.square().mean()

    def grads(self, batch: Tensor) -> list[Tensor]:
        self.zero_grad()
        x = batch.detach().requires_grad_()
        self(x).backward()
        grads = [x.grad, *(p.grad for p in self.parameters())]
        assert all(grad is not None for grad in grads)
        return [grad.clone() for grad in grads if grad is not None]


def _batch(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(2, tokens // 2, D_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _offload(lane: Lane) -> Offload:
    return Offload(lambda _: lane, least_tokens=TOKENS)


def _are_equal(ours: list[Tensor], truth: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("is_late", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("host_checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_gradients_are_bit_equal_and_buffers_are_used_again(host_checkpoint: Any, is_late: bool) -> None:
    lane = Lane(is_late)
    plain, moved = _Model(host_checkpoint), _Model(host_checkpoint).use(_offload(lane))
    for seed in range(3):
        assert _are_equal(moved.grads(_batch(seed=seed)), plain.grads(_batch(seed=seed)))
    assert lane.num_buffers == LAYERS - 1
    assert lane.bytes_moved == [TOKENS * D_ * 8] * 3 * 2 * (LAYERS - 1)


def test_after_forward_only_the_last_input_is_there_and_backward_brings_two() -> None:
    lane = Lane()
    model = _Model().use(_offload(lane))
    brought: list[int] = []
    for layer in model.layers:
        layer.saw = lambda: brought.append(lane.num_brought)
    loss = model(_batch().requires_grad_())
    assert [inputs.expired() for inputs in model.inputs] == [True] * (LAYERS - 1) + [False]
    loss.backward()
    # the last layer calls one back; each other holds its own, and calls the one before; none comes before the first
    assert brought == [1, *[2] * (LAYERS - 2), 1]
    assert lane.num_brought == 0
    model.use(None)(_batch().requires_grad_())
    assert sum(inputs.expired() for inputs in model.inputs) == LAYERS, "the graph is gone, so the test can fail"


def test_without_it_every_input_stays() -> None:
    model = _Model()
    loss = model(_batch().requires_grad_())
    assert not any(inputs.expired() for inputs in model.inputs)
    loss.backward()


def test_only_the_layers_input_is_moved() -> None:
    """Not a parameter, a mask or another tensor that a host hands over, however large."""
    lane, replay = Lane(), RoutingReplay()
    weight = torch.randn(TOKENS, D_, requires_grad=True)
    mask = torch.ones(TOKENS, D_)
    seen: list[tuple[int, int]] = []

    def layer(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        seen.append((weight.data_ptr(), mask.data_ptr()))
        return (x * weight * mask).sin()

    x = torch.randn(TOKENS, D_, requires_grad=True)
    replay.wrap(checkpoint_layer, memory=LayerMemory(moving=_offload(lane).moving))(
        layer, 2 * x, weight, mask
    ).sum().backward()
    assert seen == [(weight.data_ptr(), mask.data_ptr())] * 2
    assert lane.bytes_moved == [TOKENS * D_ * 4] * 2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * x * (2 * x * weight).cos()).detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[: TOKENS - 1] * 2,
        lambda x: x,
        lambda x: x.detach() * 2,
        lambda x: (x * 2).T.contiguous().T,
    ],
    ids=["few tokens", "a leaf", "no gradient", "rows that lie apart"],
)
def test_what_does_not_pay_stays(make: Callable[[Tensor], Tensor]) -> None:
    lane = Lane()
    x, weight = torch.randn(TOKENS, D_, requires_grad=True), torch.randn(TOKENS, 1, requires_grad=True)
    call = RoutingReplay().wrap(checkpoint_layer, memory=LayerMemory(moving=_offload(lane).moving))
    call(lambda x: (x * weight[: len(x)]).sin(), make(x)).sum().backward()
    assert weight.grad is not None
    assert not lane.bytes_moved


@pytest.mark.parametrize("chunk", [memory_offload.CHUNK_BYTES, TOKENS * D_])  # an input is one buffer, or eight
def test_inputs_stay_that_the_host_has_no_memory_for(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(memory_offload, "CHUNK_BYTES", chunk)
    a_layer = max(1, TOKENS * D_ * 8 // chunk)
    lane = Lane(most_buffers=2 * a_layer + (a_layer > 1))  # and a part of a third
    plain, moved = _Model(), _Model().use(_offload(lane))
    for seed in range(2):
        with pytest.warns(UserWarning, match="no memory to spare"):
            grads = moved.grads(_batch(seed=seed))
        assert _are_equal(grads, plain.grads(_batch(seed=seed)))
    assert sum(lane.bytes_moved) == 2 * 2 * 2 * TOKENS * D_ * 8  # two inputs, there and back, in two steps
    loss = moved(_batch().requires_grad_())
    assert [inputs.expired() for inputs in moved.inputs] == [True] * 2 + [False] * (LAYERS - 2)
    loss.backward()


def test_nothing_is_moved_without_gradients_or_on_a_device_without_a_lane() -> None:
    lane = Lane()
    with torch.no_grad():
        _Model().use(_offload(lane))(_batch())
    assert not lane.bytes_moved
    assert _are_equal(_Model().use(Offload(least_tokens=1)).grads(_batch()), _Model().grads(_batch()))


def test_gradients_of_micro_batches_add_up() -> None:
    lane = Lane()
    plain, moved = _Model(), _Model().use(_offload(lane))
    for model in (plain, moved):
        for seed in range(3):
            model(_batch(seed=seed).requires_grad_()).backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (moved, plain)]
    assert _are_equal(*grads)
    assert lane.num_buffers == LAYERS - 1


def test_two_passes_before_one_backward() -> None:
    lane = Lane()
    plain, moved = _Model(), _Model().use(_offload(lane))
    for model in (plain, moved):
        (model(_batch(seed=0).requires_grad_()) - model(_batch(seed=1).requires_grad_())).backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (moved, plain)]
    assert _are_equal(*grads)
    assert lane.num_buffers == 2 * (LAYERS - 1)


def test_a_graph_that_is_kept_can_be_gone_through_twice() -> None:
    lane = Lane()
    plain, moved = _Model(), _Model().use(_offload(lane))
    for model in (plain, moved):
        loss = model(_batch().requires_grad_())
        loss.backward(retain_graph=True)
        loss.backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (moved, plain)]
    assert _are_equal(*grads)


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    lane = Lane()
    model = _Model().use(_offload(lane))
    for _ in range(3):
        model(_batch().requires_grad_())
    assert lane.num_buffers == LAYERS - 1


def test_an_input_that_is_dropped_on_its_way_back_is_waited_for() -> None:
    """Its memory goes to others. The lane notices a target that was freed while its copy was under way."""
    lane = Lane()
    model = _Model().use(_offload(lane))

    def broken() -> None:
        raise ArithmeticError

    model.layers[2].saw = broken
    with pytest.raises(ArithmeticError):
        model(_batch().requires_grad_()).backward()
    model.layers[2].saw = lambda: None
    assert _are_equal(model.grads(_batch()), _Model().grads(_batch()))
    assert lane.num_buffers == LAYERS - 1


@pytest.mark.parametrize("host_checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_long_inputs_lie_in_chunks_that_batches_of_all_lengths_share(
    host_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, lane = 128, Lane()
    monkeypatch.setattr(memory_offload, "CHUNK_BYTES", chunk)
    model = _Model(host_checkpoint).use(_offload(lane))
    taken = []
    for tokens in (24, 8, 10, 18, 22, 24):  # of 32 bytes each: 6 chunks; 2; 2 and a half; 4 and a half; 5 and a half; 6
        assert _are_equal(model.grads(_batch(tokens)), _Model(host_checkpoint).grads(_batch(tokens)))
        assert sum(lane.bytes_moved) == 2 * (LAYERS - 1) * tokens * D_ * 8
        lane.bytes_moved.clear()
        taken.append(lane.bytes_taken / (LAYERS - 1) / chunk)
    assert taken == [6, 6, 6.5, 6.5, 6.5, 6.5]


def test_what_an_input_takes_beyond_its_bytes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than half a chunk for batches of one length, one and a half for those of all lengths."""
    chunk = 512
    monkeypatch.setattr(memory_offload, "CHUNK_BYTES", chunk)
    all_lengths, of_all = Lane(), _Model()
    of_all.use(_offload(all_lengths))
    for tokens in range(8, 48, 2):
        one_length = Lane()
        _Model().use(_offload(one_length)).grads(_batch(tokens))
        of_all.grads(_batch(tokens))
        for lane, most in ((one_length, chunk / 2), (all_lengths, 1.5 * chunk)):
            assert 0 <= lane.bytes_taken / (LAYERS - 1) - tokens * D_ * 8 < most


def test_an_input_in_chunks_comes_back_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_offload, "CHUNK_BYTES", 64)
    lane = Lane()
    model = _Model().use(_offload(lane))
    brought: list[int] = []
    for layer in model.layers:
        layer.saw = lambda: brought.append(lane.num_brought)
    model.grads(_batch())
    assert brought == [1, *[2] * (LAYERS - 2), 1]


def test_batches_that_differ_little_in_length_share_buffers() -> None:
    lane = Lane()
    model = _Model().use(_offload(lane))
    for tokens in (10, 12, 16, 10):  # 320 to 512 bytes
        assert _are_equal(model.grads(_batch(tokens)), _Model().grads(_batch(tokens)))
    assert lane.num_buffers == LAYERS - 1
    model.grads(_batch(18))
    assert lane.num_buffers == 2 * (LAYERS - 1)


def test_a_layer_that_writes_to_its_input_is_refused() -> None:
    lane = Lane()
    x = torch.randn(TOKENS, D_, requires_grad=True)
    call = RoutingReplay().wrap(checkpoint_layer, memory=LayerMemory(moving=_offload(lane).moving))
    with pytest.raises(RuntimeError, match="wrote to its input"):
        call(lambda x: x.mul_(2), x * 1)


def test_a_copy_of_a_model_moves_by_a_lane_of_its_own() -> None:
    lanes: list[Lane] = []

    def lane_of(_device: torch.device) -> Lane:
        lanes.append(Lane())
        return lanes[-1]

    offload = Offload(lane_of, least_tokens=TOKENS)
    truth = _Model().grads(_batch())
    assert _are_equal(_Model().use(offload).grads(_batch()), truth)
    assert _are_equal(_Model().use(copy.deepcopy(offload)).grads(_batch()), truth)
    assert [lane.num_buffers for lane in lanes] == [LAYERS - 1] * 2


def test_under_ddp() -> None:
    """One process suffices: its hooks and buckets are those of many."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        lane = Lane()
        model = _Model().use(_offload(lane))
        parallel = nn.parallel.DistributedDataParallel(model)
        for seed in range(2):
            parallel.zero_grad()
            parallel(_batch(seed=seed).requires_grad_()).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert _are_equal(grads, _Model().grads(_batch(seed=seed))[1:])
        assert lane.num_buffers == LAYERS - 1
    finally:
        distributed.destroy_process_group()
