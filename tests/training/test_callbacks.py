import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from expertune import AdamW8bit
from expertune.training.callbacks import FiniteGradients, MetricsLog, PeriodicSave
from expertune.training.errors import UserError
from expertune.training.progress import Display

ARGUMENTS = TrainingArguments(output_dir="unused")


def state(step: int, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps)


def test_stops_before_the_step_of_a_gradient_that_is_not_finite() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    FiniteGradients().on_pre_optimizer_step(ARGUMENTS, state(3), TrainerControl(), model=model)
    model[1].weight.grad[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"gradient of 1\.weight is not finite in step 4"):
        FiniteGradients().on_pre_optimizer_step(ARGUMENTS, state(3), TrainerControl(), model=model)


@pytest.mark.parametrize("worst", [torch.inf, torch.nan])
def test_stops_where_the_optimizer_is_to_clip_by_the_norm_of_such_a_gradient(worst: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    optimizer = AdamW8bit(model.parameters())
    given = (ARGUMENTS, state(3), TrainerControl())
    optimizer.clip_coef = torch.tensor(1.0)
    FiniteGradients().on_pre_optimizer_step(*given, model=model, optimizer=optimizer)
    model[1].weight.grad[0, 0] = worst
    optimizer.clip_coef = (1 / torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])).clamp(max=1.0)
    with pytest.raises(UserError, match=r"gradient of 1\.weight is not finite in step 4"):
        FiniteGradients().on_pre_optimizer_step(*given, model=model, optimizer=optimizer)


def test_saves_every_few_steps_but_not_the_last() -> None:
    saved: list[str] = []
    callback = PeriodicSave(2, saved.append)
    for step in range(1, 7):
        callback.on_step_end(ARGUMENTS, state(step, max_steps=6), TrainerControl())
    assert saved == ["checkpoint-2", "checkpoint-4"]


def test_records_what_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Display(Console(file=StringIO())) as display:
        log = MetricsLog(display, path)
        control = TrainerControl()
        for step, tokens in ((1, 100.0), (2, 250.0)):
            log.on_step_begin(ARGUMENTS, state(step - 1, max_steps=2), control)
            log.on_step_end(ARGUMENTS, state(step, max_steps=2), control)
            logs = {"loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-4, "num_tokens": tokens}
            log.on_log(ARGUMENTS, state(step, max_steps=2), control, logs=logs)
        log.on_evaluate(ARGUMENTS, state(2, max_steps=2), control, metrics={"eval_loss": 3.0})
        log.on_log(ARGUMENTS, state(2, max_steps=2), control, logs={"train_loss": 1.5})
    assert control.should_log
    assert [(record.step, record.loss, record.eval_loss) for record in log.records] == [
        (1, 2.0, None),
        (2, 1.0, None),
        (2, None, 3.0),
    ]
    assert all(record.tokens_per_s > 0 for record in log.records[:2])  # type: ignore[operator]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
