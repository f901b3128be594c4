"""What watches a run from inside TRL's trainer: the numbers, the saves, and a halt where they stop being numbers."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from expertune.hosts.clipping import adamw_8bit_of
from expertune.training.errors import UserError
from expertune.training.metrics import Record, append_json, peak_gib
from expertune.training.progress import Display

FIRST_STEP = "first step (allocates memory, compiles kernels)"


class Trainer(SFTTrainer):
    """TRL's trainer, halted before the backward pass of a batch whose loss is not a number."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch. It is looked at here, where TRL has waited for forward, and not after backward."""
        given = super().compute_loss(model, *args, **kwargs)
        loss = given[0] if isinstance(given, tuple) else given
        if model.training and not torch.isfinite(loss):
            raise not_finite(f"the loss is {loss.item()}", self.state.global_step)
        return given


class FiniteGradients(TrainerCallback):
    """Halts a run before an optimizer step whose gradient is not finite, so that the weights stay what they were."""

    def on_pre_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the norm of all gradients, or at what it clips them by; name the first bad one."""
        model, optimizer = kwargs["model"], adamw_8bit_of(kwargs.get("optimizer"))
        if optimizer is not None and optimizer.clip_coef is not None:
            is_finite = bool(optimizer.clip_coef > 0)  # zero or not a number where the norm is infinite or none
        else:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            is_finite = math.isfinite(torch.nn.utils.get_total_norm(grads))
        if not is_finite:
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            # where all were multiplied to clip them, one bad gradient has made all of them bad; else the name helps
            bad = [name for name, grad in named if not grad.isfinite().all()]
            which = f"the gradient of {bad[0]}" if len(bad) < len(named) else "the gradient"
            raise not_finite(f"{which} is not finite", state.global_step)


def not_finite(what: str, step: int) -> UserError:
    """The error that halts the run; `step` is the last that was good."""
    return UserError(
        f"{what} in step {step + 1}; the run was halted and its weights are not saved. What was saved before is kept. "
        "Lower learning_rate, add warmup_steps, or set dtype to float32; then look at the rows of that step."
    )


class MetricsLog(TrainerCallback):
    """Turns what the trainer logs into records: into memory, into a file, onto the display.

    Args:
        display: shows them.
        path: of the file of JSON lines.
    """

    def __init__(self, display: Display, path: Path) -> None:
        self.records: list[Record] = []
        self._display = display
        self._path = path
        self._start_s = self._step_start_s = time.perf_counter()
        self._busy_s = self._busy_total_s = 0.0
        self._num_tokens = 0.0

    def on_step_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """The first step is a stage of its own: it may take minutes."""
        if state.global_step == 0:
            self._display.begin_stage(FIRST_STEP)
        self._step_start_s = time.perf_counter()

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Move the bar, and have the last step logged too."""
        seconds = time.perf_counter() - self._step_start_s
        self._busy_s += seconds
        if state.global_step == 1:
            self._display.end_stage()
            self._display.start_bar(state.max_steps)
        else:
            self._busy_total_s += seconds  # the first step is not like the others
        self._display.advance(state.global_step)
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any) -> None:
        """A record of the training."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        tokens, self._num_tokens = logs["num_tokens"] - self._num_tokens, logs["num_tokens"]
        self._add(
            Record(
                step=state.global_step,
                loss=logs["loss"],
                grad_norm=logs.get("grad_norm"),
                learning_rate=logs.get("learning_rate"),
                tokens_per_s=tokens / self._busy_s,
                peak_gib=peak_gib(),
                elapsed_s=self._elapsed_s(),
            ),
            state.max_steps,
        )
        self._busy_s = 0.0

    def on_evaluate(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """A record of an evaluation."""
        loss = kwargs["metrics"]["eval_loss"]
        self._add(Record(step=state.global_step, eval_loss=loss, elapsed_s=self._elapsed_s()), state.max_steps)

    def on_train_end(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """The bar is done."""
        self._display.stop_bar()

    def _elapsed_s(self) -> float:
        return round(time.perf_counter() - self._start_s, 3)

    def _add(self, record: Record, num_steps: int) -> None:
        self.records.append(record)
        append_json(self._path, record)
        step_s = self._busy_total_s / max(record.step - 1, 1)
        self._display.show(record, num_steps, eta_s=step_s * (num_steps - record.step))


class PeriodicSave(TrainerCallback):
    """Saves the weights every few steps.

    Args:
        every: steps.
        save: called with the name of the folder to write.
    """

    def __init__(self, every: int, save: Callable[[str], object]) -> None:
        self._every = every
        self._save = save

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Save to `checkpoint-N` after step N; the last step is saved by the run itself."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._save(f"checkpoint-{state.global_step}")
