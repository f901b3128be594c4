"""What the walk is timed on: every part of it, on the layout that a shape's model has."""

import json
import sys
from pathlib import Path

import pytest
import torch

import walk_graph
from shapes import SHAPES


@pytest.mark.parametrize("keeps_packed", [False, True])
@pytest.mark.parametrize("shape", ["tiny", "gptoss"])
def test_everything_gets_its_gradient(monkeypatch: pytest.MonkeyPatch, shape: str, keeps_packed: bool) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8}
    monkeypatch.setitem(SHAPES, "gptoss", ("gpt_oss", SHAPES["gptoss"][1] | widths))
    walk = walk_graph.Pass(shape, rank=4, device=torch.device("cpu"))
    assert walk.step.layout.is_transposed == walk.step.layout.has_bias == (shape == "gptoss")
    grads = walk.on(16, keeps_packed=keeps_packed)()
    assert len(grads) == 2 + len(walk.factors) == 6
    assert all(grad.any() and grad.isfinite().all() for grad in grads)


def test_it_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_graph, "_REST_S", 0)
    settings = ["--tokens", "8", "--rank", "4", "--rested", "2", "--sustained", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["walk_graph.py", "--shape", "tiny", *settings])
    walk_graph.main()
    report = json.loads((tmp_path / "walk_graph.json").read_text(encoding="utf-8"))
    assert all(len(spans) == 2 and min(spans) > 0 for spans in report["tokens"]["8"].values())
