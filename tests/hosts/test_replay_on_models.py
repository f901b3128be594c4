"""Gradient checkpointing of whole models: the gradients are those without it, and near ties fall as they first did."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import expertune
from expertune.hosts.blocks import blocks
from expertune.memory import token_tiles
from expertune.memory.replay import RoutingReplay
from expertune.shapes import Dispatch
from expertune.walk import ExpertsStep
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.memories import auto, lean
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import assert_equal_within, run
from tests.memory.lanes import Lane


def _ours(model: nn.Module) -> None:
    expertune.optimize(model, memory="auto")


def _hosts(use_reentrant: bool) -> Callable[[nn.Module], None]:
    def turn_on(model: Any) -> None:
        expertune.optimize(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    return turn_on


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "ours": _ours,
    "lean": lean,
    "ours, lean steps": auto,
    "host's, reentrant": _hosts(True),
    "host's, not reentrant": _hosts(False),
}


def _num_runs(family: str, way: Any) -> int:
    """How often a layer runs in its first step under checkpointing.

    Shared experts come after the routed ones and save their input: the layer is run once more, in full.
    """
    return (
        3 if family in ("glm4_moe_lite", "deepseek_v3", "qwen2_moe") and way is not WAYS["host's, not reentrant"] else 2
    )


class _Drift(TorchFunctionMode):
    """Perturbs the scores of every `topk` by another noise each time: near ties that fall otherwise, made frequent."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def start(self, *_hook: Any) -> None:
        self.__enter__()

    def stop(self, *_hook: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        self.num_calls += 1
        generator = torch.Generator().manual_seed(self.num_calls)
        scores, *rest = args
        noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64).to(scores.dtype)
        index = func(scores.detach() + noise, *rest, **(kwargs or {}))[1]
        return torch.return_types.topk((scores.gather(-1, index), index))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("trains", ["all", "adapter"])
def test_gradients_are_those_without(
    checkpoint: Checkpoint, walks: list[str], family: str, trains: str, way: Any
) -> None:
    def make() -> nn.Module:
        return load_tiny(checkpoint(family)) if trains == "all" else stock(checkpoint(family), lora())

    plain, checkpointed = expertune.optimize(make()), make()
    way(checkpointed)
    truth = run(plain, batch())
    num_layers = len(walks)
    walks.clear()
    assert_equal_within(run(checkpointed, batch()), truth, 1e-12)
    assert len(walks) == _num_runs(family, way) * num_layers
    walks.clear()
    assert_equal_within(run(checkpointed, batch()), truth, 1e-12)
    assert len(walks) == 2 * num_layers, "a layer has forgotten what it may leave out"


@pytest.mark.parametrize("name", [name for name in WAYS if name != "host's, reentrant"])  # there the host loses it
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_balance_loss_has_its_gradient(checkpoint: Checkpoint, walks: list[str], family: str, name: str) -> None:
    """It is computed from the routers' logits, which Transformers collects on the way through the layers."""
    folder = checkpoint(family, router_aux_loss_coef=10.0)
    plain, checkpointed = stock(folder, lora()), stock(folder, lora())  # the truth is stock's own
    WAYS[name](checkpointed)
    collecting = batch() | {"output_router_logits": True}
    truth = run(plain, collecting)
    for num_runs in (_num_runs(family, WAYS[name]), 2):
        walks.clear()
        assert_equal_within(run(checkpointed, collecting), truth, 1e-12)
        assert len(walks) == num_runs * len(list(blocks(checkpointed)))


