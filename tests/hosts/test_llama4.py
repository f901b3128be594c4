"""Llama 4, whose experts are called by their block in another way: what is particular to it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import expertune
from expertune.experts import experts
from expertune.hosts import llama4, transformers
from expertune.shapes import Dispatch
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock, wrap
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import CONFIGS, SHARED, batch, load_tiny, randomize
from tests.hosts.passes import BACKENDS, assert_equal_within, run

ROUNDING = 1e-12


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if llama4.is_block(module)]


@pytest.mark.parametrize("top_k", [1, 3])
def test_only_chosen_experts_are_computed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    num_rows = []

    def spy(x: Any, routing: Dispatch, *others: Any, **keywords: Any) -> Any:
        num_rows.append(routing.shape.num_rows)
        return experts(x, routing, *others, **keywords)

    monkeypatch.setattr(transformers, "experts", spy)
    inputs = batch()
    expertune.optimize(load_tiny(checkpoint("llama4_text", num_experts_per_tok=top_k)))(**inputs)
    assert num_rows == [top_k * inputs["input_ids"].numel()] * 2


@pytest.mark.parametrize("top_k", [1, 3])
def test_scores_that_underflow_are_the_hosts(checkpoint: Checkpoint, walks: list[str], top_k: int) -> None:
    """All of a token's scores may be zero: then nothing of its experts counts, in either direction."""
    host, ours = (load_tiny(checkpoint("llama4_text", num_experts_per_tok=top_k)) for _ in range(2))
    for model in (host, ours):
        for block in _blocks(model):
            weight_ED = block.router.weight.data
            weight_ED.copy_(weight_ED[:1] * torch.linspace(100, 110, len(weight_ED))[:, None])  # all of one sign
    truth = run(host, batch())
    num_chosen = (_blocks(host)[0].router(torch.randn(50, SHARED["hidden_size"]).double())[0] != 0).sum(1)
    assert {0, top_k} <= set(num_chosen.tolist())
    assert_equal_within(run(expertune.optimize(ours, backend="native_torch"), batch()), truth, ROUNDING)
    assert walks


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_on_every_backend(checkpoint: Checkpoint, walks: list[str], backend: str) -> None:
    """In float32, with a router that is trained: PEFT takes these experts' input for their output."""
    config = lora(target_parameters=["experts.gate_up_proj", "experts.down_proj", "router.weight"])
    theirs = stock(checkpoint("llama4_text"), config)
    ours = wrap(load_tiny(checkpoint("llama4_text"), torch.float32), config)
    ours.load_state_dict(theirs.state_dict())
    truth = {name: value.float() for name, value in run(theirs, batch()).items()}
    assert_equal_within(run(expertune.optimize(ours, backend=backend), batch()), truth, 1e-4)
    assert walks == [backend] * 2


def test_the_router_is_trained_by_its_name(checkpoint: Checkpoint) -> None:
    ours = expertune.add_lora(load_tiny(checkpoint("llama4_text")), target_modules=["router", "down_proj"])
    assert expertune.trained(ours).kinds()["router"] > 0
    theirs = stock(checkpoint("llama4_text"), ours.peft_config["default"])
    theirs.load_state_dict(ours.state_dict())
    assert_equal_within(run(ours, batch()), run(theirs, batch()), ROUNDING)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_adapters_of_an_older_peft_are_refused(checkpoint: Checkpoint, version: str) -> None:
    model = stock(checkpoint("llama4_text"), lora())
    model.peft_config["default"].peft_version = version
    before = fingerprint(model)
    with pytest.raises(ValueError, match="lays out the factors of Llama4TextExperts with input and output swapped"):
        expertune.optimize(model)
    assert fingerprint(model) == before


def _dispatched(model: PreTrainedModel) -> PreTrainedModel:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)  # type: ignore[no-any-return]


def _without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    return remove_hook_from_module(model, recurse=True)  # type: ignore[no-any-return]


