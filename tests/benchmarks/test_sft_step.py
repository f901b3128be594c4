"""The benchmark of the step runs from end to end, each peer in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft_worker import sample_lengths

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


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_several_samples_do_not_see_each_other(rows: str, tmp_path: Path) -> None:
    sizes = ["--shape", "tiny", "--layers", "2", "--contexts", "1024", "--steps", "2", "--rank", "4"]
    losses = {}
    for kind, peers in (("whole", "transformers"), (rows, "transformers,expertune")):
        command = [sys.executable, str(ROOT / "benchmarks" / "sft_step.py"), *sizes, "--rows", kind, "--peers", peers]
        subprocess.run([*command, "--output", str(tmp_path / kind)], check=True)
        report = json.loads((tmp_path / kind / "sft_step.json").read_text())
        losses[kind] = {peer: rows[0]["loss"] for peer, rows in report["peers"].items()}
    several = losses[rows]
    assert several["expertune"] == pytest.approx(several["transformers"], abs=0.001)
    assert several["transformers"] != losses["whole"]["transformers"]


def test_samples_fill_a_context() -> None:
    lengths = sample_lengths(4096, torch.Generator().manual_seed(0))
    assert sum(lengths) == 4096
    assert all(64 <= length < 512 for length in lengths[:-1])


def test_a_peer_that_is_not_known_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sft_step.py"), "--peers", "expertune,axolotl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown peers ['axolotl']" in done.stderr
