"""Whether a run can fit its card at all, asked before the first step; and if not, the nearest setting that may.

What is asked is a lower bound (`memory.needs`): a run that is refused could not have run. One that passes may still run
out of memory later.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertune.memory.needs import Batches, ModelBytes, Needs, least_needs
from expertune.training.errors import UserError
from expertune.training.metrics import GIB
from expertune.training.recipe import Recipe

LENGTH_MULTIPLE = 256  # of lengths that are advised
Lengths: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


def check_fits(recipe: Recipe, model: ModelBytes, lengths: Lengths, room: int) -> None:
    """Refuse a run whose steps need more than there is.

    Args:
        recipe: the run.
        model: the bytes of its model, which lies on the card.
        lengths: tokens of each row that is trained on, as cut or packed.
        room: bytes that the card has beside the model.

    Raises:
        UserError: says what is needed by part, what there is, and the nearest setting that needs no more.
    """
    budget = room + model.base + model.trained
    lengths = np.sort(np.asarray(lengths))  # once: settings are tried by the hundred

    def fits(change: dict[str, Any]) -> bool:
        return needs(recipe.model_copy(update=change), model, lengths).total <= budget

    needed = needs(recipe, model, lengths)
    if needed.total <= budget:
        return
    change = next(filter(fits, _changes(recipe, lengths)), None)
    raise UserError(
        f"a step of this run takes at least {in_gib(needed.total)} GiB ({parts_in_gib(needed.parts())}), but the card "
        f"has {in_gib(budget)} GiB for it. {_advice(recipe, change)}"
    )


def needs(recipe: Recipe, model: ModelBytes, lengths: Lengths) -> Needs:
    """What a run takes at least.

    Args:
        recipe: the run.
        model: the bytes of its model.
        lengths: tokens of each row, before `max_length` cuts them.
    """
    cut = np.asarray(lengths) if recipe.max_length is None else np.minimum(lengths, recipe.max_length)
    optimizer = _optimizer_bytes(recipe.optim, model)
    return least_needs(model, optimizer=optimizer, memory=recipe.memory, batches=batches(recipe, cut))


def batches(recipe: Recipe, lengths: Lengths) -> Batches:
    """The largest micro batch that a run surely meets, whatever order its rows come in.

    Rows are drawn without repetition until all were seen. Of rows that are drawn, at worst the shortest, the longest
    sets the length of its batch. A last batch with fewer rows than the others is not counted on.

    Args:
        recipe: the run.
        lengths: tokens of each row.
    """
    ascending = np.sort(np.asarray(lengths))
    num_summed = recipe.gradient_accumulation_steps
    rows = min(recipe.per_device_train_batch_size, len(lengths))
    per_epoch = len(lengths) // rows
    steps_per_epoch = math.ceil(math.ceil(len(lengths) / rows) / num_summed)
    steps = recipe.max_steps or math.ceil((recipe.num_train_epochs or 1) * steps_per_epoch)
    drawn = min(steps * num_summed, per_epoch)
    # an epoch of its own, or what the first one has after its first step
    later = per_epoch if steps >= 2 * steps_per_epoch else max(drawn - num_summed, 0)
    if num_summed > 1:
        later = later * (num_summed - 1) // num_summed  # the first of each step meets no gradient

    def largest(num_batches: int) -> int:
        shortest = ascending[: num_batches * rows]
        if not len(shortest):
            return 0
        if recipe.packing:  # laid end to end; the largest batch has no less than the mean
            return int(max(shortest[-1], shortest.sum() // num_batches))
        return rows * int(shortest[-1])  # padded to the longest

    return Batches(tokens=largest(drawn), tokens_later=largest(later), sums_gradients=num_summed > 1)


def in_gib(num_bytes: float) -> str:
    """Bytes in GiB, to read."""
    return f"{num_bytes / GIB:.2f}"


def parts_in_gib(parts: dict[str, int]) -> str:
    """Parts in GiB, to read; those that are nothing are left out."""
    return ", ".join(f"{name} {in_gib(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)


def _optimizer_bytes(optim: str, model: ModelBytes) -> int:
    """Of the optimizer's state, at least; of an optimizer that is not known here, 0."""
    if optim in ("adamw_torch", "adamw_torch_fused"):
        return 2 * model.gradients
    return 2 * model.num_gradients if optim == "adamw_8bit" else 0


def _changes(recipe: Recipe, lengths: Lengths) -> Iterator[dict[str, Any]]:
    """What to change, the nearest first; another optimizer only where nothing else is enough."""
    nearest = list(_changes_of_activations(recipe, lengths))
    yield from nearest
    if recipe.optim != "adamw_8bit":
        yield from ({"optim": "adamw_8bit"} | change for change in ({}, *nearest))


def _changes_of_activations(recipe: Recipe, lengths: Lengths) -> Iterator[dict[str, Any]]:
    rows, num_summed = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * num_summed} if rows > 1 else {}
    leanest = {"memory": "auto"} if recipe.memory == "fast" else {}  # "auto" turns lean where it must
    yield leanest
    yield alone
    yield leanest | alone
    longest = min(max(lengths), recipe.max_length or max(lengths))
    for length in range((longest - 1) // LENGTH_MULTIPLE * LENGTH_MULTIPLE, 0, -LENGTH_MULTIPLE):
        yield leanest | alone | {"max_length": length}


def _advice(recipe: Recipe, change: dict[str, Any] | None) -> str:
    if change is None:
        is_full = recipe.finetuning_type == "full"
        smaller = "Set finetuning_type=lora" if is_full else "Lower r, train fewer target_modules"
        halved = ", set dtype=bfloat16" if recipe.dtype == "float32" else ""
        return (
            "No memory, batch or length makes it fit: the weights, their gradients and the optimizer's state are too "
            f"much. {smaller}{halved}, or take a smaller model or a larger card."
        )
    settings = " ".join(f"{name}={value}" for name, value in change.items())
    return f"The nearest setting that may fit: {settings}."
