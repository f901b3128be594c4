"""What is built while a model is set up: the calls that its layers will make, one of each kind."""

from pathlib import Path

import pytest
import torch
from torch import nn

import expertune
from expertune.hosts import early, router
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny, save_tiny, tokenizer

SHAPES = {  # of attention, with all keys and in a window, and of norms
    "qwen3_moe": [
        *2 * [((1, 1024, 4, 8), (1, 1024, 2, 8), (1, 1024, 2, 8))],
        ((1, 4, 4, 8),),  # heads of queries, and of keys, that are normed and rotated
        ((1, 4, 2, 8),),
        ((4, 32),),
        ((4, 8),),
    ],
    "gpt_oss": [
        ((1, 4096, 4, 8), (1, 4096, 2, 8), (1, 4096, 2, 8)),  # beyond what ours attends to with sinks
        ((1, 1024, 4, 8), (1, 1024, 2, 8), (1, 1024, 2, 8)),
        ((4, 32),),
    ],
    "glm4_moe_lite": [*2 * [((1, 1024, 4, 16), (1, 1024, 4, 16), (1, 1024, 4, 8))], ((4, 32),), ((4, 16),)],
}


def routers(model: nn.Module) -> list[tuple[tuple[int, int]]]:
    """The logits of the one kind of router that a model has, if it is one of ours: not in every release."""
    return [((4, 8),)] if router.find(model) else []


NUM_MLPS = {"glm4_moe_lite": 2}  # of a dense layer and of shared experts, which differ in width


@pytest.mark.parametrize("family", SHAPES)
def test_each_kind_is_called_once(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family), torch.float32))
    calls = early.calls(model)
    mlps = [((4, 16),)] * NUM_MLPS.get(family, 0)
    assert sorted(call.shapes for call in calls) == sorted([*SHAPES[family], *routers(model), *mlps])
    for call in calls:
        call.run(torch.device("cpu"))


@pytest.mark.parametrize(("family", "have_sinks"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_attention_is_called_with_the_sinks_that_it_has(
    checkpoint: Checkpoint, family: str, have_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[int | None, bool]] = []

    def attend(q: torch.Tensor, *_: object, window: int | None, sinks_H: object, **__: object) -> torch.Tensor:
        called.append((window, sinks_H is not None))
        return q

    monkeypatch.setattr(early, "attend", attend)
    for call in early._attentions(expertune.optimize(load_tiny(checkpoint(family), torch.float32))):
        call.function(*(torch.zeros(shape) for shape in call.shapes))
    assert set(called) == {(None, have_sinks), (128, have_sinks)}


def test_nothing_is_begun_without_a_gpu(checkpoint: Checkpoint) -> None:
    assert early.begin(expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))) == []


@needs_cuda
@pytest.mark.parametrize("family", SHAPES)
def test_on_a_gpu_all_of_it_succeeds_and_draws_no_random_number(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family), torch.bfloat16).cuda())
    before = torch.cuda.get_rng_state()
    begun = early.begin(model)
    num_calls = len(SHAPES[family]) + len(routers(model)) + NUM_MLPS.get(family, 0)
    assert len(begun) == num_calls + 2  # the head and the optimizer
    for each in begun:
        each.result()
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_load_begins_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(early, "begin", begun.append)
    save_tiny("qwen3_moe", tmp_path)
    tokenizer(64).save_pretrained(tmp_path)
    model, _ = expertune.load(str(tmp_path))
    assert begun == [model]
