"""Whichever way gradients are asked for, and whatever changes before, a layer runs again in backward as it ran."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.func import functional_call

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, several_adapters, stock
from tests.hosts.memories import auto, lean
from tests.hosts.models import batch

WAYS = {"auto": lambda model: expertune.optimize(model, memory="auto"), "lean": lean, "lean steps": auto}
Asked = Callable[[Any], dict[str, Tensor]]
COLLECTED: dict[str, bool] = {}  # what each forward is asked for, beside the loss


def loss_of(model: Any, seed: int = 0, **inputs: Any) -> Tensor:
    ids = batch(seed)["input_ids"]
    loss: Tensor = model(**({"input_ids": ids} | inputs), labels=ids, use_cache=False, **COLLECTED).loss
    return loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def handed_out(model: Any) -> dict[str, Tensor]:
    """By `autograd.grad`, with that of the inputs."""
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    wanted = trained(model) | {"inputs_embeds": embeds}
    found = torch.autograd.grad(loss_of(model, input_ids=None, inputs_embeds=embeds), list(wanted.values()))
    assert not grads(model)
    return dict(zip(wanted, found, strict=True))


def of_some(model: Any) -> dict[str, Tensor]:
    """By `backward(inputs=…)`."""
    loss_of(model).backward(inputs=[p for name, p in trained(model).items() if "lora_A" in name])
    assert all("lora_A" in name for name in grads(model))
    return grads(model)


def of_others(model: Any) -> dict[str, Tensor]:
    """Of tensors that stand in for the parameters during the forward alone."""
    torch.manual_seed(1)
    others = {name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for name, p in trained(model).items()}
    ids = batch()["input_ids"]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False} | COLLECTED
    loss = functional_call(model, others, (), inputs).loss
    loss.backward()
    assert not grads(model)
    return {name: other.grad for name, other in others.items() if other.grad is not None}


def seen_by_hooks(model: Any) -> dict[str, Tensor]:
    """Of two forwards and one backward: each comes once, and is whole, as an optimizer in backward needs it."""
    seen: dict[str, list[Tensor]] = {}
    for name, p in trained(model).items():
        seen[name] = []
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))  # type: ignore[misc]
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    assert {len(each) for each in seen.values()} == {1}
    return {name: grad for name, (grad,) in seen.items()}


def halved_by_hooks(model: Any) -> dict[str, Tensor]:
    """By hooks that change gradients on their way, each once; and one that sees all of them together."""
    together: list[int] = []
    handles: list[Any] = [p.register_hook(lambda grad: grad / 2) for p in trained(model).values()]
    handles.append(register_multi_grad_hook(list(trained(model).values()), lambda all_: together.append(len(all_))))
    loss_of(model).backward()
    for handle in handles:
        handle.remove()
    assert together == [len(trained(model))]
    return grads(model)


def of_two_passes(model: Any) -> dict[str, Tensor]:
    """Of two backward passes through one graph."""
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    return grads(model)


def frozen_meanwhile(model: Any) -> dict[str, Tensor]:
    """Some are frozen between forward and backward, and keep the gradient that they have; others come too late."""
    late = [p for name, p in trained(model).items() if "layers.1" in name]
    loss_of(model, 1).backward()
    for p in late:
        p.requires_grad_(False)
    loss = loss_of(model)
    for p in trained(model).values():
        p.requires_grad_(False)
    for p in late:
        p.requires_grad_()
    loss.backward()
    for p in model.parameters():
        if p.grad is not None:
            p.requires_grad_()
    return grads(model)


def of_two_adapters(model: Any) -> dict[str, Tensor]:
    """Two losses, each of its own adapter, and one backward of their sum."""
    torch.manual_seed(5)
    model.add_adapter("second", lora(lora_alpha=9))
    model.set_adapter("default")
    first = loss_of(model, 0)
    model.set_adapter("second")
    (first + 2 * loss_of(model, 1)).backward()
    assert model.active_adapters == ["second"]
    return grads(model)


def without_adapters(model: Any) -> dict[str, Tensor]:
    """The inputs' gradient of a forward in which adapters are disabled; they are on again when backward runs."""
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    with model.disable_adapter():
        loss = loss_of(model, input_ids=None, inputs_embeds=embeds)
    loss.backward()
    assert not grads(model)
    return {"inputs_embeds": embeds.grad}  # type: ignore[dict-item]


