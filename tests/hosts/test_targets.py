"""Names of what to train: which weights they reach in each family, by hand-written lists, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import expertune
from expertune.hosts.targets import resolve
from expertune.hosts.transformers import named_experts
from tests.conftest import Checkpoint
from tests.families import found
from tests.families.tiny import tiny_model
from tests.hosts.adapters import lora, wrap
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run

MLP = ["gate_proj", "up_proj", "down_proj"]
ROUTED = ["experts.gate_up_proj", "experts.down_proj"]
DENSE = [f"0.mlp.{name}" for name in MLP]
GQA = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLA = [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]


def _paths(*names: str, layers: tuple[int, ...] = (0, 1), below: str = "") -> list[str]:
    return [f"{layer}.{below}{name}" for layer in layers for name in names]


_SPARSE_SECOND = [
    *DENSE,
    *_paths(*ROUTED, layers=(1,), below="mlp."),
    *_paths(*MLP, layers=(1,), below="mlp.shared_experts."),
]
_QWEN2 = [
    *DENSE,
    *_paths(*ROUTED, layers=(1,), below="mlp."),
    *_paths(*MLP, layers=(1,), below="mlp.shared_expert."),
]
FEED_FORWARD: dict[str, list[str]] = {
    "qwen3_moe": _paths(*ROUTED, below="mlp."),
    "gpt_oss": _paths(*ROUTED, below="mlp."),
    "glm4_moe_lite": _SPARSE_SECOND,
    "deepseek_v3": _SPARSE_SECOND,
    "qwen2_moe": _QWEN2,
    "mixtral": _paths(*ROUTED, below="mlp."),
    "gemma3_text": _paths(*MLP, below="mlp."),
}
ATTENTION = dict.fromkeys(FEED_FORWARD, GQA) | dict.fromkeys(("glm4_moe_lite", "deepseek_v3"), MLA)
ROUTER = {"gpt_oss": "router"}


def _adapted(model: torch.nn.Module) -> list[str]:
    return sorted(path.removeprefix("model.layers.") for path in expertune.trained(model).adapted)


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_feed_forward_names_reach_every_part(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    folder = checkpoint(family)
    names = ["w1", "w2", "w3"] if family == "mixtral" else MLP
    torch.manual_seed(0)
    model = expertune.add_lora(load_tiny(folder), r=4, target_modules=names, init_lora_weights=False)
    assert _adapted(model) == sorted(FEED_FORWARD[family])
    ours = run(model, batch())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ours.keys() - {"logits", "loss"}
    assert all(ours[name].any() for name in trained)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(load_tiny(folder), tmp_path, is_trainable=True)
    assert_equal_within(ours, run(stock, batch()), 1e-12)


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_all_linear_is_all_but_router_and_head(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.add_lora(load_tiny(checkpoint(family)), target_modules="all-linear")
    assert _adapted(model) == sorted(FEED_FORWARD[family] + _paths(*ATTENTION[family]))
    assert expertune.trained(model).kinds()["router"] == 0


@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("aria", {"model.vision_tower", "model.multi_modal_projector"}),
        ("minimax_m3_vl", {"model.vision_tower", "model.multi_modal_projector"}),  # with an indexer, too
        ("glm_moe_dsa", set()),
        ("nemotron_h", set()),  # of which PEFT refuses out_proj
    ],
)
def test_all_linear_is_what_text_trains(model_type: str, left: set[str]) -> None:
    """Neither what lies beside the language model nor what chooses tokens for its attention, which has no gradient."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {model_type}")
    auto = AutoModelForImageTextToText if left else AutoModelForCausalLM
    model = tiny_model(found.Family(model_type, model_type, auto))
    if not any(named_experts(model)):
        pytest.skip(f"the experts of this Transformers' {model_type} are not marked")
    assert set(resolve(model, "all-linear").left) == left
    adapted = expertune.add_lora(expertune.optimize(model), r=2, init_lora_weights=False)
    run(adapted, batch())  # in which each has a gradient


