"""The benchmark of the step runs from end to end, each peer in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_all_peers_take_the_same_steps(step_results: Path) -> None:
    report = json.loads(step_results.read_text())
    assert report["provenance"]["commit"]
    assert (report["shape"], report["layers"], report["rank"], report["steps"]) == ("tiny", 2, 4, 3)
    stock, ours = report["peers"]["transformers"], report["peers"]["expertune:lean"]
    assert [row["context"] for row in stock] == [row["context"] for row in ours] == [32, 64]
    for row, other in zip(ours, stock, strict=True):
        assert row["ms"] > 0
        assert row["first_step_ms"] > 0
        assert row["loss"] == pytest.approx(other["loss"], abs=0.01)
        # ln 512, the chance of a token; TRL 1.0 divides by the first token too, which nothing predicts
        assert row["loss"][0] == pytest.approx(6.24, abs=0.25)
        assert len(row["loss"]) == 3
    assert (step_results.parent / "sft_step.png").is_file()


def test_a_peer_that_is_not_known_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sft_step.py"), "--peers", "expertune,axolotl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown peers ['axolotl']" in done.stderr