def scaled(model: Any) -> dict[str, Tensor]:
    """Of a forward under another scale than backward finds."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scaling["default"] *= 2
    loss = loss_of(model)
    for layer in layers:
        layer.scaling["default"] /= 2
    loss.backward()
    return grads(model)


ASKED: dict[str, Asked] = {
    each.__name__: each
    for each in (
        handed_out,
        of_some,
        of_others,
        seen_by_hooks,
        halved_by_hooks,
        of_two_passes,
        frozen_meanwhile,
        without_adapters,
        scaled,
    )
}


def check(checkpoint: Checkpoint, family: str, way: Any, ask: Asked) -> None:
    folder = checkpoint(family)
    ours, theirs = stock(folder, lora()), stock(folder, lora())
    way(ours)
    expected = ask(theirs)
    for _ in range(2):  # in the second step a layer knows what it may leave out
        found = ask(ours)
        assert expected
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        ours.zero_grad()
        if ask in (seen_by_hooks, of_two_adapters):  # which change the model
            break


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_gradients_are_stocks(checkpoint: Checkpoint, family: str, way: Any, ask: Asked) -> None:
    check(checkpoint, family, way, ask)


@pytest.mark.parametrize(
    "ask",
    [*ASKED.values(), pytest.param(of_two_adapters, marks=several_adapters)],
    ids=[*ASKED, "of_two_adapters"],
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_so_they_are_where_hidden_states_are_collected(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, way: Any, ask: Asked
) -> None:
    """Then layers run again by torch's own checkpoint."""
    monkeypatch.setitem(COLLECTED, "output_hidden_states", True)
    check(checkpoint, "qwen3_moe", way, ask)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_module_that_is_saved_whole_is_disabled_as_it_was(checkpoint: Checkpoint, way: Any) -> None:
    """PEFT keeps a copy of it, which is trained, beside the original."""
    models = [stock(checkpoint("qwen3_moe"), lora(modules_to_save=["q_proj"])) for _ in range(2)]
    for model in models:
        for name, p in trained(model).items():
            if "q_proj" in name:
                p.data.mul_(2)
    way(models[0])
    found, expected = map(without_adapters, models)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def steer(model: Any) -> Tensor:
    """A trained tensor that a layer reads by a hook, and that is no parameter of it."""
    vector = torch.ones(32, dtype=torch.float64, requires_grad=True)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.register_forward_hook(lambda _module, _args, out: out * vector)
    return vector


@pytest.mark.parametrize("is_hooked", [False, True], ids=["", "a parameter with a hook"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_a_layer_reads_beyond_its_parameters_has_its_gradient(
    checkpoint: Checkpoint, way: Any, is_hooked: bool
) -> None:
    found = []
    for turn_on in (way, lambda _: None):
        model = stock(checkpoint("qwen3_moe"), lora())
        turn_on(model)
        vector = steer(model)
        if is_hooked:
            next(iter(trained(model).values())).register_hook(lambda grad: grad)
        loss_of(model).backward()
        found.append([vector.grad, *grads(model).values()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_what_a_layer_reads_beyond_its_parameters_is_not_lost_in_silence(checkpoint: Checkpoint) -> None:
    model = stock(checkpoint("qwen3_moe"), lora())
    lean(model)
    vector = steer(model)
    with pytest.raises(RuntimeError, match="have been used"):  # torch's
        torch.autograd.grad(loss_of(model), vector)
    with pytest.raises(RuntimeError, match="is no parameter of it"):
        torch.autograd.grad(loss_of(model), list(trained(model).values()))


@several_adapters
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_gradients_of_two_adapters_are_stocks(checkpoint: Checkpoint, way: Any) -> None:
    check(checkpoint, "qwen3_moe", way, of_two_adapters)


def test_weights_that_adapters_were_merged_into_are_not_run_again(checkpoint: Checkpoint) -> None:
    model = stock(checkpoint("qwen3_moe"), lora(target_parameters=[], target_modules=["o_proj"]))
    expertune.optimize(model, memory="lean")
    loss = loss_of(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into the weights"):
        loss.backward()
