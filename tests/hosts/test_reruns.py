"""Layers that spare memory, replayed: forward again in backward, the same numbers, and nothing kept between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.graphs import recording
from expertune.hosts import heads, transformers
from expertune.hosts.attached import attached
from expertune.memory.offload import Offload
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts import memories
from tests.hosts.recorded import both, make, recorder_of, run_all_as_recorded, step, tokens
from tests.kept import kept_for_backward

FAMILIES = ["qwen3_moe", "gpt_oss", "glm4_moe_lite", "gemma3_text"]


@pytest.mark.parametrize("large", [0, 2**20])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_the_same(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str, large: int
) -> None:
    monkeypatch.setattr(recording, "_LARGE", large)
    ours, stock, capture = both(checkpoint(family), family, memory="lean")
    for seed in range(6):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert capture.recorded == [False] * (2 * 2)
    assert capture.replays == 4 * 2 * 2
    said = "CUDA graphs: 2 of 2 layers, 1 kinds of calls, 2 of the layers run forward again in backward"
    assert str(expertune.explain(ours).graphs) == said


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", {"attention_dropout": 0.3}), ("mixtral", {"router_jitter_noise": 0.1}), ("qwen3_moe", {})],
    ids=["dropout", "jitter", "none"],
)
def test_layers_that_draw_random_numbers_are_not(checkpoint: Checkpoint, family: str, settings: dict[str, Any]) -> None:
    """A second forward would draw others; nor does it cost numbers to find out."""
    ours, stock, capture = both(checkpoint(family, **settings), family, memory="lean")
    for seed in range(5):
        results = []
        for model in (ours, stock):
            torch.manual_seed(seed)
            results.append((step(model, tokens(seed)), torch.rand(1)))
        torch.testing.assert_close(*results)
    refused = recorder_of(ours).refused
    assert any("random numbers" in reason for reason in refused.values()) is bool(settings)
    assert bool(capture.replays) is not bool(settings)


@pytest.mark.parametrize(
    ("family", "leaves_out"), [("qwen3_moe", [False, False, True, True]), ("glm4_moe_lite", [False, False])]
)
def test_the_experts_output_is_left_out_where_backward_does_not_read_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str, leaves_out: list[bool]
) -> None:
    """Of GLM's two layers one has experts, and a shared one after them, which is a custom function here."""
    walk, calls = transformers.experts, []

    def spy(*args: Any, leaves_out: bool, **keywords: Any) -> Tensor:
        calls.append(leaves_out)
        return walk(*args, leaves_out=leaves_out, **keywords)

    monkeypatch.setattr(transformers, "experts", spy)
    ours, stock, _ = both(checkpoint(family), family, memory="lean")
    for seed in range(5):
        calls.clear()
        mine = step(ours, tokens(seed))
        assert seed < 3 or sorted(calls) == leaves_out
        torch.testing.assert_close(mine, step(stock, tokens(seed)))


def test_nothing_but_inputs_is_kept(checkpoint: Checkpoint) -> None:
    ours, _, _ = both(checkpoint("qwen3_moe"), memory="lean")
    layer = ours.get_base_model().model.layers[1]
    for seed in range(4):
        step(ours, tokens(seed))
    inputs: list[tuple[Any, dict[str, Any]]] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    step(ours, tokens(4))
    handle.remove()
    ((x,), keywords) = inputs[0]
    with kept_for_backward([*ours.parameters(), *_tensors(keywords)]) as kept:
        layer(x.detach().requires_grad_(), **keywords)
    assert sum(kept.values()) == x.nbytes


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def test_batches_that_come_between_are_right(checkpoint: Checkpoint) -> None:
    """Packed ones, other lengths, two forwards before a backward, and gradients that add up."""
    ours, stock, capture = both(checkpoint("qwen3_moe"), memory="lean")
    packed = torch.arange(12).remainder(5)[None]
    for seed in range(8):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
        one = tokens(seed, batch=1)
        torch.testing.assert_close(*[step(model, one, position_ids=packed) for model in (ours, stock)])
        other = tokens(seed, length=9 + seed)
        torch.testing.assert_close(step(ours, other), step(stock, other))
    assert capture.replays
    grads = []
    for model in (ours, stock):
        model.zero_grad()
        losses = [model(input_ids=tokens(s), labels=tokens(s), use_cache=False).loss for s in (1, 2)]
        (losses[0] - 0.5 * losses[1]).backward()
        losses = [model(input_ids=tokens(s), labels=tokens(s), use_cache=False).loss for s in (3, 4)]
        losses[1].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_router_logits_and_their_loss_are_the_hosts(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"), memory="lean")
    for seed in range(5):
        torch.testing.assert_close(*[step(m, tokens(seed), output_router_logits=True) for m in (ours, stock)])
    assert capture.replays == 3 * 2 * 2


def test_layers_whose_inputs_move_are_not(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    memories.lean(ours)
    assert isinstance(attached(ours.get_base_model()).memory.offload, Offload)  # type: ignore[union-attr]
    recorder_of(ours)._pool_of = capture.pool
    for seed in range(4):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert capture.recorded == []


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a hook": lambda layer: layer.mlp.register_forward_hook(lambda _m, _x, out: out),
    "another scale": lambda layer: layer.self_attn.q_proj.set_scale("default", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_changed_is_seen(checkpoint: Checkpoint, change: Callable[[nn.Module], Any]) -> None:
    ours, stock, _ = both(checkpoint("qwen3_moe"), memory="lean")
    for seed in range(8):
        if seed == 4:
            for model in (ours, stock):
                change(model.get_base_model().model.layers[0])
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))


@needs_cuda
@pytest.mark.parametrize("large", [0, 2**20])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, family: str, large: int) -> None:
    """Real graphs, with parameters that move, in bfloat16: bit for bit what the same model gives without."""
    monkeypatch.setattr(recording, "_LARGE", large)
    run_all_as_recorded(monkeypatch, with_heads=False)
    ours, stock = (
        make(checkpoint(family), family, graphs=graphs, memory="lean").to("cuda", torch.bfloat16)
        for graphs in (True, False)
    )
    for seed in range(8):
        results = []
        for model in (ours, stock):
            results.append(step(model, tokens(seed, length=64).cuda()))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        for a, b in zip(*results, strict=True):
            assert a is None is b or (a is not None and b is not None and torch.equal(a, b))
    assert "2 of 2 layers, 1 kinds of calls" in str(expertune.explain(ours))


@needs_cuda
def test_on_a_gpu_heads_are_rotated_as_where_layers_keep(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recordings of both rotate heads as they norm them, and give the same bits."""
    real, rotated = heads.norm_and_rotate, list[bool]()

    def spy(*args: Any) -> Any:
        rotated.append(True)
        return real(*args)

    monkeypatch.setattr(heads, "norm_and_rotate", spy)
    results = []
    for memory in ("lean", "fast"):
        model = make(checkpoint("qwen3_moe"), "qwen3_moe", graphs=True, memory=memory).to("cuda", torch.bfloat16)
        steps = [step(model, tokens(seed, length=64).cuda()) for seed in range(6)]
        results.append(steps[3:])
        assert rotated
        rotated.clear()
    torch.testing.assert_close(*results, rtol=0, atol=0)
