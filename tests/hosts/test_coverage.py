"""The coverage table: what is trained, by part, against rows written by hand; and against the gradients of a step."""

from typing import Any

import pytest

import expertune
from expertune.hosts.coverage import Row
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import run

E, D, F, R = 8, 32, 24, 4


def _row(kind: str, name: str, num_layers: int, widths: tuple[int, int], num_experts: int = 1) -> Row:
    return Row(
        kind=kind,
        name=name,
        ranks=(R,),
        num_layers=num_layers,
        num_parameters=num_layers * num_experts * R * sum(widths),
    )


def _routed(num_layers: int) -> list[Row]:
    return [
        _row("routed experts", "mlp.experts.down_proj", num_layers, (F, D), E),
        _row("routed experts", "mlp.experts.gate_up_proj", num_layers, (D, 2 * F), E),
    ]


_MLA = [
    *_routed(1),
    _row("shared experts", "mlp.shared_experts.down_proj", 1, (F, D)),
    _row("shared experts", "mlp.shared_experts.gate_proj", 1, (D, F)),
    _row("shared experts", "mlp.shared_experts.up_proj", 1, (D, F)),
    _row("dense layers", "mlp.down_proj", 1, (48, D)),
    _row("dense layers", "mlp.gate_proj", 1, (D, 48)),
    _row("dense layers", "mlp.up_proj", 1, (D, 48)),
    _row("attention", "self_attn.o_proj", 2, (D, D)),
]
ROWS: dict[str, list[Row]] = {
    "qwen3_moe": [*_routed(2), _row("attention", "self_attn.o_proj", 2, (D, D))],
    "gpt_oss": [*_routed(2), _row("attention", "self_attn.o_proj", 2, (D, D))],
    "glm4_moe_lite": _MLA,
    "deepseek_v3": _MLA,
    "llama4_text": [
        _row("routed experts", "feed_forward.experts.down_proj", 2, (F, D), E),
        _row("routed experts", "feed_forward.experts.gate_up_proj", 2, (D, 2 * F), E),
        _row("shared experts", "feed_forward.shared_expert.down_proj", 2, (F, D)),
        _row("shared experts", "feed_forward.shared_expert.gate_proj", 2, (D, F)),
        _row("shared experts", "feed_forward.shared_expert.up_proj", 2, (D, F)),
        _row("attention", "self_attn.o_proj", 2, (D, D)),
    ],
}


@pytest.mark.parametrize("family", CONFIGS)
def test_rows(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("COLUMNS", "110")  # wide enough for the longest name
    names = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    model = expertune.add_lora(load_tiny(checkpoint(family)), r=R, target_modules=names)
    printed = capsys.readouterr().out
    table = expertune.trained(model)
    assert list(table.rows) == ROWS[family]
    assert table.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.num_all == sum(p.numel() for p in model.parameters())
    assert table.kinds()["router"] == 0
    for row in table.rows:  # add_lora printed the same
        assert row.name in printed
        assert f"{row.num_parameters:,}" in printed
    assert "router" in printed
    assert "not trained" in printed


@pytest.mark.parametrize("family", CONFIGS)
def test_full_fine_tuning_covers_every_parameter(checkpoint: Checkpoint, family: str) -> None:
    model = load_tiny(checkpoint(family))
    table = expertune.trained(model)
    assert table.num_trained == table.num_all == sum(p.numel() for p in model.parameters())
    assert not table.adapted
    kinds = table.kinds()
    routers = [p.numel() for name, p in model.named_parameters() if ".mlp.gate." in name or ".router." in name]
    assert kinds["router"] == sum(routers) > 0
    assert kinds["routed experts"] == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    model.requires_grad_(False)
    assert expertune.trained(model).num_trained == 0


def test_the_gate_of_a_shared_expert_counts_as_a_router(checkpoint: Checkpoint) -> None:
    table = expertune.trained(load_tiny(checkpoint("qwen2_moe")))
    kinds = {row.name: row.kind for row in table.rows}
    assert kinds["mlp.shared_expert_gate"] == kinds["mlp.gate"] == "router"
    assert kinds["mlp.shared_expert.down_proj"] == "shared experts"


def test_pefts_gap_is_seen(checkpoint: Checkpoint) -> None:
    """The same names given to stock PEFT leave shared experts and dense layers out: the table says so."""
    config = lora(target_modules=["gate_proj", "up_proj", "down_proj"], target_parameters=None)
    kinds = expertune.trained(stock(checkpoint("deepseek_v3"), config)).kinds()
    assert kinds["routed experts"] > 0
    assert kinds["shared experts"] == kinds["dense layers"] == 0


def test_weights_saved_whole_are_counted_where_they_are(checkpoint: Checkpoint) -> None:
    model = stock(checkpoint("qwen3_moe"), lora(modules_to_save=["gate", "lm_head"]))
    rows: dict[str, Any] = {row.name: row for row in expertune.trained(model).rows if not row.ranks}
    assert rows["mlp.gate"].kind == "router"
    assert rows["mlp.gate"].num_parameters == 2 * E * D
    assert rows["lm_head"].kind == "other"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_adapter_gets_a_gradient(checkpoint: Checkpoint, family: str) -> None:
    """With factors as PEFT starts them: `lora_B` is zero, its gradient is not."""
    model = expertune.add_lora(load_tiny(checkpoint(family)), r=R)
    grads = run(model, batch(num_rows=4, length=30))
    assert all(grad.any() for name, grad in grads.items() if "lora_B" in name)