@pytest.mark.parametrize("name", [name for name in WAYS if name != "host's, reentrant"])
def test_a_loss_on_what_is_collected_has_its_gradient(checkpoint: Checkpoint, name: str) -> None:
    """The outputs of each layer once, in order."""
    truth: dict[str, Tensor] = {}
    for way in (expertune.optimize, WAYS[name]):
        model: Any = stock(checkpoint("qwen3_moe"), lora())
        way(model)
        states = model(**batch(), output_hidden_states=True, output_router_logits=True).hidden_states
        assert len(states) == 1 + model.config.num_hidden_layers
        sum(number * state.square().mean() for number, state in enumerate(states)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_equal_within(grads, truth or grads, 1e-12)
        truth = grads


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_hooks_see_in_the_second_run_what_they_saw_in_the_first(checkpoint: Checkpoint, way: Any) -> None:
    model = stock(checkpoint("qwen3_moe"), lora())
    way(model)
    run(model, batch())  # in which the layers learn what they may leave out
    seen: list[Tensor] = []
    (block, *_) = blocks(model)
    hook = block.register_forward_hook(lambda _block, _args, out: seen.append(out.detach().clone()))
    run(model, batch())
    first, *again = seen
    assert len(again) == (way is not WAYS["host's, not reentrant"])  # which stops before the block has ended
    for each in again:
        torch.testing.assert_close(each, first, rtol=0, atol=0)
    hook.remove()


def _clip(out: Tensor) -> Tensor:
    """By a number that Python reads."""
    return out * min(1.0, 5.0 / (float(out.detach().norm()) + 1e-9))


class _Keeping(torch.autograd.Function):
    """Keeps what it reads, without saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().clone()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.x.tanh()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("reader", [_clip, _Keeping.apply], ids=["a number", "a function of autograd"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["a block's forward", "a hook on all modules"])
def test_who_reads_the_experts_output_later_on_reads_it_in_the_second_run_too(
    checkpoint: Checkpoint, way: Any, reader: Any, everywhere: bool
) -> None:
    models = [stock(checkpoint("qwen3_moe"), lora()) for _ in range(2)]
    way(models[1])
    for model in models:
        run(model, batch())  # in which the layers learn what they may leave out
    kinds = {type(block) for block in blocks(models[0])}
    inputs = batch()
    inputs["attention_mask"].fill_(1)  # what padding yields is in the norm, too
    if everywhere:
        hook = register_module_forward_hook(lambda module, _args, out: reader(out) if type(module) in kinds else None)
    else:
        for block in (block for model in models for block in blocks(model)):
            block.forward = partial(lambda forward, x: reader(forward(x)), block.forward)  # type: ignore[method-assign]
    try:
        expected, ours = (run(model, inputs) for model in models)
    finally:
        if everywhere:
            hook.remove()
    assert_equal_within(ours, expected, 1e-11)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_passes_before_one_backward(checkpoint: Checkpoint, way: Any) -> None:
    """As preference losses do: each pass has its own routing to replay, whatever the order of recomputation."""
    models = [expertune.optimize(stock(checkpoint("qwen3_moe"), lora())), stock(checkpoint("qwen3_moe"), lora())]
    way(models[1])
    grads = []
    for model in models:
        (model(**batch(0)).loss - 0.5 * model(**batch(1, length=7)).loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_equal_within(grads[1], grads[0], 1e-12)


def test_lean_moves_the_inputs_of_all_layers_but_the_last(checkpoint: Checkpoint) -> None:
    """Of the first too, unless autograd holds it anyway, as where inputs are made to require gradients."""
    model, lane = load_tiny(checkpoint("qwen3_moe", num_hidden_layers=4)), Lane()
    lean(model, lane)
    for _ in range(2):
        run(model, batch())
        expertune.optimize(model)  # which keeps what was set
    num_bytes = batch()["input_ids"].numel() * model.config.hidden_size * 8
    assert lane.bytes_moved == [num_bytes] * 2 * 2 * len(_moved_layers(model))
    expertune.optimize(model, memory="auto")
    run(model, batch())
    assert len(lane.bytes_moved) == 2 * 2 * len(_moved_layers(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_lean_walks_a_long_batch_in_tiles(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Also without gradients and when nothing is checkpointed; a short batch is walked whole."""
    model, plain = stock(checkpoint(family), lora()), expertune.optimize(stock(checkpoint(family), lora()))
    lean(model)
    numbers: list[int] = []

    def spy(x: Any, routings: Any, *args: Any, **keywords: Any) -> Any:
        numbers.append(len(routings))
        return walk(x, routings, *args, **keywords)

    walk = token_tiles.experts
    monkeypatch.setattr(token_tiles, "experts", spy)
    for mode in (True, False):
        assert_equal_within(run(model.train(mode), batch()), run(plain.train(mode), batch()), 1e-12)
    assert set(numbers) == {3}
    numbers.clear()
    run(model, batch(num_rows=1, length=7))
    assert not numbers
    expertune.optimize(model, memory="auto")
    run(model, batch())
    assert not numbers


def test_the_sorted_rows_of_a_long_batch_are_not_kept(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short one they are: sorting costs more than little memory."""
    model = stock(checkpoint("qwen3_moe"), lora())
    lean(model)
    sorted_rows: list[StorageWeakRef] = []
    dispatch = ExpertsStep.dispatch

    def spy(step: ExpertsStep, expert_TK: Tensor) -> Dispatch:
        rows = dispatch(step, expert_TK)
        sorted_rows.append(StorageWeakRef(rows.words.untyped_storage()))
        return rows

    monkeypatch.setattr(ExpertsStep, "dispatch", spy)
    num_layers = model.config.num_hidden_layers
    for inputs, num_tiles, are_kept in ((batch(), 3, False), (batch(num_rows=1, length=7), 1, True)):
        sorted_rows.clear()
        loss = model(**inputs).loss
        assert [not rows.expired() for rows in sorted_rows] == [are_kept] * num_tiles * num_layers
        loss.backward()
        assert len(sorted_rows) == num_tiles * num_layers * (1 if are_kept else 2)


def test_gradients_of_micro_batches_add_up(checkpoint: Checkpoint) -> None:
    models = [expertune.optimize(stock(checkpoint("qwen3_moe"), lora())), stock(checkpoint("qwen3_moe"), lora())]
    lean(models[1])
    grads = []
    for model in models:
        for seed in range(3):
            model(**batch(seed, length=9 + seed)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_equal_within(grads[1], grads[0], 1e-12)


def _moved_layers(model: Any) -> list[nn.Module]:
    """The layers whose inputs are moved when everything is trained."""
    return list(model.model.layers[:-1])


def _drifting(model: nn.Module) -> _Drift:
    """The drift while every MoE block routes, in forward and again in recomputation.

    Where older versions of the host route in the block itself, the router's hooks would see nothing.
    """
    drift = _Drift()
    for block in blocks(model):
        block.register_forward_pre_hook(drift.start)
        block.get_submodule("experts").register_forward_pre_hook(drift.stop)
    assert drift.num_calls == 0
    return drift


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_near_ties_fall_as_in_forward(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str, way: Any
) -> None:
    """Scores drift between the two runs of a layer. The truth is one run without checkpointing on the same scores."""
    plain, replayed, chosen_again = (load_tiny(checkpoint(family)) for _ in range(3))
    expertune.optimize(plain)
    drift = _drifting(plain)
    truth = run(plain, batch())
    num_choices = drift.num_calls
    assert num_choices > 0

    way(replayed)
    drift = _drifting(replayed)
    assert_equal_within(run(replayed, batch()), truth, 1e-12)
    assert drift.num_calls == 2 * num_choices  # hooks look on, so nothing is left out at first

    way(chosen_again)
    _drifting(chosen_again)
    monkeypatch.setattr(RoutingReplay, "enter_block", lambda self: None)
    wrong = run(chosen_again, batch())
    assert any((wrong[name] - truth[name]).abs().max() > 1e-6 for name in truth), "without replay the test cannot fail"
