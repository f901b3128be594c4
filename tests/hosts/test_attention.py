"""Transformers' models through our attention: equal to the host's eager one, and right where that one is not."""

import copy
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, PreTrainedModel

import expertune
from expertune.attention import attend as attending
from expertune.attention.sequences import Sequences
from expertune.attention.tiles import Tiles
from expertune.hosts import attention
from tests.attention.chosen import kernels_chosen
from tests.conftest import Checkpoint
from tests.families.found import families
from tests.families.tiny import tiny_model
from tests.hosts.models import SHARED, batch, load_tiny, randomize
from tests.hosts.passes import assert_equal_within, run

LENGTH = 19  # more than two windows


def gemma3(**overrides: Any) -> PreTrainedModel:
    """A dense model with sliding windows."""
    settings = SHARED | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 5}
    settings["layer_types"] = ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**settings | overrides), dtype=torch.float64)
    randomize(model)
    return model.train()


def pair(checkpoint: Checkpoint, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The host's model and ours with the same weights, all trained."""
    host = gemma3() if family == "gemma3" else load_tiny(checkpoint(family))
    if family == "gemma3":  # its eager softmax is in float32
        host.set_attn_implementation("sdpa")
    ours = gemma3() if family == "gemma3" else load_tiny(checkpoint(family))
    ours.load_state_dict(host.state_dict())
    return host, expertune.optimize(ours)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the sequences of a batch were looked for."""
    seen: list[str] = []
    for name in ("of_padding", "of_positions"):
        real = getattr(Sequences, name)

        def spy(x: Any, name: str = name, real: Any = real) -> Any:
            seen.append(name)
            return real(x)

        monkeypatch.setattr(Sequences, name, spy)
    return seen


@pytest.mark.parametrize("side", ["left", "right", "between", "none"])
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_outputs_and_gradients_are_the_host_s(checkpoint: Checkpoint, family: str, side: str) -> None:
    host, ours = pair(checkpoint, family)
    inputs = batch(length=LENGTH)
    if side == "left":
        inputs = {name: x.flip(-1) for name, x in inputs.items()}
    elif side == "between":
        inputs = {name: x.roll(-5, -1) for name, x in inputs.items()}
    elif side == "none":
        inputs["attention_mask"][:] = 1
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert_equal_within(run(ours, inputs), run(host, inputs), 1e-11)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_whole_samples_where_a_kernel_goes_beyond_sdpa(
    checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, ours = pair(checkpoint, family)
    inputs = batch(length=LENGTH)
    inputs["attention_mask"][:] = 1
    expected = run(host, inputs)
    ran = kernels_chosen(monkeypatch)
    assert_equal_within(run(ours, inputs), expected, 1e-11)
    assert not ran
    monkeypatch.setattr(attending, "BEYOND_SDPA", (Tiles(),))  # which runs here
    assert_equal_within(run(ours, inputs), expected, 1e-11)
    assert ran == ["tiles"] * ours.config.num_hidden_layers
    words = str(expertune.explain(ours))
    assert re.search("whole samples, heads of [0-9]+( over values of 8)?: tiles", words)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_packed_samples_are_as_if_alone(checkpoint: Checkpoint, family: str) -> None:
    _, ours = pair(checkpoint, family)
    ids = batch(num_rows=1, length=LENGTH)["input_ids"].clamp(min=3)
    position_ids = torch.tensor([[*range(12), *range(7)]])
    packed = ours(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    alone = [ours(input_ids=part, use_cache=False).logits for part in (ids[:, :12], ids[:, 12:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-11, atol=1e-11)


def test_sequences_are_found_once_a_step(checkpoint: Checkpoint, found: list[str]) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss", num_hidden_layers=6, layer_types=None)), memory="lean")
    inputs = batch(length=LENGTH)
    model(**{name: x.flip(-1) for name, x in inputs.items()}).loss.backward()
    assert found == ["of_padding"] * 2  # the host makes a mask for the windows and one for the rest
    found.clear()
    model(**inputs).loss.backward()
    assert found == ["of_positions"], "padding behind is as no padding"
    found.clear()
    model(input_ids=batch()["input_ids"]).logits.sum().backward()
    assert found == ["of_positions"]


def test_positions_that_are_written_again_are_read_again(checkpoint: Checkpoint) -> None:
    _, ours = pair(checkpoint, "gpt_oss")
    ids = batch(num_rows=1, length=LENGTH)["input_ids"].clamp(min=3)
    position_ids = torch.arange(LENGTH)[None]
    whole = ours(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    position_ids.copy_(torch.tensor([[*range(12), *range(7)]]))
    packed = ours(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    again = ours(input_ids=ids, position_ids=position_ids.clone(), use_cache=False).logits
    assert torch.equal(packed, again)
    assert not torch.allclose(packed, whole)
    with torch.inference_mode():
        positions = torch.tensor([[*range(12), *range(7)]])
        assert torch.equal(ours(input_ids=ids, position_ids=positions, use_cache=False).logits, again)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_generation_is_the_host_s(checkpoint: Checkpoint, family: str, cache: str) -> None:
    host, ours = pair(checkpoint, family)
    inputs = {name: x.flip(-1) for name, x in batch(length=LENGTH).items() if name != "labels"}
    outputs = [
        model.eval().generate(
            **inputs,
            max_new_tokens=9,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (host, ours)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-10, atol=1e-10)


def test_a_mask_of_the_user_s_own(checkpoint: Checkpoint) -> None:
    host, ours = pair(checkpoint, "gpt_oss")
    inputs = batch(length=LENGTH)
    allowed = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    inputs["attention_mask"] = mask
    assert_equal_within(run(ours, inputs), run(host, inputs), 1e-11)


def test_restore_gives_back_what_there_was(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("gpt_oss"))
    before = run(model, batch())
    expertune.optimize(expertune.optimize(model))
    assert model.config._attn_implementation == "expertune"
    expertune.restore(model)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), run(model, batch()).values(), strict=True))


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A layer in another's place, as PEFT copies those of `modules_to_save`: with a config of its own."""
    model.model.layers[1].self_attn = copy.deepcopy(model.model.layers[1].self_attn)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "qwen3_moe", "glm4_moe_lite"])
