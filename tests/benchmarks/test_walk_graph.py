"""What the walk is timed on: every part of it, on the layout that a shape's model has."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import walk_graph
from shapes import SHAPES
from tests.cases import needs_cuda


@pytest.mark.parametrize("packs", walk_graph.PACKS)
@pytest.mark.parametrize("shape", ["tiny", "gptoss"])
def test_everything_gets_its_gradient(monkeypatch: pytest.MonkeyPatch, shape: str, packs: str) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8}
    monkeypatch.setitem(SHAPES, "gptoss", ("gpt_oss", SHAPES["gptoss"][1] | widths))
    walk = walk_graph.Pass(shape, rank=4, device=torch.device("cpu"))
    assert walk.step.layout.is_transposed == walk.step.layout.has_bias == (shape == "gptoss")
    grads = walk.on(16, packs)()
    assert len(grads) == 2 + len(walk.factors) == 6
    assert all(grad.any() and grad.isfinite().all() for grad in grads)


@needs_cuda
def test_a_replay_reads_what_its_function_holds() -> None:
    x, out = torch.ones(2**20, device="cuda"), torch.zeros(2**20, device="cuda")
    run = walk_graph.replayed(partial(torch.add, x, x, out=out))
    del x
    torch.cuda.empty_cache()
    torch.full((2**20,), 7.0, device="cuda")  # where freed memory is used again
    run()
    assert (out == 2).all()


def test_it_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_graph, "_REST_S", 0)
    settings = ["--tokens", "8", "--rank", "4", "--rested", "2", "--sustained", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["walk_graph.py", "--shape", "tiny", *settings])
    walk_graph.main()
    report = json.loads((tmp_path / "walk_graph.json").read_text(encoding="utf-8"))
    assert all(len(spans) == 2 and min(spans) > 0 for spans in report["tokens"]["8"].values())
