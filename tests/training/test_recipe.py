from typing import Any

import pytest

from expertune.training.errors import UserError
from expertune.training.recipe import LORA_FIELDS, Recipe
from expertune.training.recipe_file import make_recipe

NEEDED: dict[str, Any] = {"model_name_or_path": "model", "dataset_name": "data.jsonl", "output_dir": "out"}


def test_every_field_is_documented() -> None:
    assert [name for name, field in Recipe.model_fields.items() if not field.description] == []


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "lora in full": ({"finetuning_type": "full", "r": 16}, "r belong to LoRA"),
    "two evaluations": ({"eval_size": 10, "eval_dataset_name": "x.jsonl"}, "eval_size and eval_dataset_name"),
    "endless": ({"learning_rate": float("inf")}, "finite"),
    "endless rows": ({"eval_size": float("inf")}, "finite"),
    "half a row": ({"eval_size": 1.5}, "whole number of rows"),
    "no evaluation": ({"eval_steps": 10}, "nothing to evaluate on"),
    "split of nothing": ({"dataset_test_split": "test"}, "without eval_dataset_name"),
    "packing without length": ({"packing": True, "max_length": None}, "set max_length"),
    "two lengths": ({"max_steps": 1, "num_train_epochs": 1}, "how long to train"),
    "warm-up of a constant": ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
    "rank 0": ({"r": 0}, "r: input should be greater than 0, got 0"),
    "rank 0 of a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: input should be greater than 0, got 0"),
    "alpha 0 of a pattern": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: input should be greater than 0, got 0"),
    "seed -1": ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
    "a number as text": ({"max_steps": "many"}, "max_steps: input should be a valid integer, got 'many'"),
    "a text as number": ({"optim": 3}, "optim: input should be a valid string, got 3"),
    "a yes as number": ({"learning_rate": True}, "learning_rate: .*got True"),
    "unknown column": ({"columns": {"question": "promt"}}, "columns: .*'prompt'.*got 'promt'"),
}


@pytest.mark.parametrize(("fields", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_refuses(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_recipe(NEEDED | fields)


@pytest.mark.parametrize("fields", [{"r": 4, "max_steps": 3}, {"finetuning_type": "full"}, {"eval_size": 0.1}], ids=str)
def test_resolved_makes_the_same_recipe(fields: dict[str, Any]) -> None:
    recipe = make_recipe(NEEDED | fields)
    resolved = recipe.resolved()
    assert make_recipe(resolved) == recipe
    left_out = set(LORA_FIELDS) if recipe.finetuning_type == "full" else set()
    assert set(resolved) == set(Recipe.model_fields) - left_out


def test_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(NEEDED).r = 3  # type: ignore[misc]