def test_a_copied_attention_attends_as_the_others(checkpoint: Checkpoint, family: str, is_packed: bool) -> None:
    _, ours = pair(checkpoint, family)
    inputs: dict[str, Any] = {"input_ids": batch()["input_ids"][:1].clamp(min=3), "use_cache": False}
    length = inputs["input_ids"].shape[1]
    if is_packed:
        inputs["position_ids"] = torch.cat([torch.arange(4), torch.arange(length - 4)])[None]
    inputs["labels"] = inputs["input_ids"]
    expected = run(ours, inputs)
    expertune.optimize(copied(expertune.restore(ours)))
    assert_equal_within(run(ours, inputs), expected, 1e-11)


def test_a_layer_that_is_to_attend_otherwise_keeps_the_hosts(checkpoint: Checkpoint) -> None:
    model = copied(load_tiny(checkpoint("qwen3_moe")))
    model.model.layers[1].self_attn.config._attn_implementation = "eager"  # type: ignore[union-attr]
    expertune.optimize(model)
    assert model.config._attn_implementation == "sdpa"
    assert "a config of one of its layers asks for eager" in str(expertune.explain(model))


def test_what_the_user_chose_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss")), attention="host")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("flex_attention")
    expertune.optimize(model)
    assert model.config._attn_implementation == "flex_attention"
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        expertune.optimize(model, attention="flash")


