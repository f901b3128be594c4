"""What PEFT does to an adapter later: several, switched, disabled, merged, deleted, frozen. As stock PEFT does it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import EXPERTS, lora, several_adapters, stock, wrap
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, logits, run

ROUNDING = 1e-12
Pair = tuple[PeftModel, PeftModel]


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "llama4_text"])
def pair(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Pair:
    """The same adapted model twice: stock PEFT's, and ours."""
    theirs, ours = (stock(checkpoint(request.param), lora()) for _ in range(2))
    return theirs, expertune.optimize(ours)


def _add_second(model: PeftModel) -> None:
    torch.manual_seed(4)
    model.add_adapter("second", lora(r=3, lora_alpha=7))


ACTIVE: dict[str, Callable[[PeftModel], Any]] = {
    "the first": lambda model: None,
    "the second": lambda model: model.set_adapter("second"),
    "both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "the second, after a pass": lambda model: (model(**batch()), model.set_adapter("second")),
    "the second deleted": lambda model: model.delete_adapter("second"),
    "the first deleted": lambda model: model.delete_adapter("default"),
    "both added to a third": lambda model: (
        model.add_weighted_adapter(["default", "default"], [0.5, 0.25], "third", combination_type="linear"),
        model.set_adapter("third"),
    ),
}


@several_adapters
@pytest.mark.parametrize("choose", ACTIVE.values(), ids=ACTIVE)
def test_several_adapters(pair: Pair, walks: list[str], choose: Callable[[PeftModel], Any]) -> None:
    before = logits(pair[1])
    for model in pair:
        _add_second(model)
    refusals = []
    for model in pair:
        try:
            choose(model)
        except (ValueError, NotImplementedError, TypeError) as refusal:  # what stock PEFT refuses, so do we
            refusals.append(str(refusal))
    assert not refusals or len(refusals) == 2
    walks.clear()
    theirs, ours = (run(model, batch()) for model in pair)
    assert_equal_within(ours, theirs, ROUNDING)
    assert walks
    if choose in (ACTIVE["the second"], ACTIVE["both"]):
        assert not torch.allclose(ours["logits"], before["logits"], atol=1e-3)


def test_an_adapter_added_after_all_were_deleted(pair: Pair, walks: list[str]) -> None:
    """PEFT then wraps what is left of the first, and may target other parameters."""
    for model in pair:
        model.delete_adapter("default")
        torch.manual_seed(4)
        model.add_adapter("second", lora(r=3, target_parameters=EXPERTS[1:]))
        model.set_adapter("second")
    assert_equal_within(run(pair[1], batch()), run(pair[0], batch()), ROUNDING)
    assert walks


def test_a_disabled_adapter_does_nothing(pair: Pair, checkpoint: Checkpoint, walks: list[str]) -> None:
    base = logits(pair[0].unload())
    with pair[1].disable_adapter():
        assert_equal_within(logits(pair[1]), base, ROUNDING)
        assert "disabled" in str(expertune.explain(pair[1]))
    assert not torch.allclose(logits(pair[1])["logits"], base["logits"], atol=1e-3)
    assert walks


def test_merging_and_unmerging(pair: Pair, walks: list[str]) -> None:
    for model in pair:
        model.merge_adapter()
    theirs = logits(pair[0])
    assert_equal_within(logits(pair[1]), theirs, ROUNDING)
    assert "merged" in str(expertune.explain(pair[1]))
    for name, parameter in pair[0].named_parameters():
        assert torch.equal(pair[1].get_parameter(name), parameter)
    for model in pair:
        model.unmerge_adapter()
    unmerged = logits(pair[1])
    assert_equal_within(unmerged, logits(pair[0]), ROUNDING)
    assert_equal_within(unmerged, theirs, 1e-10)
    assert walks


def test_disabling_a_merged_adapter_unmerges_it(pair: Pair) -> None:
    base = logits(expertune.restore(pair[0]).unload())
    pair[1].merge_adapter()
    with pair[1].disable_adapter():
        assert_equal_within(logits(pair[1]), base, 1e-10)


