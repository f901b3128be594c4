"""Out of memory or disk, told so that the next run fits: what lay on the card by part, what helps, what was saved."""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from expertune.hosts.peft import adapter_and_base
from expertune.training.callbacks import Trainer
from expertune.training.errors import UserError, one_paragraph
from expertune.training.fits import LENGTH_MULTIPLE, in_gib, parts_in_gib
from expertune.training.metrics import GIB, peak_gib
from expertune.training.recipe import Recipe
from expertune.training.setup import without_adapters

_NUM_SETTINGS = 3
# of a disk that takes no more: full, the user's share of it or the file too large, read-only, broken
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on the card when memory ran out.

    Args:
        base: weights that are not trained.
        trained: weights that are.
        gradients: of trained weights.
        optimizer: its state.
        peak: the most that was held.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def rest(self) -> int:
        """Activations, and what else was held at the peak."""
        return max(self.peak - self.base - self.trained - self.gradients - self.optimizer, 0)

    def parts(self) -> dict[str, int]:
        """Each part by its name in words."""
        return {
            "base weights": self.base,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "activations and the rest": self.rest,
        }


@contextmanager
def told_out_of_memory(recipe: Recipe, trainer: Trainer, saves: Sequence[Path]) -> Iterator[None]:
    """Around training and evaluation.

    Args:
        recipe: of the run.
        trainer: of the run.
        saves: the folders that it has written, the last one last.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        is_evaluation = not trainer.model.training
        rows = trainer.eval_dataset if is_evaluation else trainer.train_dataset
        longest = max(len(ids) for ids in rows["input_ids"])
        step, held = trainer.state.global_step, _held(trainer)
        can_be_lean = not is_evaluation and without_adapters(trainer.model).supports_gradient_checkpointing
        helpful = settings(recipe, held, longest, can_be_lean=can_be_lean)
        raise UserError(
            f"out of GPU memory in {f'the evaluation after step {step}' if is_evaluation else f'step {step + 1}'}. At "
            f"the peak {in_gib(held.peak)} GiB were held: {parts_in_gib(held.parts())}. What helps here, the best "
            f"first: {'; '.join(helpful)}. {_saved(saves)}"
        ) from error


@contextmanager
def told_disk_full(folder: Path, saves: Sequence[Path]) -> Iterator[None]:
    """Around all that writes into the folder of a run.

    Args:
        folder: of the run.
        saves: the folders that it has written there, the last one last.

    Raises:
        UserError: the disk takes no more.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors' has no number
        if isinstance(error, OSError) and error.errno not in _OF_DISK:
            raise
        raise UserError(
            f"output_dir {str(folder)!r} can be written no more: {one_paragraph(error)}. Make room on the disk, or "
            f"choose an output_dir on another one. {_saved(saves)}"
        ) from error


def settings(recipe: Recipe, held: Held, longest: int, *, can_be_lean: bool) -> list[str]:
    """What to set so that less is held, the best first.

    Args:
        recipe: of the run.
        held: when memory ran out.
        longest: tokens of the longest row.
        can_be_lean: whether layers are run again under memory=lean; none is in an evaluation.
    """
    is_new = adapter_and_base(recipe.model_name_or_path)[0] is None
    rows, num_summed = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    of_activations = {
        "memory=lean": recipe.memory != "lean" and can_be_lean,
        f"per_device_train_batch_size=1 gradient_accumulation_steps={rows * num_summed}": rows > 1,
        f"max_length={_half(longest)}": longest > LENGTH_MULTIPLE,
    }
    of_weights = {
        "optim=adamw_8bit": recipe.optim.startswith("adamw_torch"),
        f"r={recipe.r // 2}": recipe.finetuning_type == "lora" and recipe.r > 1 and is_new,
        "finetuning_type=lora": recipe.finetuning_type == "full",
        "dtype=bfloat16": recipe.dtype == "float32",
    }
    parts = [of_activations, of_weights]
    if held.trained + held.gradients + held.optimizer > held.rest:
        parts.reverse()
    helpful = [setting for part in parts for setting, helps in part.items() if helps]
    return [*helpful, "a card with more memory"][:_NUM_SETTINGS]


def _half(length: int) -> int:
    return max(length // 2 // LENGTH_MULTIPLE, 1) * LENGTH_MULTIPLE


def _held(trainer: Trainer) -> Held:
    """Counted from the tensors that are there."""
    parameters = list(trainer.model.parameters())
    states: list[dict[str, Any]] = [] if trainer.optimizer is None else list(trainer.optimizer.state.values())
    state = [value for value in chain.from_iterable(each.values() for each in states) if isinstance(value, Tensor)]
    return Held(
        base=_num_bytes(p for p in parameters if not p.requires_grad),
        trained=_num_bytes(p for p in parameters if p.requires_grad),
        gradients=_num_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=_num_bytes(state),
        peak=int((peak_gib() or 0) * GIB),
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _saved(saves: Sequence[Path]) -> str:
    if not saves:
        return "No weights were saved yet; save_steps saves them on the way."
    return (
        f"The weights in {saves[-1]} stand; to go on from them, set model_name_or_path={saves[-1]} and another "
        "output_dir."
    )