@pytest.mark.parametrize("requested", ["all-linear", ["q_proj", "o_proj"]])
def test_modules_beside_that_are_called_alike_are_not_named(requested: Any) -> None:
    """Those of this model's tower are no linears, but hold some: PEFT would be told to adapt them, and refuse."""
    if "diffusion_gemma" not in CONFIG_MAPPING:
        pytest.skip("this Transformers has no diffusion_gemma")
    try:
        model = tiny_model(found.family("diffusion_gemma"))
    except ValueError as error:
        if "NoneType" not in str(error):
            raise
        pytest.skip("this Transformers builds its tower from no config")
    targets = resolve(model, requested)
    named = {path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{t}") for t in targets.modules)}
    assert named
    assert named <= targets.paths


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_attention_alone(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    names = [path.split(".")[1] for path in ATTENTION[family]]
    model = expertune.add_lora(load_tiny(checkpoint(family)), target_modules=names, lora_dropout=0.1)
    assert _adapted(model) == sorted(_paths(*ATTENTION[family]))
    model(**batch())
    assert bool(walks) == (family != "gemma3_text")


@pytest.mark.parametrize("family", [name for name in FEED_FORWARD if name != "gemma3_text"])
def test_the_router_by_its_own_name(checkpoint: Checkpoint, family: str) -> None:
    name = ROUTER.get(family, "gate")
    model = expertune.add_lora(load_tiny(checkpoint(family)), target_modules=["o_proj", name], init_lora_weights=False)
    layers = (0, 1) if family in ("qwen3_moe", "gpt_oss", "mixtral") else (1,)
    assert _adapted(model) == sorted(_paths("self_attn.o_proj") + _paths(f"mlp.{name}", layers=layers))
    assert expertune.trained(model).kinds()["router"] > 0
    router = model.get_submodule(f"base_model.model.model.layers.1.mlp.{name}")
    if hasattr(router.base_layer, "e_score_correction_bias") and not hasattr(router, "e_score_correction_bias"):
        pytest.skip("this host's block reads the router's bias from a wrapper that does not answer for it")
    run(model, batch())


NARROW: dict[str, tuple[list[str], list[str]]] = {
    "fused name": (["gate_up_proj"], ["1.mlp.experts.gate_up_proj"]),
    "routed only": (["experts.down_proj"], ["1.mlp.experts.down_proj"]),
    "shared only": (["shared_experts.down_proj"], ["1.mlp.shared_experts.down_proj"]),
    "dense only": (["mlp.down_proj"], ["0.mlp.down_proj"]),
    "down everywhere": (
        ["down_proj"],
        ["0.mlp.down_proj", "1.mlp.experts.down_proj", "1.mlp.shared_experts.down_proj"],
    ),
    "one layer": (
        ["layers.1.self_attn.o_proj", "layers.1.mlp.experts.down_proj"],
        ["1.mlp.experts.down_proj", "1.self_attn.o_proj"],
    ),
    "a full path": (["model.layers.0.self_attn.o_proj"], ["0.self_attn.o_proj"]),
    "a name twice": (["o_proj", "o_proj", "self_attn.o_proj"], ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
}


@pytest.mark.parametrize(("names", "expected"), NARROW.values(), ids=NARROW)
def test_dotted_names_reach_that_part_alone(checkpoint: Checkpoint, names: list[str], expected: list[str]) -> None:
    model = expertune.add_lora(load_tiny(checkpoint("deepseek_v3")), target_modules=names)
    assert _adapted(model) == expected


def test_one_layer_of_experts_among_several(checkpoint: Checkpoint) -> None:
    model = expertune.add_lora(load_tiny(checkpoint("qwen3_moe")), target_modules=["layers.1.mlp.experts.gate_up_proj"])
    assert _adapted(model) == ["1.mlp.experts.gate_up_proj"]


def test_parameters_beside_names(checkpoint: Checkpoint) -> None:
    model = expertune.add_lora(
        load_tiny(checkpoint("qwen3_moe")), target_modules=["o_proj"], target_parameters=["layers.0.mlp.gate.weight"]
    )
    assert _adapted(model) == ["0.mlp.gate", "0.self_attn.o_proj", "1.self_attn.o_proj"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "matches nothing": (
        {"target_modules": ["o_proj", "query", "fc1"]},
        r"\['query', 'fc1'\] match nothing in this model. It has \[.*'gate_up_proj'.*'o_proj'",
    ),
    "gate without up": ({"target_modules": ["gate_proj", "down_proj"]}, "'gate_proj' without 'up_proj'.*Name both"),
    "up without gate": ({"target_modules": ["up_proj"]}, "'up_proj' without 'gate_proj'.*Name both"),
    "w1 without w3": ({"target_modules": ["w1", "w2"]}, "'w1' without 'w3'"),
    "no names": ({"target_modules": []}, "target_modules is empty"),
    "regular expression": ({"target_modules": ".*_proj"}, "a list of names or 'all-linear', got the string"),
    "dropout": ({"lora_dropout": 0.05}, "lora_dropout=0.05 cannot be used on experts"),
    "DoRA": ({"use_dora": True}, "use_dora=True cannot be used on experts"),
    "another's setting": ({"random_state": 1}, "LoraConfig takes, which has no random_state"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa cannot be used on experts"),
    "LoRA bias": ({"lora_bias": True}, "lora_bias=True cannot be used on experts"),
    "layers_to_transform": ({"layers_to_transform": [1]}, r"layers_to_transform.*layers\.0\.self_attn"),
    "the first layer": ({"layers_to_transform": 0}, "layers_to_transform"),
    "exclude_modules": ({"exclude_modules": ["o_proj"]}, "exclude_modules"),
    "rank zero": ({"r": 0}, "r must be at least 1, got 0"),
    "parameter that is not there": ({"target_parameters": ["mlp.experts.w1"]}, r"mlp\.experts\.w1.*match nothing"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("was_optimized", [False, True])
def test_what_cannot_be_trained_is_refused_and_changes_nothing(
    checkpoint: Checkpoint, arguments: dict[str, Any], words: str, was_optimized: bool
) -> None:
    model = load_tiny(checkpoint("qwen3_moe"))
    if was_optimized:
        expertune.optimize(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        expertune.add_lora(model, **arguments)
    assert fingerprint(model) == before


def test_a_second_add_lora_is_refused(checkpoint: Checkpoint) -> None:
    model = expertune.add_lora(load_tiny(checkpoint("qwen3_moe")))
    with pytest.raises(ValueError, match=r"has adapters already.*model\.add_adapter"):
        expertune.add_lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        expertune.add_lora(model.get_base_model())


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_patterns_reach_every_part_of_their_name(checkpoint: Checkpoint, family: str) -> None:
    """Those of dense layers and shared experts, too, which PEFT adapts by their weights, and knows by another name."""
    settings = {"rank_pattern": {"down_proj": 2, r"self_attn\.o_proj": 5}, "alpha_pattern": {"down_proj": 7}}
    model = expertune.add_lora(load_tiny(checkpoint(family)), r=4, lora_alpha=8, **settings)
    seen: dict[str, set[int]] = {}
    for row in expertune.trained(model).rows:
        seen.setdefault(row.name.rpartition(".")[2], set()).update(row.ranks)
    assert (seen["down_proj"], seen["o_proj"], seen["gate_up_proj"]) == ({2}, {5}, {4})
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers if layer.r["default"] == 2} == {7 / 2}


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(checkpoint: Checkpoint, setting: str) -> None:
    """The experts hold gate and up as one."""
    with pytest.raises(ValueError, match=f"{setting} names 'gate_proj', which matches nothing .* mlp.experts.gate_up"):
        expertune.add_lora(load_tiny(checkpoint("qwen3_moe")), **{setting: {"gate_proj": 8}})


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_none_is_refused(checkpoint: Checkpoint, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"{setting} names '\*q_proj', which is no regular expression \(nothing to"):
        expertune.add_lora(load_tiny(checkpoint("qwen3_moe")), **{setting: {"*q_proj": 8}})


def test_stock_pefts_own_refusals_stand(checkpoint: Checkpoint) -> None:
    """A user's own config with dropout or DoRA on experts never gets past PEFT."""
    for settings in ({"lora_dropout": 0.1}, {"use_dora": True}):
        model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
        with pytest.raises(ValueError, match="ParamWrapper does not work with"):
            wrap(model, lora(**settings))
