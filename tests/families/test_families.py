"""Each family of the installed Transformers, through the walk against its own eager code."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import expertune
from tests.families import proof
from tests.families.found import families, family, outside, with_experts
from tests.families.tiny import OVERRIDES, tiny_config, tiny_model
from tests.numerics import assert_no_worse

ROUNDING = 1e-11
RECOMPUTED = 1e-6  # in float32
UNDIFFERENTIABLE = {("diffusion_gemma", "reentrant")}
NO_SEVERAL = {
    "diffusion_gemma": "takes canvases of one length",
    "qwen3_omni_moe_thinker": "the config of the thinker alone lacks a token that a mask asks for",
}
NO_GENERATION = {
    "diffusion_gemma": "draws noise for every token",
    "qwen3_omni_moe_thinker": "the config of the thinker alone lacks a token that generation asks for",
}
# PEFT renames the adapters of these on shared experts or dense layers when it reads them, and so does not find them.
LOST = {"deepseek_ocr2", "laguna", "mistral_large4", "unlimited_ocr"}
# Families outside Transformers' experts interface, and the first module that `optimize` refuses them for.
OUTSIDE = {
    "dbrx": r"experts \(DbrxExperts\)",
    "doge": r"\(DogeCDMoE\)",
    "jetmoe": r"model\.layers\.0\.mlp \(JetMoeMoE\)",
    "longcat_flash": r"model\.layers\.0\.mlp \(LongcatFlashMoE\)",
    "nllb_moe": r"encoder\.layers\.3\.ffn\.experts \(NllbMoeExperts\)",
    "step3p7": r"model\.language_model\.layers\.3\.mlp \(Step3p7SparseMoeBlock\)",
    "switch_transformers": r"encoder\.block\.1\.layer\.1\.mlp\.experts \(SwitchTransformersExperts\)",
}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = tiny_model(families()[request.param])
    assert proof.experts_of(made), "the tiny model has no experts"
    return made


each = pytest.mark.parametrize("model", families(), indirect=True)
# a kind of layer each, for what every family is tested for in parts, or in another way
WHOLE = {"qwen3_moe", "qwen3_next", "gpt_oss", "glm4_moe_lite", "deepseek_v4", "llama4", "gemma4", "nemotron_h"}
whole = pytest.mark.parametrize(
    "model",
    [pytest.param(name, marks=() if name in WHOLE else pytest.mark.thorough) for name in families()],
    indirect=True,
)


@each
def test_full_fine_tuning(model: PreTrainedModel) -> None:
    difference, name = proof.full_fine_tuning(model)
    assert difference <= ROUNDING, f"{name}: {difference:.3g}"


@pytest.mark.parametrize("kind", [proof.packed, proof.padded])
@each
def test_several_samples(model: PreTrainedModel, kind: Callable[[PreTrainedModel], tuple[float, str]]) -> None:
    if model.config.model_type in NO_SEVERAL:
        pytest.skip(NO_SEVERAL[model.config.model_type])
    difference, name = kind(model)
    assert difference <= ROUNDING, f"{name}: {difference:.3g}"


@each
def test_lora_is_stock_pefts(model: PreTrainedModel) -> None:
    difference, name = proof.lora(model)
    assert difference <= ROUNDING, f"{name}: {difference:.3g}"


@each
def test_experts_on_grouped_mm_are_no_worse_than_the_hosts(model: PreTrainedModel) -> None:
    for name, (ours, plain, truth) in proof.experts_in_float32(model, "grouped_mm").items():
        assert_no_worse(ours, plain, truth, name)


@whole
def test_the_whole_on_grouped_mm_is_as_close_as_the_host(model: PreTrainedModel) -> None:
    """Layers amplify the rounding of those before them, another rounding otherwise: the same order, not the same."""
    ours, theirs = proof.in_float32(model, "grouped_mm")
    assert ours <= 4 * theirs


@each
def test_adapters_by_the_usual_names_reach_every_expert_and_travel(model: PreTrainedModel, tmp_path: Path) -> None:
    if model.config.model_type not in LOST:
        difference, name = proof.by_usual_names(model, tmp_path)
        assert difference <= ROUNDING, f"{name}: {difference:.3g}"
        return
    with pytest.warns(UserWarning, match=r"will not find \d+ of this adapter's tensors again") as told:
        difference, name = proof.by_usual_names(model, tmp_path)
    assert difference > ROUNDING, "PEFT reads this one now"
    assert len({each.lineno for each in told if "will not find" in str(each.message)}) == 2, "and by `optimize` alone"


@pytest.mark.parametrize("kind", ["auto", "not reentrant"])
@each
def test_gradient_checkpointing_changes_nothing(model: PreTrainedModel, kind: str) -> None:
    _check_checkpointing(model, kind)


@whole
def test_reentrant_gradient_checkpointing_changes_nothing(model: PreTrainedModel) -> None:
    _check_checkpointing(model, "reentrant")


def _check_checkpointing(model: PreTrainedModel, kind: str) -> None:
    if not model.supports_gradient_checkpointing:
        pytest.skip("this model has none")
    if (model.config.model_type, kind) in UNDIFFERENTIABLE:
        pytest.skip("the host's reentrant checkpoint does not carry this model's gradient")
    difference, name = proof.checkpointed(model, kind)
    assert difference <= RECOMPUTED, f"{name}: {difference:.3g}"


@each
def test_generation_is_the_hosts(model: PreTrainedModel) -> None:
    if not model.can_generate() or model.config.model_type in NO_GENERATION:
        pytest.skip(NO_GENERATION.get(model.config.model_type, "this model does not generate"))
    ours, theirs = proof.generated(model)
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (logits, expected) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(logits, expected, rtol=ROUNDING, atol=ROUNDING, msg=f"token {step}")


@pytest.mark.parametrize("name", OUTSIDE)
def test_experts_in_another_form_are_refused_in_words(name: str) -> None:
    if name not in outside():
        pytest.skip("this version of the host does not know it")
    if name == "dbrx" and version("transformers") < "5.24":
        pytest.skip("this version's config does not read what it writes")
    with torch.device("meta"):
        model = family(name).auto.from_config(tiny_config(family(name)))
    with pytest.raises(ValueError, match=OUTSIDE[name]):
        expertune.optimize(model)
    assert "not optimized" in str(expertune.explain(model))


newest = pytest.mark.skipif(version("transformers") < "5.24", reason="older versions have fewer families")


@newest
def test_every_family_is_built() -> None:
    assert list(with_experts()) == list(families())
    assert list(outside()) == list(OUTSIDE)


@newest
def test_nothing_is_listed_that_is_not_there() -> None:
    assert OVERRIDES.keys() <= families().keys() | OUTSIDE.keys()
    assert not OUTSIDE.keys() & families().keys()
