"""Two processes under DDP, each with a batch of its own: the gradients of one process on both batches."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.memories import PLENTY, Card, auto, lean
from tests.hosts.models import batch
from tests.hosts.passes import assert_equal_within
from tests.memory.lanes import Lane

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
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


def _train(rank: int, folder: Path, results: Path) -> None:
    """One of the processes: the gradients of each setting and step, into a file, and how many copies were made."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(results / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    grads: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    num_copies = {}
    for memory in SETTINGS:
        model, lane = _model(folder), Lane()
        _set(memory, model, lane)
        parallel = DistributedDataParallel(model)
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


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_gradients_are_those_of_one_process_on_both_batches(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", num_hidden_layers=4)
    multiprocessing.spawn(_train, (folder, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = _model(folder)
    for step in range(NUM_STEPS + 1):
        model.zero_grad()
        batches = range(NUM_STEPS) if step == NUM_STEPS else [step]  # the last is of both
        for rank, number in itertools.product(range(2), batches):
            (model(**_batch(rank, number)).loss / 2).backward()
        truth = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert any("experts" in name for name in truth)
        assert any("self_attn" in name for name in truth)
        for memory in SETTINGS:
            for grads, _ in (first, second):
                assert_equal_within(grads[memory, step], truth, 1e-12)
    for _, num_copies in (first, second):
        assert num_copies == {memory: 2 * MOVED * NUM_STEPS * moves for memory, moves in SETTINGS.items()}
