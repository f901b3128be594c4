"""What is refused before the first step: never what could run, and with the nearest setting that may."""

from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from expertune.memory.needs import LayerBytes, ModelBytes
from expertune.training import run as run_module
from expertune.training.errors import UserError
from expertune.training.fits import GIB, batches, check_fits, needs
from expertune.training.recipe import Recipe
from expertune.training.run import run

Make = Callable[..., Recipe]


def recipe_of(**fields: Any) -> Recipe:
    return Recipe(**{"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"} | fields)


def micro_batches(recipe: Recipe, order: Sequence[Sequence[int]]) -> Iterator[tuple[int, bool]]:
    """Tokens of each micro batch of a run that draws rows in this order, epoch by epoch, and whether it is a later one.

    A later one comes after the first step, and with several a step after the first of its own.
    """
    size, summed = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    step = 0
    for lengths in order:
        split = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        for i in range(0, len(split), summed):
            for number, rows in enumerate(split[i : i + summed]):
                tokens = sum(rows) if recipe.packing else len(rows) * max(rows)
                yield tokens, step > 0 and (number > 0 or summed == 1)
            step += 1
            if step == recipe.max_steps:
                return


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lengths", [(1, 2, 3, 9), (3, 5, 2, 8, 4), (7, 7, 7, 7, 7, 1)])
def test_whatever_the_order_no_run_meets_less(lengths: tuple[int, ...], packing: bool) -> None:
    for size, summed, steps in product((1, 2, 3), (1, 2, 3), (1, 2, 3, 5)):
        recipe = recipe_of(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=summed,
            max_steps=steps,
            packing=packing,
        )
        orders = list(permutations(lengths))
        # what a run meets in the second epoch does not hang on the first
        epochs = [orders, orders[:: len(orders) // 6]]
        runs = [list(micro_batches(recipe, (*order, *order))) for order in product(*epochs)]
        least = min(max(tokens for tokens, _ in each) for each in runs)
        least_later = min(max((tokens for tokens, is_later in each if is_later), default=0) for each in runs)
        found = batches(recipe, lengths)
        assert found.sums_gradients == (summed > 1)
        assert 0 < found.tokens <= least
        assert found.tokens_later <= least_later
        if not packing and len(lengths) % size == 0:
            assert found.tokens == least


def test_one_row_is_a_batch_of_its_own() -> None:
    found = batches(recipe_of(per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=3), [5])
    assert (found.tokens, found.tokens_later) == (5, 5)


@pytest.mark.parametrize(("epochs", "expected"), [(0.5, 20), (1, 40), (None, 40), (2, 40)])
def test_of_half_an_epoch_the_shorter_half_is_counted_on(epochs: float | None, expected: int) -> None:
    recipe = recipe_of(per_device_train_batch_size=1, gradient_accumulation_steps=1, num_train_epochs=epochs)
    assert batches(recipe, [10, 20, 30, 40]).tokens == expected


# bytes; each of 4 layers takes 1 MiB a token as an input and 4 in the experts
MIB = 2**20
MODEL = ModelBytes(
    base=10 * GIB,
    trained=GIB,
    gradients=GIB,
    num_gradients=GIB // 4,
    layers=(LayerBytes(MIB, 4 * MIB),) * 4,
)
SETTINGS: dict[str, Any] = {
    "memory": "fast",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "max_length": 1024,
}
LENGTHS = [1024] * 4


def refusal(room_gib: float, model: ModelBytes = MODEL, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        check_fits(recipe_of(**SETTINGS | fields), model, LENGTHS, int(room_gib * GIB))
    return str(raised.value)


def test_what_fits_passes() -> None:
    check_fits(recipe_of(**SETTINGS), MODEL, LENGTHS, 32 * GIB)
    assert needs(recipe_of(**SETTINGS), MODEL, LENGTHS).total == (10 + 1 + 32) * GIB


def test_the_numbers_are_told() -> None:
    told = refusal(31.5)
    assert told.startswith(
        "a step of this run takes at least 43.00 GiB (base weights 10.00, trained weights 1.00, kept by experts 32.00)"
    )
    assert "the card has 42.50 GiB for it" in told


NEAREST: dict[str, tuple[float, dict[str, Any], str]] = {
    "leaner": (16, {}, "memory=auto"),
    "a smaller batch": (15, {"memory": "lean"}, "per_device_train_batch_size=1 gradient_accumulation_steps=2"),
    "both": (8, {}, "memory=auto per_device_train_batch_size=1 gradient_accumulation_steps=2"),
    "shorter": (
        6,
        {},
        "memory=auto per_device_train_batch_size=1 gradient_accumulation_steps=2 max_length=768",
    ),
    "shorter alone": (5.9, {"memory": "lean", "per_device_train_batch_size": 1}, "max_length=512"),
    "optimizer": (
        2.9,
        {"memory": "lean", "per_device_train_batch_size": 1, "max_length": 256},
        "optim=adamw_8bit",
    ),
    "all of it": (
        2.9,
        {},
        "optim=adamw_8bit memory=auto per_device_train_batch_size=1 gradient_accumulation_steps=2 max_length=256",
    ),
}


@pytest.mark.parametrize(("room_gib", "fields", "expected"), NEAREST.values(), ids=NEAREST)
def test_the_nearest_setting_is_told_and_fits(room_gib: float, fields: dict[str, Any], expected: str) -> None:
    told = refusal(room_gib, **fields)
    assert told.endswith(f"The nearest setting that may fit: {expected}.")
    changed = dict(setting.split("=") for setting in expected.split())
    values = {name: value if name in ("memory", "optim") else int(value) for name, value in changed.items()}
    check_fits(recipe_of(**SETTINGS | fields | values), MODEL, LENGTHS, int(room_gib * GIB))


def test_where_no_setting_helps_that_is_told() -> None:
    assert "Lower r, train fewer target_modules, or take a smaller model" in refusal(1)
    assert "Set finetuning_type=lora, or take" in refusal(1, finetuning_type="full")
    assert "Set finetuning_type=lora, set dtype=bfloat16, or" in refusal(1, finetuning_type="full", dtype="float32")


@pytest.mark.parametrize("fields", [{"max_length": None}, {"max_length": 100}, {"packing": True}])
def test_a_run_is_refused_before_its_first_step(
    fields: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a card of which nothing is free, and on one with room enough."""
    asked: list[torch.device] = []

    def no_room(device: torch.device) -> int:
        asked.append(device)
        return 0

    monkeypatch.setattr(run_module, "room_of", no_room)
    with pytest.raises(UserError, match=r"takes at least 0\.\d\d GiB .*gradients.*the card has 0\.\d\d GiB for it"):
        run(make(memory="fast", r=64, **fields), Console(file=StringIO()))
    assert asked == [torch.device("cpu")]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run_module, "room_of", lambda _: GIB)
    run(make(memory="fast", r=64, max_steps=1, **fields), Console(file=StringIO()))
