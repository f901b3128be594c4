"""Models whose layers are recorded, without a GPU too, and steps of theirs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import expertune
from expertune.graphs.recorder import Recorder
from expertune.hosts import heads, siblings
from expertune.hosts.attached import attached
from tests.graphs.replayed import FakeCapture
from tests.hosts.models import load_tiny

TARGETS = {
    "glm4_moe_lite": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma3_text": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def make(folder: Path, family: str, *, graphs: bool, modules_to_save: list[str] | None = None, **settings: Any) -> Any:
    model = load_tiny(folder, torch.float64).requires_grad_(False)
    expertune.optimize(model, graphs=graphs, **settings)
    targets = TARGETS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"])
    torch.manual_seed(0)
    saved = {"modules_to_save": modules_to_save}
    return expertune.add_lora(model, r=4, target_modules=targets, init_lora_weights=False, **saved)


def recorder_of(model: Any) -> Recorder:
    """What records the layers of a model, or of one that PEFT has wrapped."""
    state = attached(model.get_base_model() if isinstance(model, PeftModel) else model)
    assert state is not None
    assert state.recorder is not None
    return state.recorder


def both(folder: Path, family: str = "", **settings: Any) -> tuple[Any, Any, FakeCapture]:
    """A model that records without a GPU, the same without recordings, and what counts them."""
    ours, stock = (make(folder, family, graphs=graphs, **settings) for graphs in (True, False))
    capture = FakeCapture()
    recorder_of(ours)._pool_of = capture.pool
    return ours, stock, capture


def step(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> list[torch.Tensor | None]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**{"input_ids": ids, "labels": ids, "use_cache": False} | inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def tokens(seed: int, batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def run_all_as_recorded(monkeypatch: pytest.MonkeyPatch, *, with_heads: bool = True) -> None:
    """Let what is not recorded run the kernels of what is, in every thread: then the bits are the same.

    Args:
        monkeypatch: of the test.
        with_heads: whether heads are rotated as they are normed. A checkpoint runs its forward without gradients first,
            where they are not: so they are in nothing, recorded or not, where one is compared.
    """
    monkeypatch.setattr(siblings, "recording", SimpleNamespace(value=True))
    monkeypatch.setattr(heads, "recording", SimpleNamespace(value=with_heads))
