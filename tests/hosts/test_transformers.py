"""Whole models, fully fine-tuned, through the walk against the host's eager code: logits, loss, every gradient."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import expertune
from tests.conftest import Checkpoint
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import BACKENDS, assert_equal_within, on_the_truths_routes, run
from tests.numerics import assert_no_worse

# Whole models: rounding of one layer is amplified by those after it.
ROUNDING = 1e-12
# Top-1 without normalization: with it the only weight is 1, and the router's gradient is zero plus noise.
ROUTING: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts_per_tok": 3},
    "gpt_oss": {},
    "glm4_moe_lite": {"num_experts_per_tok": 3},
    "deepseek_v3": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "llama4_text": {"num_experts_per_tok": 3},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_float64_equals_the_host_within_rounding(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    folder = checkpoint(family, **ROUTING[family])
    truth = run(load_tiny(folder), batch())
    assert not walks
    model = load_tiny(folder)
    ours = run(expertune.optimize(model, backend="native_torch"), batch())
    assert {name for name, _ in model.named_parameters()} <= ours.keys()
    assert_equal_within(ours, truth, ROUNDING)
    assert walks == ["native_torch"] * len(expertune.explain(model).layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_low_precision_is_no_worse_than_the_host(
    checkpoint: Checkpoint, family: str, dtype: torch.dtype, backend: str
) -> None:
    folder = checkpoint(family, **ROUTING[family])
    host = load_tiny(folder, dtype)
    exact = copy.deepcopy(host).double()  # the same rounded weights
    # whose attention rounds better in one batch is chance; tests/attention compares it alone
    model = expertune.optimize(load_tiny(folder, dtype), backend=backend, attention="host")
    for name, (ours, plain, truth) in on_the_truths_routes(exact, model, host).items():
        # the loss comes in float32 but is no more exact than the rest
        assert_no_worse(ours.to(dtype), plain, truth, name)


def test_attention_of_ours_is_enough_without_experts(checkpoint: Checkpoint, walks: list[str]) -> None:
    folder = checkpoint("gemma3_text")
    truth = run(load_tiny(folder), batch())
    model = expertune.optimize(load_tiny(folder), backend="native_torch", memory="auto")
    expertune.optimize(model)  # again, now that its attention is ours
    assert_equal_within(run(model, batch()), truth, 1e-11)
    assert not walks
    assert "no experts" in str(expertune.explain(model))
    assert "not optimized" in str(expertune.explain(expertune.restore(model)))


NOTHING_TO_DO: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "dense": ("qwen3", {}, {}),
    "only dense layers": ("qwen3_moe", {"mlp_only_layers": [0, 1]}, {}),
    "attention left to the host": ("gemma3_text", {}, {"attention": "host"}),
    "attention that ours cannot do": ("gemma3_text", {"attention_dropout": 0.1}, {}),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("family", "overrides", "arguments"), NOTHING_TO_DO.values(), ids=NOTHING_TO_DO)
def test_a_model_of_which_nothing_would_be_ours_is_refused(
    checkpoint: Checkpoint, family: str, overrides: dict[str, Any], arguments: dict[str, str], device: str
) -> None:
    model = load_tiny(checkpoint(family, **overrides)).to(device)
    before = fingerprint(model)
    words = rf"no experts in {type(model).__name__}, .*\(\w+Model: .+\).* as it is.*add-a-family.*\({family}\)"
    with pytest.raises(ValueError, match=words):
        expertune.optimize(model, **arguments)
    if not arguments:
        with pytest.raises(ValueError, match=words):
            expertune.add_lora(model, target_modules=["q_proj"])
    assert fingerprint(model) == before
    assert "not optimized" in str(expertune.explain(model))


def test_attention_given_back_to_the_host_alone_is_refused(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("gemma3_text")))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="attention='host' was asked for"):
        expertune.optimize(model, attention="host")
    assert fingerprint(model) == before
    assert model.config._attn_implementation == "expertune"


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "unknown": ({"backend": "cuda_graphs"}, "unknown backend 'cuda_graphs'.*grouped_mm"),
    "cannot run": ({"backend": "grouped_mm"}, "grouped_mm.*cannot run here.*float64"),
    "memory": ({"memory": "tiny"}, "unknown memory 'tiny'.*lean"),
}


@pytest.mark.parametrize("was_optimized", [False, True])
@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    checkpoint: Checkpoint, arguments: dict[str, Any], words: str, was_optimized: bool
) -> None:
    model = load_tiny(checkpoint("gpt_oss"))
    if was_optimized:
        expertune.optimize(model, backend="native_torch", memory="lean")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        expertune.optimize(model, **arguments)
    assert fingerprint(model) == before


@pytest.mark.parametrize("defect", ["strided", "unaligned"])
def test_weights_that_no_kernel_reads_take_another_backend(
    checkpoint: Checkpoint, walks: list[str], defect: str
) -> None:
    model, stock = (load_tiny(checkpoint("qwen3_moe"), torch.float32) for _ in range(2))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        weight = experts.gate_up_proj.detach()
        if defect == "strided":
            view = torch.stack([weight, weight], dim=-1)[..., 0]
        else:
            view = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
        experts.gate_up_proj = nn.Parameter(view)
    with pytest.raises(ValueError, match=r"cannot run here: it needs contiguous weights that start at a multiple"):
        expertune.optimize(model, backend="grouped_mm")
    expertune.optimize(model)
    torch.testing.assert_close(model(**batch()).loss, stock(**batch()).loss)
    assert set(walks) == {"native_torch"}
    assert "grouped_mm: needs contiguous weights" in str(expertune.explain(model))


def test_weights_of_two_dtypes_are_refused_in_words(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    model.model.layers[1].mlp.experts.down_proj.data = model.model.layers[1].mlp.experts.down_proj.data.bfloat16()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts have different dtypes, torch.float32 and"):
        expertune.optimize(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("trait", ["_is_expert_parallel", "parameter"])
def test_experts_that_the_walk_does_not_know_are_refused(checkpoint: Checkpoint, trait: str) -> None:
    model = load_tiny(checkpoint("qwen3_moe"))
    experts: Any = model.model.layers[1].mlp.experts
    if trait == "parameter":
        experts.gate_up_proj_scale = nn.Parameter(torch.ones(1))
    else:
        setattr(experts, trait, True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts \(Qwen3MoeExperts\)"):
        expertune.optimize(model)
    assert fingerprint(model) == before


class _OwnExperts(Qwen3MoeExperts):  # type: ignore[misc]
    """As remote code may have it: marked by its parent, and past the interface."""

    def forward(self, hidden_states: torch.Tensor, *_routing: Any) -> torch.Tensor:
        return hidden_states


def _rounded(dtype: torch.dtype) -> Callable[[Any], None]:
    def change(experts: Any) -> None:
        experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)

    return change


def _two_in_one(experts: Any) -> None:
    weight = experts.down_proj.detach()
    experts.down_proj = nn.Parameter(TwoTensor(weight, weight.clone()))


UNREADABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "float8": (_rounded(torch.float8_e4m3fn), "float8_e4m3fn.*quantized"),
    "packed": (_rounded(torch.uint8), "uint8.*quantized"),
    "a tensor of another kind": (_two_in_one, "TwoTensor.*quantized"),
    "code of its own": (lambda experts: setattr(experts, "__class__", _OwnExperts), "a forward of its own"),
}


@pytest.mark.parametrize(("change", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_experts_that_the_walk_cannot_read_are_refused(
    checkpoint: Checkpoint, change: Callable[[Any], None], words: str
) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    change(model.model.layers[1].mlp.experts)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.experts \(\w+\).*{words}"):
        expertune.optimize(model)
    assert fingerprint(model) == before


def test_quantized_experts_of_transformers_are_refused(checkpoint: Checkpoint) -> None:
    """Marked in newer versions; in older ones the block is named instead."""
    model = load_tiny(checkpoint("qwen3_moe"), torch.bfloat16)
    replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config(), pre_quantized=True)
    who = r"model\.layers\.0\.mlp(\.experts \(FP8Experts\)| \(Qwen3MoeSparseMoeBlock\)) holds"
    with pytest.raises(ValueError, match=who):
        expertune.optimize(model)


@pytest.mark.parametrize("layers", [[0, 1], [1]], ids=["all", "one"])
def test_experts_that_are_a_list_of_modules_are_refused(checkpoint: Checkpoint, layers: list[int]) -> None:
    """As remote code of Transformers 4 has them."""
    model = load_tiny(checkpoint("glm4_moe_lite", mlp_layer_types=["sparse", "sparse"]))
    for layer in layers:
        model.model.layers[layer].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])  # type: ignore[assignment]
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.{layers[0]}\.mlp.*in a form that"):
        expertune.optimize(model)
    assert fingerprint(model) == before


def test_the_variable_names_the_backend_and_an_argument_wins(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, walks: list[str]
) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    monkeypatch.setenv("EXPERTUNE_MOE_BACKEND", "native_torch")
    expertune.optimize(model)(**batch())
    assert set(walks) == {"native_torch"}
    walks.clear()
    expertune.optimize(model, backend="grouped_mm")(**batch())
    assert set(walks) == {"grouped_mm"}
    monkeypatch.setenv("EXPERTUNE_MOE_BACKEND", "fastest")
    with pytest.raises(ValueError, match="unknown EXPERTUNE_MOE_BACKEND 'fastest'"):
        expertune.optimize(model)
    monkeypatch.setenv("EXPERTUNE_MOE_BACKEND", "")  # as unset
    expertune.optimize(model)


@pytest.mark.parametrize("memory", [None, "fast", "auto"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_restore_gives_the_stock_model_back(
    checkpoint: Checkpoint, walks: list[str], family: str, memory: str | None
) -> None:
    stock, model = (load_tiny(checkpoint(family), torch.float32) for _ in range(2))
    if memory == "fast":
        stock.gradient_checkpointing_disable()
    elif memory == "auto":
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    before = fingerprint(model)
    expertune.optimize(model, memory=memory)
    run(model, batch())
    walks.clear()
    expertune.restore(model)
    assert_equal_within(run(model, batch()), run(stock, batch()), 0)
    assert not walks
    after = fingerprint(model)
    if memory is None:
        assert after == before
    for (path, ours), theirs in zip(model.named_modules(), stock.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys(), path
        if "_gradient_checkpointing_func" in vars(theirs):
            assert ours.gradient_checkpointing == theirs.gradient_checkpointing
            assert _function(ours._gradient_checkpointing_func) == _function(theirs._gradient_checkpointing_func)
    assert expertune.restore(model) is model


def _function(checkpoint_function: Any) -> tuple[Any, Any]:
    """A `functools.partial` or function in a form to compare."""
    return getattr(checkpoint_function, "func", checkpoint_function), getattr(checkpoint_function, "keywords", None)


def test_optimizing_twice_is_optimizing_once(checkpoint: Checkpoint, walks: list[str]) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    before = fingerprint(model)
    expertune.optimize(model, backend="native_torch")
    expertune.optimize(model, backend="grouped_mm")
    model(**batch())
    assert walks == ["grouped_mm"] * 2
    expertune.restore(model)
    assert fingerprint(model) == before


def test_optimizing_again_leaves_checkpointing_as_it_is(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32), memory="lean")
    layer: Any = model.model.layers[0]
    ours = layer._gradient_checkpointing_func.checkpoint.func
    expertune.optimize(model, backend="native_torch")
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.checkpoint.func is ours


def test_models_that_share_a_config_are_each_on_their_own(checkpoint: Checkpoint, walks: list[str]) -> None:
    first = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    second = type(first)(first.config).train()
    second.load_state_dict(first.state_dict())
    stock = run(second, batch())
    expertune.optimize(first)
    assert_equal_within(run(second, batch()), stock, 0)
    assert not walks
    expertune.optimize(second)
    expertune.restore(first)
    run(second, batch())
    assert len(walks) == 2
    expertune.restore(second)
    assert_equal_within(run(first, batch()), stock, 0)
    assert_equal_within(run(second, batch()), stock, 0)
    assert len(walks) == 2


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_a_copy_of_an_optimized_model_runs_by_itself(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family), torch.float32), memory="lean")
    twin = copy.deepcopy(model)
    assert_equal_within(run(twin, batch()), run(model, batch()), 0)
    expertune.restore(model)
    walks.clear()
    run(twin, batch())
    assert walks
    expertune.restore(twin)
    walks.clear()
    assert_equal_within(run(twin, batch()), run(model, batch()), 0)
    assert not walks


def test_saving_an_optimized_model_writes_a_stock_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load_tiny(checkpoint("gpt_oss"), torch.float32)
    stock = run(model, batch())
    expertune.optimize(model).save_pretrained(tmp_path)
    assert "expertune" not in (tmp_path / "config.json").read_text()
    saved = load_tiny(tmp_path, torch.float32)
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in saved.state_dict().items())
    assert_equal_within(run(saved, batch()), stock, 1e-6)  # float32 sums depend on where a tensor happens to lie


@pytest.mark.parametrize("family", CONFIGS)
def test_generating_with_a_cache_equals_the_host(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    """One token a step, greedy, from a padded prompt."""
    stock, model = (load_tiny(checkpoint(family)).eval() for _ in range(2))
    inputs = {key: value.flip(1) for key, value in batch().items() if key != "labels"}  # padding on the left
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = stock.generate(**inputs, **settings)
    ours = expertune.optimize(model, memory="auto").generate(**inputs, **settings)
    assert len(walks) >= 6
    assert torch.equal(ours.sequences, theirs.sequences)
    for ours_step, theirs_step in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(ours_step, theirs_step, rtol=1e-10, atol=1e-10)


def test_inference_mode(checkpoint: Checkpoint, walks: list[str]) -> None:
    stock, model = (load_tiny(checkpoint("deepseek_v3")).eval() for _ in range(2))
    with torch.inference_mode():
        ours, theirs = expertune.optimize(model)(**batch()).logits, stock(**batch()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert walks


def test_importing_changes_nothing_global(tmp_path: Path) -> None:
    """In a process of its own: nothing printed, no host imported by the package, no host changed by the verbs."""
    program = """
import os, sys, warnings
import torch
import expertune
assert not {"transformers", "peft", "trl"} & set(sys.modules)
import peft, transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from peft.tuners.lora.layer import ParamWrapper
def state():
    classes = (ParamWrapper, GradientCheckpointingLayer, peft.PeftModel, transformers.PreTrainedModel, torch.nn.Module)
    return (
        [dict(vars(c)) for c in classes], dict(os.environ), list(warnings.filters), sorted(ALL_EXPERTS_FUNCTIONS),
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32,
    )
before = state()
expertune.optimize
assert state() == before
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