def test_it_is_saved_and_copied_as_the_host_s(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss")))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "eager"
    twin = copy.deepcopy(model)
    expertune.restore(twin)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("eager", "expertune")


def test_explain_says_whose_it_is(checkpoint: Checkpoint) -> None:
    words = str(expertune.explain(expertune.optimize(load_tiny(checkpoint("gpt_oss")))))
    assert "attention of GptOssModel: expertune" in words
    why = "hopper: needs heads of 64, 128 or 256, or of 192 over values of 128, got 8 over 8; cudnn: needs"
    assert f"windows, heads of 8: tiles ({why}" in words
    words = str(expertune.explain(expertune.optimize(load_tiny(checkpoint("qwen3_moe")))))
    said = "attention of Qwen3MoeModel: the host's sdpa, and expertune for packed samples, in memory linear in"
    assert f"{said} the length; packed samples, heads of 8: tiles ({why}" in words
    assert "Gemma3TextModel: expertune" in str(expertune.explain(expertune.optimize(gemma3())))


def test_explain_names_the_width_of_values_where_it_is_another() -> None:
    words = str(expertune.explain(expertune.optimize(tiny_model(families()["deepseek_v3"]))))
    assert "packed samples, heads of 16 over values of 8: tiles (hopper: " in words
    assert "got 16 over 8; " in words


def test_explain_where_heads_differ_from_layer_to_layer() -> None:
    if "gemma4" not in families():
        pytest.skip("this version of the host does not know it")
    words = str(expertune.explain(expertune.optimize(tiny_model(families()["gemma4"]))))
    assert words.count("windows, heads of") == 2


def test_what_ours_cannot_do_stays_with_the_host() -> None:
    settings = SHARED | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**settings))
    chunked = gemma3()
    chunked.config.layer_types = ["chunked_attention", "sliding_attention"]
    for model, why in (
        (capped, "its scores are capped"),
        (gemma3(attention_dropout=0.1), "drops attention weights"),
        (chunked, "it attends in chunks"),
    ):
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=rf"no experts in .*Model: .*{why}"):
            expertune.optimize(model)
        assert model.config._attn_implementation == before


def test_a_layer_that_asks_for_more_is_refused(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss")))
    with pytest.raises(ValueError, match="is_causal=False"):
        model(input_ids=batch()["input_ids"], is_causal=False)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_attentions_that_are_made_to_see_both_directions_are_refused(checkpoint: Checkpoint, family: str) -> None:
    _, ours = pair(checkpoint, family)
    for module in ours.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(ValueError, match=r"is_causal=False.*attention='host'"):
        ours(**batch())


def test_a_model_that_is_cut_keeps_ours(checkpoint: Checkpoint) -> None:
    """Its config names fewer layers then, and those that are left are what they were."""
    theirs, ours = pair(checkpoint, "gpt_oss")
    for model in (theirs, ours):
        run(model, batch())
        model.model.layers = model.model.layers[:1]
        model.config.layer_types, model.config.num_hidden_layers = model.config.layer_types[:1], 1
    assert_equal_within(run(ours, batch()), run(theirs, batch()), 1e-11)


def test_a_decoder_keeps_its_attention_where_one_in_both_directions_has_the_same_config(
    checkpoint: Checkpoint,
) -> None:
    """As DiffusionGemma's encoder and decoder in Transformers 5.20: the name in it says what both call."""
    model = load_tiny(checkpoint("gpt_oss"))
    other = copy.deepcopy(model.model.layers[0].self_attn)
    other.config, other.is_causal = model.model.config, False
    model.add_module("beside", other)
    expertune.optimize(model)
    assert model.model.config._attn_implementation == "eager"
    assert "one in both directions has the same config" in str(expertune.explain(model))
    del model.beside
    assert expertune.optimize(model).model.config._attn_implementation == "expertune"


CHANGES: list[dict[str, Any]] = [{"sliding_window": 3}, {"layer_types": ["full_attention", "sliding_attention"]}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_windows_that_layers_were_not_made_with_are_refused(
    checkpoint: Checkpoint, family: str, change: dict[str, Any]
) -> None:
    """The host's masks follow its config at every call, its layers what it said when they were made."""
    _, ours = pair(checkpoint, family)
    run(ours, batch())
    for name, value in change.items():
        setattr(ours.config, name, value)
    with pytest.raises(ValueError, match=r"was changed after the model was made, .*expertune\.optimize\(model\) again"):
        ours(**batch())


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("was_ours", [False, True])
def test_other_windows_than_its_config_s_keep_the_hosts_attention(
    checkpoint: Checkpoint, was_ours: bool, change: dict[str, Any]
) -> None:
    host, ours = (load_tiny(checkpoint("gpt_oss")) for _ in range(2))
    if was_ours:
        expertune.optimize(ours)
    for model, (name, value) in product((host, ours), change.items()):
        setattr(model.config, name, value)
    expertune.optimize(ours)
    assert not attention.is_ours(ours.model)
    assert_equal_within(run(ours, batch()), run(host, batch()), 1e-11)
