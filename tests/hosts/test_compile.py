"""A model under `torch.compile`: its experts are one operator, without a graph break, and equal to plain execution."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import expertune
from expertune.activations import SwiGlu
from expertune.backends import native_torch
from expertune.hosts.transformers import _shared_step
from expertune.shapes import ExpertsLayout
from expertune.walk import ExpertsStep
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import of_tokens

TARGETS = ["o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(
    checkpoint: Checkpoint,
    family: str,
    backend: str,
    memory: str = "fast",
    *,
    rank: int = 4,
    attention: str = "host",
    num_layers: int = 2,
) -> nn.Module:
    """A tiny model with LoRA whose factors are not zero, or with rank 0 for full fine-tuning."""
    model: Any = load_tiny(
        checkpoint(family, num_hidden_layers=num_layers), torch.float64 if backend == "native_torch" else torch.float32
    )
    expertune.optimize(model, backend=backend, memory=memory, attention=attention)
    if rank:
        model = expertune.add_lora(model, r=rank, lora_alpha=8, target_modules=TARGETS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return cast(nn.Module, model.train())


def _results(model: nn.Module, function: Callable[..., Any]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss = function(**batch(), use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    return [loss.detach(), *[grad.clone() for grad in grads if grad is not None]]


@pytest.mark.parametrize(
    ("family", "rank", "backend", "num_layers"),
    [
        ("qwen3_moe", 4, "native_torch", 1),
        ("qwen3_moe", 4, "grouped_mm", 1),
        ("gpt_oss", 4, "native_torch", 2),
        ("llama4_text", 4, "grouped_mm", 2),
        ("qwen3_moe", 0, "native_torch", 1),
    ],
    ids=str,
)
def test_a_compiled_model_is_one_graph(
    checkpoint: Checkpoint, walks: list[str], family: str, rank: int, backend: str, num_layers: int
) -> None:
    model = _model(checkpoint, family, backend, rank=rank, num_layers=num_layers)
    plain = _results(model, model)
    num_walks = len(walks)
    compiled = _results(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(walks) == num_walks, "a compiled model went through the plain walk"
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_a_mask_beside_sdpa_is_in_the_graph(checkpoint: Checkpoint) -> None:
    model: Any = _model(checkpoint, "qwen3_moe", "native_torch", attention="auto", num_layers=1)
    inputs = {**batch(), "use_cache": False}
    plain = of_tokens(model(**inputs).logits, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(of_tokens(compiled(**inputs).logits, inputs), plain)


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe_lite"])
def test_our_attention_is_in_the_graph(checkpoint: Checkpoint, family: str) -> None:
    model = _model(checkpoint, family, "native_torch", attention="auto")
    compiled = _results(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    # it is cut another way there, or the host's
    torch.testing.assert_close(compiled, _results(model, model), rtol=1e-12, atol=1e-14)


@pytest.mark.thorough  # the compiler takes most of a minute
def test_gradient_checkpointing_of_a_compiled_model(checkpoint: Checkpoint) -> None:
    # the host's own hook on the embeddings breaks the graph; its layers do not
    model = _model(checkpoint, "qwen3_moe", "native_torch", "auto")
    compiled = _results(model, torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(compiled, _results(model, model), rtol=1e-12, atol=1e-14)


@pytest.mark.thorough  # the compiler takes most of a minute
def test_another_length_and_another_adapter(checkpoint: Checkpoint) -> None:
    model = _model(checkpoint, "qwen3_moe", "native_torch")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (11, 7):
        inputs = batch(length=length) | {"use_cache": False}
        assert torch.equal(compiled(**inputs).loss, model(**inputs).loss)
    with model.disable_adapter():
        inputs = batch() | {"use_cache": False}
        assert torch.equal(compiled(**inputs).loss, model(**inputs).loss)


def test_a_copy_of_a_model_is_compiled_after_the_model_is_gone(checkpoint: Checkpoint) -> None:
    model = _model(checkpoint, "qwen3_moe", "native_torch", num_layers=1)
    expected = _results(model, model)
    copied = copy.deepcopy(model)
    del model
    _shared_step.cache_clear()
    gc.collect()
    compiled = _results(copied, torch.compile(copied, backend="aot_eager"))
    plain = _results(copied, copied)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    # the copy lies at other addresses, where a CPU may round a product otherwise
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-14)


def test_the_operators_are_what_they_say() -> None:
    """Schema, fake counterparts and autograd, as torch checks them."""
    E, D, F, T, K = 4, 16, 8, 5, 2
    layout = ExpertsLayout(
        num_experts=E, model_width=D, expert_width=F, has_gate=True, is_transposed=True, has_bias=True
    )
    step = ExpertsStep(layout=layout, gate=SwiGlu(), backend=native_torch.BACKEND)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).mul_(0.3).requires_grad_()

    expert_TK = torch.rand(T, E).topk(K, dim=-1).indices
    factors = [leaf(E * 3, D), leaf(2 * F, 3 * E), leaf(E * 2, F), leaf(D, 2 * E)]
    weights = (leaf(E, D, 2 * F), leaf(E, 2 * F), leaf(E, F, D), leaf(E, D))
    inputs = (leaf(T, D), expert_TK, leaf(T, K), *weights, factors, [0.5, 2.0], 1, step.number)
    torch.library.opcheck(torch.ops.expertune.experts, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_refused_in_words(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"))).eval()
    with pytest.raises(ValueError, match=r"expertune\.restore\(model\) first, or use torch\.export"):
        torch.jit.trace(model, batch()["input_ids"], strict=False)
