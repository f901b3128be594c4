"""Adapters on disk: written here and read by stock PEFT, the reverse, and files of other layouts: right or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import EXPERTS, lora, several_adapters, stock
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import assert_equal_within, logits

ROUNDING = 1e-12


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_written_here_read_by_stock_peft(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    folder = checkpoint(family)
    torch.manual_seed(0)
    ours = expertune.add_lora(load_tiny(folder), r=3, init_lora_weights=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(load_tiny(folder), tmp_path / "ours")
    assert_equal_within(logits(theirs), logits(ours), ROUNDING)
    # nothing that was trained is missing on disk
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert sum(torch.Size(shape).numel() for shape in _shapes(tmp_path / "ours").values()) == trained
    theirs.save_pretrained(tmp_path / "theirs")
    assert _shapes(tmp_path / "theirs") == _shapes(tmp_path / "ours")
    names = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert names[0].keys() == names[1].keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_written_by_stock_peft_read_here(checkpoint: Checkpoint, tmp_path: Path, walks: list[str], family: str) -> None:
    folder = checkpoint(family)
    theirs = stock(folder, lora(use_rslora=True, rank_pattern={r".*experts\.down_proj": 2}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(expertune.optimize(load_tiny(folder)), tmp_path / "theirs")
    assert_equal_within(logits(ours), logits(theirs), ROUNDING)
    assert walks
    ours.save_pretrained(tmp_path / "ours")
    assert _shapes(tmp_path / "ours") == _shapes(tmp_path / "theirs")
    saved = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[1])


def test_saved_factors_have_the_documented_layout(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expertune.optimize(stock(checkpoint("qwen3_moe"), lora())).save_pretrained(tmp_path)
    shapes = _shapes(tmp_path)
    block = "base_model.model.model.layers.0.mlp.experts."
    assert shapes[f"{block}base_layer.lora_A.weight"] == (8 * 4, 32)
    assert shapes[f"{block}base_layer.lora_B.weight"] == (2 * 24, 8 * 4)
    assert shapes[f"{block}lora_A.weight"] == (8 * 4, 24)
    assert shapes[f"{block}lora_B.weight"] == (32, 8 * 4)


def _swap_layout(folder: Path, version: str | None) -> None:
    """Rewrite an adapter as PEFT before 0.19 wrote it: input and output of the experts swapped."""
    factors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith("lora_A.weight") and ".experts." in key]:
        twin = key.replace("lora_A", "lora_B")
        factors[key], factors[twin] = factors[twin].T.contiguous(), factors[key].T.contiguous()
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["peft_version"] = version
    if version is None:
        del config["peft_version"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


SQUARE: dict[str, Any] = {"moe_intermediate_size": 16}  # gate_up is 32 × 32: the shapes say nothing


def _old_adapter(checkpoint: Checkpoint, folder: Path, version: str | None, **settings: Any) -> Path:
    base = checkpoint("qwen3_moe", **SQUARE)
    stock(base, lora(target_modules=[], target_parameters=EXPERTS[:1], **settings)).save_pretrained(folder)
    _swap_layout(folder, version)
    return base


def test_a_square_adapter_of_peft_0_18_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = _old_adapter(checkpoint, tmp_path, "0.18.1")
    words = r"'default' was written by PEFT 0\.18\.1.*input and output swapped.*Merge it with the PEFT that wrote it"
    stock_model = PeftModel.from_pretrained(load_tiny(base), tmp_path)  # PEFT takes it without a word
    before = fingerprint(stock_model)
    with pytest.raises(ValueError, match=words):
        expertune.optimize(stock_model)
    assert fingerprint(stock_model) == before
    late = PeftModel.from_pretrained(expertune.optimize(load_tiny(base)), tmp_path)
    with pytest.raises(ValueError, match=words):
        late(**batch())
    with pytest.raises(ValueError, match=words):  # and again, not only at the first try
        late(**batch())


@several_adapters
def test_an_old_adapter_beside_a_good_one_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Loaded into wrappers that the walk has taken in already."""
    base = _old_adapter(checkpoint, tmp_path, "0.18.1")
    config = lora(target_modules=[], target_parameters=EXPERTS[:1])
    model = expertune.optimize(stock(base, config))
    model(**batch())
    model.load_adapter(tmp_path, "old")
    with pytest.raises(ValueError, match=r"'old' was written by PEFT 0\.18\.1"):
        model(**batch())
    model.delete_adapter("old")
    assert_equal_within(logits(model), logits(stock(base, config)), ROUNDING)


