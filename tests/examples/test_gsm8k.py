"""The GSM8K example on the real file: some tens of steps, after which the held-out loss has fallen.

The file is looked for at EXPERTUNE_GSM8K, then as data/gsm8k/train.jsonl in a folder beside the repository.
"""

import os
import runpy
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from expertune.training.recipe_file import load_recipe
from expertune.training.run import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k"
BESIDE = sorted(EXAMPLE.parents[2].glob("*/data/gsm8k/train.jsonl"))
FILE = os.environ.get("EXPERTUNE_GSM8K") or (str(BESIDE[0]) if BESIDE else None)


@pytest.mark.skipif(FILE is None, reason="needs the GSM8K train.jsonl file: set EXPERTUNE_GSM8K to its path")
def test_held_out_loss_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    monkeypatch.setattr("sys.argv", ["make_model.py", str(FILE), str(base), "--hidden-size", "64"])
    runpy.run_path(str(EXAMPLE / "make_model.py"), run_name="__main__")
    short = [f"dataset_name={FILE}", "eval_size=40", "per_device_train_batch_size=4"]

    overrides = [f"model_name_or_path={base}", f"output_dir={tmp_path / 'full'}", "max_steps=40", *short]
    full = run(load_recipe(EXAMPLE / "recipe.yaml", overrides), Console(quiet=True))
    assert full.eval_losses[-1] < 0.85 * full.eval_losses[0]

    overrides = [f"model_name_or_path={full.weights}", f"output_dir={tmp_path / 'lora'}", "max_steps=20", *short]
    lora = run(load_recipe(EXAMPLE / "recipe.yaml", [*overrides, "finetuning_type=lora"]), Console(quiet=True))
    assert lora.eval_losses[-1] < lora.eval_losses[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full.weights), lora.weights)
