"""Routers found by trying them, and models that choose by ours in their place."""

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import expertune
from expertune.hosts import forwards, report, router
from expertune.hosts.attached import attached
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"), reason="routers give probabilities there, or choose nothing"
)
GROUPLESS = {"n_group": 1, "topk_group": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "softmax": ("qwen3_moe", {"norm_topk_prob": False}),
    "scores in float32": ("mixtral", {}),
    "softmax of the chosen, with a bias": ("gpt_oss", {}),
    "sigmoids": ("glm4_moe_lite", GROUPLESS | {"norm_topk_prob": False}),
    "sigmoids, normalised": ("deepseek_v3", GROUPLESS),
    "sigmoids in groups": ("glm4_moe_lite", {}),
    "sigmoids in groups, several used": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs on the CPU too, by torch's own operations."""
    monkeypatch.setattr(router, "has_kernel", lambda *_: True)


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "Router" in type(module).__name__]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each choice of ours."""
    seen: list[int] = []
    route = router.route

    def spy(logits_TE: Tensor, *args: Any) -> Any:
        seen.append(len(logits_TE))
        return route(logits_TE, *args)

    monkeypatch.setattr(router, "route", spy)
    return seen


@pytest.mark.parametrize(("family", "settings"), FAMILIES.values(), ids=FAMILIES)
def test_a_model_computes_as_the_hosts(
    checkpoint: Checkpoint, family: str, settings: dict[str, Any], calls: list[int]
) -> None:
    stock = load_tiny(checkpoint(family, **settings), torch.float32)
    for module in routers(stock):
        if router.has_bias(module):
            module.e_score_correction_bias.uniform_(-0.5, 0.5)
    ours = expertune.optimize(copy.deepcopy(stock))
    results = []
    for model in (ours, stock):
        calls.clear()
        out = model(**batch(), use_cache=False)
        out.loss.backward()
        results.append([out.loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        assert len(calls) == (len(routers(model)) if model is ours else 0)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", ["lean", "auto"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpointed_layer_chooses_once(
    checkpoint: Checkpoint, family: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Tensor] = []
    choose = router.choose

    def drifting(logits_TE: Tensor, *args: Any) -> Tensor:
        chosen.append(choose(logits_TE, *args).flip(0))  # no run of its own would choose so
        return chosen[-1]

    model = expertune.optimize(load_tiny(checkpoint(family), torch.float32), memory=memory)
    used: list[Tensor] = []
    route = router.route
    monkeypatch.setattr(router, "route", lambda *args: used.append(args[3]) or route(*args))
    monkeypatch.setattr(router, "choose", drifting)
    model.train()(**batch(), use_cache=False).loss.backward()
    num_layers = len(routers(model))
    assert len(chosen) == num_layers
    assert len(used) == 2 * num_layers
    assert all(any(index is each for each in chosen) for index in used)


def test_under_autocast_logits_are_the_hosts_bit_by_bit(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("glm4_moe_lite", **GROUPLESS), torch.bfloat16)
    (module, found), *_ = router.find(model)
    assert found.formula.is_wide
    x_TD = torch.randn(9, 32, dtype=torch.bfloat16)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours = router.routed(module, found.formula, None, x_TD)[0]
            theirs = type(module).forward(module, x_TD)[0]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


class Noisy:
    """A router that adds noise in training."""

    def forward(self, hidden_states: Tensor) -> Any:
        if self.training:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
        return super().forward(hidden_states)


class Detached:
    """A router that learns nothing from its scores."""

    def forward(self, hidden_states: Tensor) -> Any:
        logits, score, index = super().forward(hidden_states)
        return logits, score.detach() + 0 * score, index


@pytest.mark.parametrize("other", [Noisy, Detached])
def test_another_formula_stays_the_hosts(checkpoint: Checkpoint, other: type) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32).eval()
    assert len(router.find(model)) == 2
    for module in routers(model):
        module.__class__ = type("Router", (other, type(module)), {})
    assert not router.find(model)


@pytest.mark.parametrize("is_ours", [True, False])
def test_explain_says_how_many_are_ours(checkpoint: Checkpoint, is_ours: bool) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    if not is_ours:
        module = routers(model)[0]
        module.__class__ = type("Router", (Noisy, type(module)), {})
    state = attached(expertune.optimize(model))
    assert state is not None
    others = "" if is_ours else "; the others run the host's code"
    assert report._routers(state) == f"routers: {1 + is_ours} of 2 choose and score in one kernel{others}"


def test_it_is_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))
    assert all(forwards.runs(module, router.forward) for module in routers(model))
    expertune.restore(model)
    assert all(forwards.given(module) is None for module in routers(model))
