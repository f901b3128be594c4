"""Models that a map splits over devices, as `device_map` does it: losses and every gradient are stock PEFT's.

Accelerate hooks every module, and the hooks move what comes in to where a module lies; nothing sets the current device.
"""

from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import expertune
from expertune.hosts import router
from expertune.hosts.attached import attached
from tests.conftest import Checkpoint
from tests.graphs.replayed import FakeCapture
from tests.hosts.adapters import wrap
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, on_the_truths_routes, run
from tests.hosts.recorded import recorder_of
from tests.numerics import assert_no_worse

Places: TypeAlias = tuple[Any, Any]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v3": {},
    "llama4_text": {},
}
CPU: Places = ("cpu", "cpu")  # hooks everywhere, and nothing to move
GPUS: Places = (0, 1)
RECORDED = "CUDA graphs: 4 of 4 layers, 1 kinds of calls"
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
each_family = pytest.mark.parametrize("family", FAMILIES)


def split(model: Any, places: Places) -> Any:
    """The first half of the layers and what is before them on one device, the rest on another."""
    first, second = places
    middle = len(model.model.layers) // 2
    device_map = {f"model.{name}": first for name, _ in model.model.named_children() if name != "layers"}
    device_map |= {f"model.layers.{i}": second if i >= middle else first for i in range(2 * middle)}
    device_map |= {"model.norm": second, "lm_head": second}
    return dispatch_model(model, device_map, force_hooks=True, skip_keys=model._skip_keys_device_placement)


@pytest.fixture
def folder(checkpoint: Checkpoint, family: str) -> Path:
    """Of a model with four layers."""
    return checkpoint(family, num_hidden_layers=4, **FAMILIES[family])


def ours_on(places: Places, folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Optimized and adapted where the map has put it."""
    model = split(load_tiny(folder, dtype), places)
    torch.manual_seed(0)
    return expertune.add_lora(expertune.optimize(model, **settings), r=4, lora_alpha=6, init_lora_weights=False)


def stock_on(places: Places, folder: Path, dtype: torch.dtype, ours: Any) -> Any:
    """The host's model under stock PEFT on the same map, with the adapters, and the rounding, of ours."""
    model = wrap(split(load_tiny(folder, dtype), places), ours.peft_config["default"])
    model.load_state_dict(ours.state_dict())
    return model


def devices(model: nn.Module) -> set[str]:
    return {str(parameter.device) for parameter in model.parameters()}


@pytest.mark.parametrize("places", [CPU, pytest.param(GPUS, marks=two_gpus)], ids=["hooks", "two devices"])
@each_family
def test_float64_is_stock_pefts(folder: Path, walks: list[str], places: Places) -> None:
    ours = ours_on(places, folder, torch.float64, backend="native_torch")
    theirs = stock_on(places, folder, torch.float64, ours)
    assert devices(ours) == devices(theirs) == ({"cpu"} if places == CPU else {"cuda:0", "cuda:1"})
    assert_equal_within(run(ours, batch()), run(theirs, batch()), 1e-11)
    assert len(walks) == len(expertune.explain(ours).layers)


@two_gpus
@each_family
def test_our_kernels_are_no_worse_than_stock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "has_kernel", lambda *_: False)  # it would not choose the truth's routes
    # whose attention rounds better in one batch is chance; tests/attention compares it alone
    ours = ours_on(GPUS, folder, torch.float32, attention="host", graphs=False)  # a recorded layer chooses again
    theirs = stock_on(GPUS, folder, torch.float32, ours)
    exact = stock_on(GPUS, folder, torch.float64, ours)
    assert {layer.backend for layer in expertune.explain(ours).layers} == {"triton"}
    for name, (result, plain, truth) in on_the_truths_routes(exact, ours, theirs).items():
        assert_no_worse(result, plain, truth, name, depth=len(ours.get_base_model().model.layers))


def assert_steps_are_stock(ours: Any, theirs: Any, num_steps: int) -> None:
    """Steps of one shape, each with other tokens and no padding: calls that are repeated, recorded and planned."""
    for seed in range(num_steps):
        ids = batch(seed)["input_ids"].clamp(min=3)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
        assert_equal_within(run(ours, inputs), run(theirs, inputs), 1e-4)


@two_gpus
@each_family
def test_steps_with_graphs_and_planned_memory(folder: Path, family: str) -> None:
    ours = ours_on(GPUS, folder, torch.float32, graphs=True, memory="auto")
    assert_steps_are_stock(ours, stock_on(GPUS, folder, torch.float32, ours), 6)
    assert torch.cuda.current_device() == 0
    planner = attached(ours.get_base_model()).memory.planner  # type: ignore[union-attr]
    noted = {str(device): sorted(part._bytes) for device, part in planner._parts.items()}  # type: ignore[union-attr]
    assert noted == {"cuda:0": [0, 1], "cuda:1": [2, 3]}


def mapped_later(places: Places, folder: Path) -> Any:
    """Optimized and adapted before the map comes, so that hooks lie around what is recorded."""
    model = load_tiny(folder, torch.float32)
    torch.manual_seed(0)
    ours = expertune.add_lora(expertune.optimize(model), r=4, lora_alpha=6, init_lora_weights=False)
    split(ours.get_base_model(), places)
    return ours


@each_family
def test_layers_are_replayed_below_hooks_that_came_later(folder: Path) -> None:
    ours = mapped_later(CPU, folder)
    capture = FakeCapture()
    recorder_of(ours)._pool_of = capture.pool
    assert_steps_are_stock(ours, stock_on(CPU, folder, torch.float32, ours), 6)
    assert capture.replays
    assert RECORDED in str(expertune.explain(ours))


@two_gpus
@each_family
def test_layers_on_two_devices_are_replayed(folder: Path) -> None:
    ours = mapped_later(GPUS, folder)
    assert_steps_are_stock(ours, stock_on(GPUS, folder, torch.float32, ours), 6)
    assert RECORDED in str(expertune.explain(ours))
    assert torch.cuda.current_device() == 0
