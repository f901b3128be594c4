"""A model that was optimized goes through pickle, as to another process."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from expertune.hosts import transformers
from expertune.walk import STEPS
from tests.conftest import Checkpoint
from tests.hosts.recorded import make, step, tokens

_CODE = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.arange(5)[None]).logits.sum().item())
"""


@pytest.mark.parametrize("graphs", [True, False])
def test_a_model_can_be_pickled(checkpoint: Checkpoint, graphs: bool) -> None:
    ours = make(checkpoint("qwen3_moe"), "", graphs=graphs)
    step(ours, tokens(0))
    twin = pickle.loads(pickle.dumps(ours))
    for seed in range(2):
        torch.testing.assert_close(step(twin, tokens(seed)), step(ours, tokens(seed)))


def test_steps_are_numbered_anew(checkpoint: Checkpoint) -> None:
    """A compiled model looks its steps up by number, which in another process is another step's."""
    ours = make(checkpoint("qwen3_moe"), "", graphs=False)
    step(ours, tokens(0))
    twin = pickle.loads(pickle.dumps(ours))
    before, after = map(_steps, (ours, twin))
    assert len(before) == len(after) == 1
    assert before != after
    assert {STEPS[number].gate for number in before} == {STEPS[number].gate for number in after}


def _steps(model: nn.Module) -> set[int]:
    plans = [transformers.plan_of(module) for _, module in transformers.named_experts(model)]
    return {step.number for plan in plans for step, _ in plan._steps.values()}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_it_runs_in_a_process_that_knows_nothing_of_it(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    ours = make(checkpoint(family), family, graphs=True).eval()
    torch.save(ours, tmp_path / "model.pt")
    command = [sys.executable, "-c", _CODE, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(ours(torch.arange(5)[None]).logits.sum().item(), rel=1e-6)