def test_disabling_a_merged_adapter_on_a_linears_weight_unmerges_it_before_it_is_used(checkpoint: Checkpoint) -> None:
    """How `add_lora` reaches shared experts, whose names PEFT takes for the routed ones."""
    config = lora(target_modules=[], target_parameters=["mlp.shared_experts.up_proj.weight"])
    theirs, ours = (stock(checkpoint("glm4_moe_lite"), config) for _ in range(2))
    base = logits(theirs.unload())
    expertune.optimize(ours).merge_adapter()
    with ours.disable_adapter():
        assert_equal_within(logits(ours), base, 1e-10)


@several_adapters
@pytest.mark.parametrize("names", [None, ["second"], ["default", "second"]], ids=str)
def test_merge_and_unload_equals_stock(pair: Pair, walks: list[str], names: list[str] | None) -> None:
    for model in pair:
        _add_second(model)
    adapted = logits(pair[1])
    theirs, ours = (model.merge_and_unload(adapter_names=names) for model in pair)
    for (path, module), (their_path, their_module) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert (path, type(module)) == (their_path, type(their_module))
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    walks.clear()
    assert_equal_within(logits(ours), logits(theirs), ROUNDING)
    assert walks
    if names is None:
        assert_equal_within(logits(ours), adapted, 1e-10)
    walks.clear()
    assert_equal_within(logits(expertune.restore(ours)), logits(theirs), 0)
    assert not walks


def test_unloading_leaves_the_base_model_running_through_the_walk(pair: Pair, walks: list[str]) -> None:
    theirs, ours = (model.unload() for model in pair)
    assert_equal_within(logits(ours), logits(theirs), ROUNDING)
    assert walks


def test_wrapped_again_under_the_same_name(pair: Pair, walks: list[str]) -> None:
    theirs, ours = (wrap(model.unload(), lora(r=2), seed=5) for model in pair)
    assert_equal_within(run(ours, batch()), run(theirs, batch()), ROUNDING)
    assert walks


def test_a_frozen_adapter_counts_and_gets_no_gradient(pair: Pair) -> None:
    """The router and one layer's down adapter are trained, all other factors are not."""
    for model in pair:
        for name, parameter in model.named_parameters():
            is_router = name.endswith((".mlp.gate.weight", ".router.weight"))
            parameter.requires_grad_(is_router or ("layers.0." in name and ".experts.lora_" in name))
    theirs, ours = (run(model, batch()) for model in pair)
    assert_equal_within(ours, theirs, ROUNDING)
    assert len(ours) == 2 + 2 + 2
    silent = [name for name, p in pair[1].named_parameters() if not p.requires_grad and p.grad is not None]
    assert not silent


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_trained_factor_of_two(pair: Pair, factor: str) -> None:
    for model in pair:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(factor in name)
    assert_equal_within(run(pair[1], batch()), run(pair[0], batch()), ROUNDING)


def test_other_peft_methods_beside_the_walk(checkpoint: Checkpoint, walks: list[str]) -> None:
    """A LoHa on the attention: nothing on the experts to consume, and `optimize` takes the model all the same."""
    from peft import LoHaConfig, PrefixTuningConfig

    for config in (
        LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        theirs, ours = load_tiny(checkpoint("qwen3_moe")), load_tiny(checkpoint("qwen3_moe"))
        torch.manual_seed(3)
        theirs = get_peft_model(theirs, config)
        torch.manual_seed(3)
        ours = expertune.optimize(get_peft_model(ours, config))
        walks.clear()
        assert_equal_within(run(ours, batch()), run(theirs, batch()), ROUNDING)
        assert walks


def test_a_mixed_model_is_refused_in_words(checkpoint: Checkpoint) -> None:
    model = get_peft_model(load_tiny(checkpoint("qwen3_moe")), lora(target_parameters=None), mixed=True)
    assert isinstance(model, PeftMixedModel)
    with pytest.raises(ValueError, match="expected a Transformers or PEFT model, got PeftMixedModel"):
        expertune.optimize(model)
