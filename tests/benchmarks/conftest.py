"""The benchmark of the step, run once on the smallest model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def step_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `benchmarks/sft_step.py` wrote about three steps of a model of two layers."""
    folder = tmp_path_factory.mktemp("sft_step")
    sizes = ["--shape", "tiny", "--layers", "2", "--contexts", "32,64", "--steps", "3", "--rank", "4"]
    peers = ["--peers", "transformers,expertune:lean"]
    command = [sys.executable, str(ROOT / "benchmarks" / "sft_step.py"), *sizes, *peers, "--output", str(folder)]
    subprocess.run(command, check=True)
    return folder / "sft_step.json"
