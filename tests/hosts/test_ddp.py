"""Two processes under DDP or FSDP, each with a batch of its own: the gradients of one process on both batches."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import expertune
from tests.conftest import Checkpoint
from tests.hosts import recorded
from tests.hosts.adapters import lora, stock
from tests.hosts.memories import PLENTY, Card, auto, lean
from tests.hosts.models import batch
from tests.hosts.passes import assert_equal_within
from tests.memory.lanes import Lane

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARDED = ("auto", "lean", "fast")
REPLAYED = 6  # steps, of which the first two are not
NUM_STEPS = 2  # the second one by what the first one has left: buffers, a plan, DDP's buckets in a new order
MOVED = 2  # inputs of four layers: not the last, nor the first, which has no gradient while embeddings are frozen


def _model(folder: Path) -> Any:
    return stock(folder, lora(target_modules=TARGETS))


def _set(memory: str, model: nn.Module, lane: Lane) -> None:
    if memory == "lean":
        lean(model, lane)
    elif memory == "fast":
        expertune.optimize(model, memory="fast")
    else:
        auto(model, lane, Card(PLENTY) if memory == "auto" else Card())


SETTINGS = {"lean": True, "auto": False, "auto, lean steps": True, "fast": False}  # and whether inputs move


def _batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    return batch(2 * step + rank, length=9 + rank)


def _join(rank: int, results: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(results / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)


def _train(rank: int, folder: Path, results: Path, looks_for_unused: bool) -> None:
    """One of the processes: the gradients of each setting and step, into a file, and how many copies were made."""
    _join(rank, results)
    grads: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    num_copies = {}
    for memory in SETTINGS:
        model, lane = _model(folder), Lane()
        _set(memory, model, lane)
        parallel = DistributedDataParallel(model, find_unused_parameters=looks_for_unused)
        for step in range(NUM_STEPS):
            parallel.zero_grad()
            parallel(**_batch(rank, step)).loss.backward()
            grads[memory, step] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        num_copies[memory] = len(lane.bytes_moved)
        parallel.zero_grad()
        with parallel.no_sync():
            parallel(**_batch(rank, 0)).loss.backward()
        parallel(**_batch(rank, 1)).loss.backward()  # some of it is added to `.grad` by us, before DDP reduces it
        grads[memory, NUM_STEPS] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.save((grads, num_copies), results / f"{rank}.pt")
    distributed.destroy_process_group()


def _replay(rank: int, folder: Path, results: Path) -> None:
    """One of the processes, whose layers are recorded: loss and gradients of each step, and how much was replayed."""
    _join(rank, results)
    ours, _, capture = recorded.both(folder)
    parallel = DistributedDataParallel(ours, find_unused_parameters=True)
    steps = [
        [x.clone() for x in recorded.step(parallel, recorded.tokens(2 * seed + rank)) if x is not None]
        for seed in range(REPLAYED)
    ]
    torch.save((steps, capture.replays, capture.preparations), results / f"{rank}.pt")
    distributed.destroy_process_group()


def _shard(rank: int, folder: Path, results: Path) -> None:
    """One of the processes, which hold halves of all parameters: the whole gradients of each setting and step."""
    _join(rank, results)
    grads: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for memory in SHARDED:
        model = _model(folder)
        expertune.optimize(model, memory=memory)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for step in range(NUM_STEPS):
            model.zero_grad()
            model(**_batch(rank, step)).loss.backward()
            grads[memory, step] = {
                name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad
            }
    torch.save(grads, results / f"{rank}.pt")
    distributed.destroy_process_group()


def _of_one_process(model: Any, steps: Iterable[int]) -> dict[str, torch.Tensor]:
    """The gradients on the batches of both."""
    model.zero_grad()
    for rank, step in itertools.product(range(2), steps):
        (model(**_batch(rank, step)).loss / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


needs_gloo = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


@needs_gloo
def test_recorded_layers_give_the_gradients_of_both_batches(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", num_hidden_layers=4)
    multiprocessing.spawn(_replay, (folder, tmp_path), nprocs=2)
    _, stock, _ = recorded.both(folder)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for seed in range(REPLAYED):
        passes = [
            [x.clone() for x in recorded.step(stock, recorded.tokens(2 * seed + rank)) if x is not None]
            for rank in range(2)
        ]
        grads = [(first + second) / 2 for first, second in zip(passes[0][1:], passes[1][1:], strict=True)]
        for rank, (steps, _, _) in enumerate(results):
            torch.testing.assert_close(steps[seed], [passes[rank][0], *grads])
    for _, replays, preparations in results:
        assert replays == (REPLAYED - 2) * 4 * 2  # forward and backward of four layers
        assert preparations == (REPLAYED - 2) * 4


@needs_gloo
def test_shards_get_the_gradients_of_both_batches(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """FSDP2 gathers a layer's parameters around its forward and its backward."""
    folder = checkpoint("qwen3_moe", num_hidden_layers=4)
    multiprocessing.spawn(_shard, (folder, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = _model(folder)
    for step in range(NUM_STEPS):
        truth = _of_one_process(model, [step])
        for memory, grads in itertools.product(SHARDED, (first, second)):
            assert_equal_within(grads[memory, step], truth, 1e-12)


@needs_gloo
@pytest.mark.parametrize("looks_for_unused", [True, False])  # as Transformers' trainer has it for PEFT's models, or not
def test_gradients_are_those_of_one_process_on_both_batches(
    checkpoint: Checkpoint, tmp_path: Path, looks_for_unused: bool
) -> None:
    folder = checkpoint("qwen3_moe", num_hidden_layers=4)
    multiprocessing.spawn(_train, (folder, tmp_path, looks_for_unused), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = _model(folder)
    for step in range(NUM_STEPS + 1):
        truth = _of_one_process(model, range(NUM_STEPS) if step == NUM_STEPS else [step])  # the last is of both
        assert any("experts" in name for name in truth)
        assert any("self_attn" in name for name in truth)
        for memory in SETTINGS:
            for grads, _ in (first, second):
                assert_equal_within(grads[memory, step], truth, 1e-12)
    for _, num_copies in (first, second):
        assert num_copies == {memory: 2 * MOVED * NUM_STEPS * moves for memory, moves in SETTINGS.items()}
