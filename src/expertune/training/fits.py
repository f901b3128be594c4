"""Whether a run can fit its card at all, asked before the first step; and if not, the nearest setting that may.

What is asked is a lower bound (`memory.needs`): a run that is refused could not have run. One that passes may still run
out of memory later.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from expertune.memory.needs import Batches, ModelBytes, Needs, least_needs
from expertune.training.errors import UserError
from expertune.training.recipe import Recipe

GIB = 2**30
_LENGTH_MULTIPLE = 256


def check_fits(recipe: Recipe, model: ModelBytes, lengths: Sequence[int], room: int) -> None:
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
    lengths = sorted(lengths)  # once: settings are tried by the dozen

    def fits(change: dict[str, Any]) -> bool:
        return needs(recipe.model_copy(update=change), model, lengths).total <= budget

    needed = needs(recipe, model, lengths)
    if needed.total <= budget:
        return
    change = next(filter(fits, _changes(recipe, lengths)), None)
    raise UserError(
        f"a step of this run takes at least {in_gib(needed.total)} GiB ({parts_in_gib(needed.parts())}), but the card "
        f"has {in_gib(budget)} GiB for it. {_advice(change)}"
    )


def needs(recipe: Recipe, model: ModelBytes, lengths: Sequence[int]) -> Needs:
    """What a run takes at least.

    Args:
        recipe: the run.
        model: the bytes of its model.
        lengths: tokens of each row, before `max_length` cuts them.
    """
    cut = [min(length, recipe.max_length or length) for length in lengths]
    optimizer = _optimizer_bytes(recipe.optim, model)
    return least_needs(model, optimizer=optimizer, memory=recipe.memory, batches=batches(recipe, cut))


def batches(recipe: Recipe, lengths: Sequence[int]) -> Batches:
    """The largest micro batch that a run surely meets, whatever order its rows come in.

    Rows are drawn without repetition until all were seen. Of rows that are drawn, at worst the shortest, the longest
    sets the length of its batch. A last batch with fewer rows than the others is not counted on.

    Args:
        recipe: the run.
        lengths: tokens of each row.
    """
    ascending = sorted(lengths)
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
        if not shortest:
            return 0
        if recipe.packing:  # laid end to end; the largest batch has no less than the mean
            return max(shortest[-1], sum(shortest) // num_batches)
        return rows * shortest[-1]  # padded to the longest

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


def _changes(recipe: Recipe, lengths: Iterable[int]) -> Iterator[dict[str, Any]]:
    """What to change, the nearest first; another optimizer only where nothing else is enough."""
    nearest = list(_changes_of_activations(recipe, lengths))
    yield from nearest
    if recipe.optim != "adamw_8bit":
        yield from ({"optim": "adamw_8bit"} | change for change in ({}, *nearest))


def _changes_of_activations(recipe: Recipe, lengths: Iterable[int]) -> Iterator[dict[str, Any]]:
    rows, num_summed = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * num_summed} if rows > 1 else {}
    leanest = {"memory": "auto"} if recipe.memory == "fast" else {}  # "auto" turns lean where it must
    yield leanest
    yield alone
    yield leanest | alone
    longest = max(min(length, recipe.max_length or length) for length in lengths)
    for length in range((longest - 1) // _LENGTH_MULTIPLE * _LENGTH_MULTIPLE, 0, -_LENGTH_MULTIPLE):
        yield leanest | alone | {"max_length": length}


def _advice(change: dict[str, Any] | None) -> str:
    if change is None:
        return (
            "No memory, batch or length makes it fit: the weights, their gradients and the optimizer's state are too "
            "much. Lower r, train fewer target_modules, or take a smaller model or a larger card."
        )
    settings = " ".join(f"{name}={value}" for name, value in change.items())
    return f"The nearest setting that may fit: {settings}."
