"""The example of examples/gsm8k on the real file, through the command line.

The file is looked for at EXPERTUNE_GSM8K, then as data/gsm8k/train.jsonl in a folder beside the repository.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertune.cli import app

ROOT = Path(__file__).parents[2]
BESIDE = sorted(ROOT.parent.glob("*/data/gsm8k/train.jsonl"))
DATA = Path(os.environ.get("EXPERTUNE_GSM8K") or (BESIDE[0] if BESIDE else "train.jsonl"))


def train(data: Path, output: Path, *overrides: str) -> list[float]:
    """The held-out losses of a run, first to last."""
    recipe = str(ROOT / "examples" / "gsm8k" / "recipe.yaml")
    arguments = [f"dataset_name={data}", f"output_dir={output}", "eval_size=24", *overrides]
    result = CliRunner().invoke(app, ["train", recipe, *arguments])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if line["eval_loss"] is not None]


@pytest.mark.skipif(not DATA.is_file(), reason="needs the GSM8K train.jsonl file: set EXPERTUNE_GSM8K to its path")
def test_held_out_loss_falls(tmp_path: Path) -> None:
    data, base = tmp_path / "train.jsonl", tmp_path / "base"
    data.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:1000]), encoding="utf-8")
    make_model = str(ROOT / "examples" / "gsm8k" / "make_model.py")
    subprocess.run([sys.executable, make_model, str(data), str(base)], check=True)
    losses = train(data, tmp_path / "full", f"model_name_or_path={base}", "max_steps=20", "eval_steps=10")
    assert len(losses) == 3  # before, after 10, after 20
    assert losses[0] == pytest.approx(7.62, abs=0.2)  # chance: the logarithm of the vocabulary
    assert losses[1] < losses[0] - 1
    assert losses[2] < losses[1] - 0.2

    model = f"model_name_or_path={tmp_path / 'full' / 'model'}"
    lora = train(data, tmp_path / "lora", model, "finetuning_type=lora", "r=8", "max_steps=4", "eval_steps=4")
    assert lora[0] == pytest.approx(losses[-1], rel=1e-4)  # an adapter begins as nothing
    assert lora[-1] == pytest.approx(lora[0], abs=0.05)  # and in four steps on so weak a base does no harm
