"""What attention is timed on, and how much of it counts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attention
from expertune.attention.tiles import Tiles

CPU = torch.device("cpu")


def pairs(rows: attention.Rows, num_tokens: int) -> int:
    """Counted one by one."""
    behind = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    sees = (behind >= 0) & (behind < (rows.window or num_tokens))
    if rows.sequences is not None:
        sample = rows.sequences.of_rows(torch.arange(num_tokens))
        sees &= sample[:, None] == sample
    return int(sees.sum())


@pytest.mark.parametrize("words", ["whole", "window:5", "window:90", "packed:3-11", "packed:60-70"])
def test_the_scores_that_attend_are_counted(words: str) -> None:
    rows = attention.Rows.of(words, 50, CPU)
    assert rows.num_pairs == pairs(rows, 50)


@pytest.mark.parametrize("words", ["window", "packed:3", "whole:3", "padded:3-4"])
def test_other_rows_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match="expected whole, window:TOKENS or packed:FROM-TO, got"):
        attention.Rows.of(words, 50, CPU)


def test_it_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tokens", "20", "--widths", "24/16", "--rows", "whole", "packed:3-11", "--times", "2"]
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments, "--output", str(tmp_path)])
    attention.main()
    report = json.loads((tmp_path / "attention.json").read_text(encoding="utf-8"))
    assert [case["rows"] for case in report["cases"]] == ["whole", "packed:3-11"]
    for case in report["cases"]:
        assert case["kernels"]  # one without a GPU
        assert all(row["forward_us"] > 0 < row["backward_us"] for row in case["kernels"].values())


def test_a_kernel_that_computes_otherwise_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Tiles):
        name = "wrong"

        def backward(self, *given: Any) -> Any:
            dq, dk, dv = super().backward(*given)
            return dq, 1.1 * dk, dv

    monkeypatch.setattr(attention, "PREFERRED", (Tiles(), Wrong(), Tiles()))
    case = attention.Case((4, 2), (16, 16), 20, attention.Rows.of("whole", 20, CPU), CPU)
    with pytest.raises(RuntimeError, match=r"dk of wrong differs from that of tiles by 0\.1"):
        attention.measure(case, 1)
