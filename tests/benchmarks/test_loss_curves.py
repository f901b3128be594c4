"""Loss curves of stock and of ours, from end to end on the smallest model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from curve_data import read_rows, train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough  # three processes
def test_three_steps(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{a} and {b} make", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    sizes = ["--steps", "3", "--seeds", "3", "--rank", "4", "--context", "64", "--batch", "2", "--data", str(data)]
    variants = ["--variants", "transformers,transformers:float32,expertune:lean"]
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_curves.py"), *sizes, *variants]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    report = json.loads((tmp_path / "loss_curves.json").read_text())
    assert report["provenance"]["torch"]
    assert (report["seeds"], report["data"]) == ([3], "rows.jsonl")
    for packing in ("unpacked", "packed"):
        (stock,), (exact,), (ours,) = report["losses"][packing].values()
        assert ours == pytest.approx(stock, abs=0.01)
        assert ours != stock  # or stock was compared with itself
        assert exact != stock
        assert report["residuals"][packing]["expertune:lean"]["steps"]["number"] == 3
    assert report["losses"]["packed"] != report["losses"]["unpacked"]
    assert (tmp_path / "loss_curves.png").is_file()


def test_rows_are_prompts_questions_or_messages(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"question": "c", "answer": "d"}\n{"question": "e"}\n')
    assert read_rows(data, 2) == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "\nd"}]
    with pytest.raises(ValueError, match=r"line 3: expected prompt and completion, .*, got \['question'\]"):
        read_rows(data, 3)


def test_the_tokenizer_is_small_and_loses_nothing() -> None:
    rows = read_rows(None, 50)
    tokenizer = train_tokenizer(rows, 512)
    assert len(tokenizer) <= 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    text = rows[0]["prompt"] + rows[0]["completion"] + " ¿é?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
