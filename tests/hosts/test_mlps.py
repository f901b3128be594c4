"""Dense gated MLPs found by trying them: stock's numbers, and the host's own code wherever something else is meant."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import expertune
from expertune.activations import Gate
from expertune.gated_mlp import gated_mlp
from expertune.hosts import forwards, mlps
from expertune.hosts.attached import attached
from expertune.split_linear import Linear
from tests.conftest import Checkpoint
from tests.hosts.memories import lean
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, of_tokens, run
from tests.hosts.spies import inputs_of
from tests.memory.lanes import Lane

MLPS = {"glm4_moe_lite": 2, "deepseek_v3": 2, "qwen2_moe": 2, "gemma3_text": 2, "qwen3_moe": 0, "gpt_oss": 0}
LINEARS = ["gate_proj", "up_proj", "down_proj"]


def adapted(folder: Path, targets: Sequence[str]) -> tuple[Any, Any]:
    """A model with adapters that runs ours, and the same by stock Transformers and PEFT."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load_tiny(folder, torch.float64).requires_grad_(False)
        models.append(expertune.add_lora(model, r=4, target_modules=targets, init_lora_weights=False))
    ours, truth = models
    return ours, expertune.restore(truth)


class Plain(nn.Module):
    """The formula."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Scaled(Plain):
    """A formula of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


class Swapped(Plain):
    """The activation lies on the other half."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))  # type: ignore[no-any-return]


class Clamped(Plain):
    """As GLM-5's and DeepSeek-V4's, which most numbers do not reach."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=100.0)) * self.up_proj(x))  # type: ignore[no-any-return]


class Dropping(Plain):
    """Holds something else."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)


class Asking(Plain):
    """Reads what a small instance does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.missing  # type: ignore[operator]


def test_the_formula_is_found_by_trying_it() -> None:
    for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
        assert len(mlps.find(Plain(activation))) == 1
    for other in (Plain("relu"), Scaled(), Swapped(), Clamped(), Dropping(), Asking(), nn.Linear(8, 8)):
        assert not mlps.find(other), type(other)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that went through the one node."""
    return inputs_of(monkeypatch, mlps, "gated_mlp")


@pytest.mark.parametrize("family", MLPS)
def test_models_compute_what_stock_does(checkpoint: Checkpoint, nodes: list[Tensor], family: str) -> None:
    ours, truth = adapted(checkpoint(family), LINEARS if MLPS[family] else ["o_proj"])
    state = attached(ours.get_base_model())
    assert state is not None
    assert len(state.mlps) == MLPS[family]
    assert ("dense MLPs: 2, each as one step" in str(expertune.explain(ours))) is (MLPS[family] == 2)
    assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert len(nodes) == MLPS[family]
    expertune.restore(ours)
    assert not any(forwards.runs(module, mlps.forward) for module in ours.modules())


def test_a_lean_layer_computes_a_long_batch_in_tiles(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[tuple[int, int | None]] = []

    def spy(x: Tensor, gate: Gate, linears: tuple[Linear, Linear, Linear], tile: int | None) -> Tensor:
        tiles.append((x.shape[:-1].numel(), tile))
        return gated_mlp(x, gate, linears, tile)

    monkeypatch.setattr(mlps, "gated_mlp", spy)
    ours, truth = adapted(checkpoint("glm4_moe_lite"), LINEARS)
    expertune.optimize(ours, memory="lean")
    assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert {tile for _, tile in tiles} == {tokens for tokens, _ in tiles}, "a short one whole"
    lean(ours, Lane())
    for _ in range(2):  # in the first it is seen that something is kept after the experts
        tiles.clear()
        assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert len(tiles) == 4, "two, in forward and again"
    assert all(tile is not None and tile < tokens for tokens, tile in tiles)


def test_an_mlp_without_adapters_is_one_node_too(checkpoint: Checkpoint, nodes: list[Tensor]) -> None:
    ours, truth = adapted(checkpoint("glm4_moe_lite"), ["o_proj"])
    assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-11)
    assert len(nodes) == 2


def _doubled(layer: Any) -> None:
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2


REASONS: dict[str, Callable[[Any], Any]] = {
    "a trained weight": lambda mlp: mlp.up_proj.base_layer.weight.requires_grad_(),
    "a hook on a linear": lambda mlp: mlp.gate_proj.register_forward_hook(lambda _m, _x, y: y * 2),
    "a hook on the base of one": lambda mlp: mlp.down_proj.base_layer.register_forward_hook(lambda _m, _x, y: y * 2),
    "a replaced forward": lambda mlp: _doubled(mlp.up_proj),
    "adapters off": lambda mlp: mlp.down_proj.enable_adapters(False),
    "an adapter merged": lambda mlp: mlp.down_proj.merge(),
    "factors of another dtype": lambda mlp: (mlp.gate_proj.lora_A.float(), mlp.gate_proj.lora_B.float()),
}


@pytest.mark.parametrize("change", REASONS.values(), ids=REASONS)
def test_anything_else_is_left_to_the_host(
    checkpoint: Checkpoint, nodes: list[Tensor], change: Callable[[Any], Any]
) -> None:
    ours, truth = adapted(checkpoint("glm4_moe_lite"), LINEARS)
    for model in (ours, truth):
        change(model.get_base_model().model.layers[0].mlp)
    results = []
    for model in (ours, truth):
        out = model(**batch())
        out.loss.backward()
        results.append(
            {"loss": out.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    ours_is_float32 = (
        ours.get_base_model().model.layers[0].mlp.gate_proj.lora_A["default"].weight.dtype == torch.float32
    )
    assert_equal_within(*results, 1e-5 if ours_is_float32 else 1e-11)
    assert len(nodes) == 1, "the shared expert of the other layer"


@pytest.mark.parametrize(("dropout", "num_nodes"), [(0.0, 2), (0.1, 0)])
def test_adapters_with_dropout_are_left_to_peft(
    checkpoint: Checkpoint, nodes: list[Tensor], dropout: float, num_nodes: int
) -> None:
    model = load_tiny(checkpoint("gemma3_text"), torch.float64)
    expertune.add_lora(model, r=4, target_modules=LINEARS, lora_dropout=dropout)(**batch())
    assert len(nodes) == num_nodes


def test_a_frozen_model_computes_what_it_did(checkpoint: Checkpoint, nodes: list[Tensor]) -> None:
    folder = checkpoint("deepseek_v3")
    ours, truth = (load_tiny(folder, torch.float64).requires_grad_(False) for _ in range(2))
    expertune.optimize(ours)
    logits = [of_tokens(model(**batch()).logits, batch()) for model in (ours, truth)]
    torch.testing.assert_close(*logits, rtol=1e-11, atol=1e-11)
    assert len(nodes) == 2
