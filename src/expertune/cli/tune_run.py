"""A run of `expertune tune`: one layer is walked to see what its kernels ask for, then each of that is searched.

Nothing here lists the products of a layer: the launchers' own questions do, so that what is tuned is what runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from expertune.activations import HostGate, SwiGlu
from expertune.backends import triton
from expertune.cli.tune_progress import TuneProgress
from expertune.experts import experts
from expertune.hosts.layouts import outline
from expertune.kernels.device import architecture
from expertune.kernels.tuning.cache import CacheFile
from expertune.kernels.tuning.configs import Config
from expertune.kernels.tuning.jobs import Batch, make_job
from expertune.kernels.tuning.lookup import TUNED, Key
from expertune.kernels.tuning.search import Timer, Trial, best, median_us, search
from expertune.kernels.tuning.tables import candidates
from expertune.shapes import ExpertsLayout, LoraFactors, Problem
from expertune.training.errors import UserError, one_paragraph
from expertune.walk import ExpertsStep, Projection


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to tune for.

    Args:
        layouts: the experts of the model's layers.
        top_k: `K`.
        rank: `R`; 0 for experts without LoRA.
        tokens: counts of tokens in a pass.
        dtype: of the weights.
    """

    layouts: tuple[ExpertsLayout, ...]
    top_k: int
    rank: int
    tokens: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Task:
    """One key, the rows that it is searched on, and what is tried."""

    key: Key
    batch: Batch
    candidates: list[Config]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a task; `chosen` is None where every candidate was disqualified."""

    task: Task
    before: Trial
    chosen: Trial | None


def request_for(model: str | Sequence[int], *, rank: int, tokens: Sequence[int], dtype: str) -> Request:
    """The request of the command line.

    Args:
        model: a hub id or folder, or `E, K, D, F`.
        rank: `R`.
        tokens: counts of tokens in a pass.
        dtype: by its name.

    Raises:
        UserError: the model cannot be had, or the numbers do not fit.
    """
    try:
        if isinstance(model, str):
            found = outline(model)
            layouts, top_k = found.layouts, found.top_k
        else:
            num_experts, top_k, model_width, expert_width = model
            layouts = (
                ExpertsLayout(
                    num_experts=num_experts,
                    model_width=model_width,
                    expert_width=expert_width,
                    has_gate=True,
                    is_transposed=False,
                    has_bias=False,
                ),
            )
    except (ValueError, OSError) as error:
        raise UserError(f"model {model!r}: {one_paragraph(error)}") from error
    if any(top_k > layout.num_experts for layout in layouts):
        raise UserError(f"a token cannot take {top_k} of {layouts[0].num_experts} experts.")
    return Request(layouts=layouts, top_k=top_k, rank=rank, tokens=tuple(tokens), dtype=getattr(torch, dtype))


def run(request: Request, console: Console, timer: Timer = median_us) -> None:
    """Tune, write what was found to the cache, and print it.

    Args:
        request: what to tune for.
        console: to print on.
        timer: the time of a call, in microseconds.

    Raises:
        UserError: our kernels do not run here, or the cache cannot be written.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for layout in request.layouts:
        _check(layout, request, device)
    TUNED.forget()
    cache = _cache(device, console)
    try:
        tasks = [task for layout in request.layouts for task in _tasks(layout, request, device)]
        with TuneProgress(console, num_trials=sum(len(task.candidates) for task in tasks)) as progress:
            results = [_search(task, progress, timer) for task in tasks]
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory does not hold one layer of these experts; try fewer --tokens.") from error
    console.print(_table(results))
    _say(console, f"written to {cache.path}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check(layout: ExpertsLayout, request: Request, device: torch.device) -> None:
    if reason := triton.BACKEND.why_not(Problem.of(layout, request.dtype, device)):
        raise UserError(
            f"the kernels cannot be tuned here: our Triton backend {reason}. Run this on the card that will train."
        )


def _cache(device: torch.device, console: Console) -> CacheFile:
    """The cache, written once: what cannot be written is better known before the search than after it."""
    try:
        cache = TUNED.file(device)
        if (reason := cache.read()[1]) is not None:
            _say(console, f"{cache.path} cannot be used ({reason}) and is written anew.")
        cache.add({})
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise UserError(f"the cache cannot be written: {error}") from error
    return cache


def _tasks(layout: ExpertsLayout, request: Request, device: torch.device) -> list[Task]:
    """What the kernels of a layer ask for at each count of tokens, and was not asked for before."""
    tasks = []
    for num_tokens in request.tokens:
        batch = Batch(num_tokens=num_tokens, top_k=request.top_k, num_experts=layout.num_experts)
        known = TUNED.answers()
        _walk_once(layout, request, batch, device)
        for key, current in TUNED.answers().items():
            if key not in known:
                tried = candidates(key.shape, architecture(device), key.dtype.itemsize, current)
                tasks.append(Task(key=key, batch=batch, candidates=tried))
    return tasks


def _walk_once(layout: ExpertsLayout, request: Request, batch: Batch, device: torch.device) -> None:
    """One forward and backward pass of a layer, on zeros."""

    def zeros(*shape: int, dtype: torch.dtype = request.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def projection(width_in: int, width_out: int) -> Projection:
        num_experts, rank = layout.num_experts, request.rank
        shape = (num_experts, width_in, width_out) if layout.is_transposed else (num_experts, width_out, width_in)
        adapter = LoraFactors(  # float32, as PEFT keeps trained adapters
            a=zeros(num_experts * rank, width_in, dtype=torch.float32).requires_grad_(),
            b=zeros(width_out, rank * num_experts, dtype=torch.float32).requires_grad_(),
            scale=1.0,
        )
        return Projection(weight=zeros(*shape), adapters=(adapter,) if rank else ())

    step = ExpertsStep(
        layout=replace(layout, has_bias=False),
        gate=SwiGlu() if layout.has_gate else HostGate(torch.relu),
        backend=triton.BACKEND,
    )
    model_width, expert_width = layout.model_width, layout.expert_width
    projections = (projection(model_width, layout.first_width), projection(expert_width, model_width))
    x_TD = zeros(batch.num_tokens, model_width).requires_grad_()
    expert_TK = torch.rand(batch.num_tokens, batch.num_experts, device=device).topk(batch.top_k).indices
    weight_TK = zeros(*expert_TK.shape)
    out_TD = experts(x_TD, step.dispatch(expert_TK), weight_TK, projections, step)
    torch.autograd.backward(out_TD, torch.ones_like(out_TD))


def _search(task: Task, progress: TuneProgress, timer: Timer) -> Result:
    name = f"{task.key.operation.kernel} {task.key.shape}, {_rows(task.key)} rows"
    progress.begin(name)
    job = make_job(task.key, task.batch)
    trials = []
    for trial in search(job, task.candidates, timer):
        trials.append(trial)
        progress.advance()
        if trial.disqualified is not None:
            progress.say(f"disqualified: {name}: {trial.config}: {trial.disqualified}")
    result = Result(task=task, before=trials[0], chosen=best(trials))
    if result.chosen is None:
        progress.say(f"{name}: nothing was right, so nothing is kept; please report it")
    else:
        try:
            TUNED.keep(task.key, result.chosen.config)
        except OSError as error:
            raise UserError(f"the cache cannot be written: {error}") from error
        progress.end(f"{result.chosen.config}: {result.before.time_us:,.1f} → {result.chosen.time_us:,.1f} µs")
    return result


def _table(results: Sequence[Result]) -> Table:
    table = Table("kernel", "shape", "rows", "chosen", box=box.SIMPLE, caption="rows: of an expert, on average")
    for header in ("µs before", "µs now"):
        table.add_column(header, justify="right")
    for result in results:
        if (chosen := result.chosen) is not None:
            key = result.task.key
            times = (f"{trial.time_us:,.1f}" for trial in (result.before, chosen))
            table.add_row(key.operation.kernel, str(key.shape), _rows(key), str(chosen.config), *times)
    return table


def _rows(key: Key) -> str:
    return f"{key.bucket}+" if key.bucket == 2048 else f"≤{key.bucket}"