@pytest.mark.parametrize("version", ["0.19.0", "0.18.1", "0.17.0", None])
@pytest.mark.parametrize("is_square", [True, False])
def test_load_refuses_an_old_adapter_before_peft_reads_it(
    checkpoint: Checkpoint, tmp_path: Path, version: str | None, is_square: bool
) -> None:
    """Also one whose shapes do not fit, and PEFT 0.17, which wrote no version."""
    if is_square:
        _old_adapter(checkpoint, tmp_path, version)
    else:
        stock(checkpoint("qwen3_moe"), lora()).save_pretrained(tmp_path)
        _swap_layout(tmp_path, version)
    with pytest.raises(ValueError, match=r"was written by PEFT 0\.1.*input and output swapped"):
        expertune.load(str(tmp_path))


def test_old_adapters_whose_layout_never_changed_are_taken(
    checkpoint: Checkpoint, tmp_path: Path, walks: list[str]
) -> None:
    """gpt-oss keeps its weights transposed; attention was never affected."""
    for family, settings in (("gpt_oss", {}), ("qwen3_moe", {"target_parameters": None})):
        theirs = stock(checkpoint(family), lora(**settings))
        theirs.save_pretrained(tmp_path / family)
        path = tmp_path / family / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.18.1"}))
        ours = PeftModel.from_pretrained(expertune.optimize(load_tiny(checkpoint(family))), tmp_path / family)
        assert_equal_within(logits(ours), logits(theirs), ROUNDING)
    assert walks


def _write_per_expert(folder: Path, base: Path) -> dict[str, Tensor]:
    """An adapter as PEFT 0.17 wrote it for a model of Transformers 4: two-dimensional factors for every expert."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer in range(2):
        for expert in range(8):
            for name, (width_in, width_out) in {
                "gate_proj": (32, 24),
                "up_proj": (32, 24),
                "down_proj": (24, 32),
            }.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                for factor, shape in (("lora_A", (3, width_in)), ("lora_B", (width_out, 3))):
                    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                    factors[f"{key}.{factor}.weight"] = noise
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": "0.17.1",
        "base_model_name_or_path": str(base),
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


def _merged_by_hand(base: Path, factors: dict[str, Tensor]) -> nn.Module:
    model = load_tiny(base)
    with torch.no_grad():
        for layer in range(2):
            experts: Any = model.model.layers[layer].mlp.experts
            for expert in range(8):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (
                    2.0 * factors[f"{key}.{name}.lora_B.weight"] @ factors[f"{key}.{name}.lora_A.weight"]
                    for name in ("gate_proj", "up_proj", "down_proj")
                )
                experts.gate_up_proj[expert] += torch.cat([gate, up])
                experts.down_proj[expert] += down
    return model


def test_an_adapter_per_expert_of_transformers_4_is_right(
    checkpoint: Checkpoint, tmp_path: Path, walks: list[str]
) -> None:
    """PEFT 0.21 fuses such an adapter while loading; what it was written by then no longer says how it lies."""
    base = checkpoint("qwen3_moe")
    truth = logits(_merged_by_hand(base, _write_per_expert(tmp_path, base)))
    loaded = PeftModel.from_pretrained(load_tiny(base), tmp_path)
    assert_equal_within(logits(loaded), truth, 1e-10)
    assert_equal_within(logits(expertune.optimize(loaded)), truth, 1e-10)
    model, _ = expertune.load(str(tmp_path), dtype=torch.float64, memory="fast")
    assert_equal_within(logits(model.train().cpu()), truth, 1e-10)
    assert walks


def test_peft_0_19_0_alone_swapped_transposed_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stock(checkpoint("gpt_oss"), lora()).save_pretrained(tmp_path)
    _swap_layout(tmp_path, "0.19.0")
    with pytest.raises(ValueError, match=r"was written by PEFT 0\.19\.0.*input and output swapped"):
        expertune.load(str(tmp_path))