ORDERS: dict[str, list[Callable[[Any], Any]]] = {
    "hooks first": [_dispatched, expertune.optimize],
    "hooks later": [expertune.optimize, _dispatched],
    "hooks taken off": [_dispatched, expertune.optimize, _without_hooks],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_hooks_of_accelerate_stay(checkpoint: Checkpoint, walks: list[str], order: list[Callable[[Any], Any]]) -> None:
    model, host = (load_tiny(checkpoint("llama4_text")) for _ in range(2))
    for step in order:
        model = step(model)
    truth = run(host, batch())
    assert_equal_within(run(model, batch()), truth, ROUNDING)
    assert len(walks) == 2
    hooked = [hasattr(module, "_hf_hook") for module in model.modules()]
    expertune.restore(model)
    assert [hasattr(module, "_hf_hook") for module in model.modules()] == hooked
    assert_equal_within(run(model, batch()), truth, 0)
    assert len(walks) == 2


def _composite() -> Llama4ForConditionalGeneration:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,  # its pixels are shuffled four to one
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": 8,
        "patch_size": 2,
    }
    config = Llama4Config(
        text_config=SHARED | CONFIGS["llama4_text"], vision_config=vision, image_token_index=60, boi_token_index=61
    )
    config.vision_config.vision_output_dim = 32
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(config).double()
    randomize(model)
    return model.train()


def test_the_text_tower_of_the_composite_model(
    walks: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees an image and reads text; the vision tower and the projector are the host's, with their gradients."""
    # without it stock transformers 5.24 fails after this model's every forward, because it copies the field
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    host = _composite()
    model = copy.deepcopy(host)
    inputs = batch() | {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    inputs["input_ids"][inputs["input_ids"] >= 60] = 5
    inputs["input_ids"][1, 2:6] = 60
    truth = run(host, inputs)
    assert any("vision_model" in name and grad.any() for name, grad in truth.items())
    assert_equal_within(run(expertune.optimize(model, backend="native_torch"), inputs), truth, ROUNDING)
    assert len(walks) == len(expertune.explain(model).layers) == 2
    adapted = expertune.add_lora(model, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
    assert "left as it is: vision_model" in capsys.readouterr().out
    assert not any("vision" in path for path in expertune.trained(adapted).adapted)


class _OwnMoe(llama4.Llama4TextMoe):  # type: ignore[misc]
    """As remote code may have it."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        out, logits = super().forward(hidden_states)
        return 2 * out, logits


class _OwnExperts(llama4.Llama4TextExperts):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]


@pytest.mark.parametrize("own", ["block", "experts"])
def test_code_of_its_own_is_refused(checkpoint: Checkpoint, own: str) -> None:
    model = load_tiny(checkpoint("llama4_text"))
    for layer in model.model.layers:
        if own == "block":
            layer.feed_forward.__class__ = _OwnMoe
        else:
            layer.feed_forward.experts.__class__ = _OwnExperts
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.feed_forward.*(_OwnMoe|_OwnExperts)"):
        expertune.optimize(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("parameters", [[], ["router.weight"]], ids=["", "with an adapter on the router"])
def test_a_router_that_is_to_choose_more_does(checkpoint: Checkpoint, parameters: list[str]) -> None:
    """The host asks the router alone, not its block."""
    config = lora(target_parameters=["experts.down_proj", *parameters])
    truth, ours = (stock(checkpoint("llama4_text"), config) for _ in range(2))
    expertune.optimize(ours)
    for model in (truth, ours):
        for module in model.modules():
            if type(module).__name__ == "Llama4Router":
                module.top_k = 3
    assert_equal_within(run(ours, batch()), run(truth, batch()), ROUNDING)


def test_hooks_on_experts_see_one_input(checkpoint: Checkpoint) -> None:
    """The host's tokens, once for each choice; torch refuses a gradient of the choice itself."""
    truth, ours = (load_tiny(checkpoint("llama4_text")) for _ in range(2))
    expertune.optimize(ours)
    for model in (truth, ours):
        for module in model.modules():
            if llama4.is_experts(module):
                module.register_full_backward_hook(lambda _module, dinputs, _douts: tuple(2 * d for d in dinputs))
    assert_equal_within(run(ours, batch()), run(truth, batch()), ROUNDING)


def test_a_forward_of_somebody_is_refused_and_one_of_ours_that_is_kept_runs_the_hosts(checkpoint: Checkpoint) -> None:
    truth, ours = (load_tiny(checkpoint("llama4_text")) for _ in range(2))
    expertune.optimize(ours)
    block = _blocks(ours)[0]
    forward = block.forward
    block.forward = lambda x: forward(x)
    expertune.restore(ours)
    assert_equal_within(run(ours, batch()), run(truth, batch()), 0)
    with pytest.raises(ValueError, match="with code of its own"):
        expertune.optimize(ours)
