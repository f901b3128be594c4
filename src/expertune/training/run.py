"""A run from end to end: its stages in order, and what it leaves in the output folder."""

import gc
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from datasets import concatenate_datasets
from jinja2 import TemplateError
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.training_args import OptimizerNames
from transformers.utils import GENERATION_CONFIG_NAME
from trl import pack_dataset

import expertune
from expertune.hosts.clipping import clip_in_step
from expertune.hosts.peft import adapter_and_base
from expertune.hosts.sizes import model_bytes
from expertune.hosts.transformers import num_positions
from expertune.hosts.trl import GradientProof
from expertune.memory.meter import room_of
from expertune.training.callbacks import FiniteGradients, MetricsLog, PeriodicSave, Trainer
from expertune.training.data import Rows, read_data, to_dataset
from expertune.training.errors import UserError, one_paragraph
from expertune.training.exact_json import given_back_by
from expertune.training.fits import check_fits
from expertune.training.metrics import Record, plot_losses
from expertune.training.out_of_memory import told_disk_full, told_out_of_memory
from expertune.training.output import OutputFolder
from expertune.training.progress import Display
from expertune.training.recipe import Recipe
from expertune.training.recipe_file import VERSIONS
from expertune.training.setup import (
    add_adapters,
    check_packing,
    load_model,
    make_arguments,
    name_decoder,
    own_optimizer,
    set_balance_loss,
    without_adapters,
)
from expertune.training.supervision import (
    Supervision,
    check_chat_template,
    check_positions,
    check_vocabulary,
    ends_with_any,
    first_row_refused,
    first_row_without_answer,
    nothing_to_learn,
    refused_by_template,
    supervise,
)

_ROUNDED = "warning: bfloat16 weights round small updates away; with optim=adamw_8bit they count, as in float32"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left.

    Args:
        output_dir: with everything that it wrote.
        weights: the folder in it with the adapter or the model, and the tokenizer.
        records: the numbers, as in `metrics.jsonl`.
    """

    output_dir: Path
    weights: Path
    records: tuple[Record, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of each logging step."""
        return tuple(record.loss for record in self.records if record.loss is not None)

    @property
    def eval_losses(self) -> tuple[float, ...]:
        """The held-out loss: before the first step, at each evaluation, after the last step."""
        return tuple(record.eval_loss for record in self.records if record.eval_loss is not None)


def run(recipe: Recipe, console: Console | None = None, *, source: str | None = None) -> RunResult:
    """Fine-tune as a recipe says, and write the result to its output folder.

    Args:
        recipe: what to do.
        console: where to show it; None takes the standard output.
        source: the file that the recipe was read from, which is not overwritten.

    Raises:
        UserError: something in the recipe, the data or the model cannot be done, does not fit the card, or the loss is
            no longer a number.
        RuntimeError: an adapter received no gradient in the first step.
    """
    folder = OutputFolder(
        recipe.output_dir, overwrite=recipe.overwrite_output_dir, reads=_reads(recipe) | {"recipe": source}
    )
    transformers.set_seed(recipe.seed)
    display = Display(console or Console())
    with display, _bars_of_hosts(shown=False), warnings.catch_warnings(), folder.never_left_empty():
        # names that the hosts changed among themselves; a user of a recipe can do nothing about them
        warnings.simplefilter("ignore", FutureWarning)
        with display.stage("reading the data"):
            arguments = make_arguments(recipe, has_eval=bool(recipe.eval_size or recipe.eval_dataset_name))
            train_rows, eval_rows = read_data(recipe)
        if train_rows.unread:
            left = ", ".join(train_rows.unread)
            display.say(f"not trained on: {left}; rows are of the shape {train_rows.shape}, which has no such columns")
        # a download may take long, and its bar is the hub's own
        shown = display.console.is_terminal
        with display.stage("loading the model", spins=False), _bars_of_hosts(shown=shown):
            model, tokenizer = load_model(recipe)
        name_decoder(model)
        check_packing(model, recipe)
        set_balance_loss(model, recipe)
        display.say(_backends(model))
        if recipe.finetuning_type == "lora":
            with display.stage("attaching adapters"):
                model = add_adapters(model, recipe)
        else:
            display.console.print(expertune.trained(model))
        with display.stage("tokenising"):
            trainer, sets = _make_trainer(recipe, arguments, model, tokenizer, (train_rows, eval_rows))
        _say_supervision(display, sets, recipe)
        _say_where_nothing_stops(display, sets[0], trainer)
        _check_fits(recipe, model, trainer)
        if recipe.optim != OptimizerNames.ADAMW_8BIT and any(
            p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()
        ):
            display.say(_ROUNDED, style="yellow")
        _make_optimizer(trainer)
        with _told_what_lies_aside(folder, display):
            folder.claim()
            _write_recipe(folder.file("recipe.yaml"), recipe, model)
            log = MetricsLog(display, folder.file("metrics.jsonl"))
            result = _train(recipe, trainer, folder, log, display)
        display.say(f"wrote {result.weights}, and recipe.yaml, metrics.jsonl and loss.png beside it", style="green")
        return result


@contextmanager
def _told_what_lies_aside(folder: OutputFolder, display: Display) -> Iterator[None]:
    """Say where earlier runs are, if this one, which was to replace them, does not finish."""
    try:
        yield
    except BaseException:
        for path in folder.aside:
            display.say(f"the earlier run was not replaced; it lies in {path}", style="yellow")
        raise


def _reads(recipe: Recipe) -> dict[str, str | None]:
    """What a run reads, by the name of the setting."""
    names = ("model_name_or_path", "chat_template_path", "dataset_name", "eval_dataset_name")
    reads: dict[str, str | None] = {name: getattr(recipe, name) for name in names}
    try:
        _, base = adapter_and_base(recipe.model_name_or_path)
    except ValueError as error:
        raise UserError(f"model_name_or_path {recipe.model_name_or_path!r}: {one_paragraph(error)}") from error
    return reads | {"base_model_name_or_path": base}


def _tokenised(
    arguments: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: tuple[Rows, Rows | None]
) -> Trainer:
    """TRL's trainer, which has tokenised the rows."""
    raw = [to_dataset(part, tokenizer) for part in rows if part is not None]
    where = [place for part in rows if part is not None for place in part.where]
    if "messages" in raw[0].column_names:
        check_chat_template(tokenizer)
        arguments.assistant_only_loss = True
    try:
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=raw[0],
            eval_dataset=raw[1] if len(raw) > 1 else None,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=own_optimizer(arguments),
        )
    except RuntimeError as error:  # TRL's, which does not say which row
        if "no assistant tokens" not in str(error):
            raise
        raise nothing_to_learn([where[first_row_without_answer(concatenate_datasets(raw), tokenizer)]]) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:  # what a template may raise
        refused = first_row_refused(concatenate_datasets(raw), tokenizer)
        if refused is None:
            raise
        raise refused_by_template(where[refused], error) from error


def _make_trainer(
    recipe: Recipe,
    arguments: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows | None],
) -> tuple[Trainer, list[Supervision]]:
    """TRL's trainer, whose data is then counted, cut and packed."""
    with given_back_by(tokenizer):
        trainer = _tokenised(arguments, model, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    tokenised = (trainer.train_dataset, trainer.eval_dataset)
    sets = []
    for dataset, part in zip(tokenised, rows, strict=True):
        if part is not None:
            sets.append(supervise(dataset, part.where, recipe.max_length))
            check_vocabulary(sets[-1], part.where, tokenizer, trainer.model.get_input_embeddings().weight.shape[0])
            if recipe.max_length is None:  # else no row is longer than that, and `load` has refused what is too long
                check_positions(sets[-1], part.where, num_positions(trainer.model.config))
    trainer.train_dataset = sets[0].dataset
    if recipe.packing:
        trainer.train_dataset = pack_dataset(sets[0].dataset, recipe.max_length, "bfd")
    if len(sets) > 1:
        trainer.eval_dataset = sets[1].dataset
    return trainer, sets


def _check_fits(recipe: Recipe, model: nn.Module, trainer: Trainer) -> None:
    gc.collect()  # what an earlier run of this process left behind is no need of this one
    room = room_of(next(model.parameters()).device)
    if room is not None:
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        check_fits(recipe, model_bytes(without_adapters(model)), lengths, room)


def _make_optimizer(trainer: Trainer) -> None:
    """While an earlier run is still there: a trainer finds out only as it begins what cannot be made of the names."""
    try:
        trainer.create_optimizer_and_scheduler(num_training_steps=max(1, trainer.args.max_steps))
    except (ImportError, ValueError) as error:
        names = f"optim {trainer.args.optim.value!r} with lr_scheduler_type {trainer.args.lr_scheduler_type.value!r}"
        raise UserError(
            f"{names} cannot be made: {one_paragraph(error)} Choose others, or install what they need."
        ) from error


def _train(recipe: Recipe, trainer: Trainer, folder: OutputFolder, log: MetricsLog, display: Display) -> RunResult:
    """Evaluate, train, save, evaluate."""
    saves: list[Path] = []

    def save(name: str) -> Path:
        saves.append(folder.write_folder(name, lambda path: _save(trainer, path)))
        return saves[-1]

    clip_in_step(trainer)
    trainer.add_callback(FiniteGradients())
    if recipe.finetuning_type == "lora":
        trainer.add_callback(GradientProof())
    trainer.add_callback(log)
    if recipe.save_steps is not None:
        trainer.add_callback(PeriodicSave(recipe.save_steps, save))
    with told_disk_full(folder.path, saves), told_out_of_memory(recipe, trainer, saves):
        if trainer.eval_dataset is not None:
            with display.stage("evaluating"):
                trainer.evaluate()
        trainer.train()
        with display.stage("saving"):  # before the last evaluation, which may fail
            weights = save("adapter" if recipe.finetuning_type == "lora" else "model")
        if trainer.eval_dataset is not None and log.records[-1].eval_loss is None:
            with display.stage("evaluating"):
                trainer.evaluate()
        plot_losses(folder.file("loss.png"), log.records)
        folder.finish()
    return RunResult(output_dir=folder.path, weights=weights, records=tuple(log.records))


def _save(trainer: Trainer, path: Path) -> None:
    """Write the weights and the tokenizer, with a config that generates."""
    config = trainer.model.config.get_text_config()
    # TRL sets it for the balance loss; a saved model with it does not generate
    asked = getattr(config, "output_router_logits", None)
    if asked is not None:
        config.output_router_logits = False
    _save_model(trainer.model, path)
    if asked is not None:
        config.output_router_logits = asked
    trainer.processing_class.save_pretrained(path)


def _save_model(model: Any, path: Path) -> None:
    """Write the weights, and a model's settings of generation as they came: Transformers loads more than it saves."""
    settings = None if isinstance(model, PeftModel) else model.generation_config
    if settings is None:
        model.save_pretrained(path)
        return
    model.generation_config = type(settings)()
    model.save_pretrained(path)
    model.generation_config = settings
    settings.to_json_file(path / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])  # as Transformers does


def _backends(model: nn.Module) -> str:
    explanation = expertune.explain(model)
    if not explanation.layers:
        return str(explanation)
    names = sorted({layer.backend for layer in explanation.layers})
    return f"{len(explanation.layers)} layers with experts, which run on {', '.join(names)}"


def _say_supervision(display: Display, sets: list[Supervision], recipe: Recipe) -> None:
    for name, part in zip(("training", "held out"), sets, strict=False):
        display.say(f"{name}: {part}")
        if part.num_cut:
            display.say(
                f"warning: {part.num_cut:,} answers are cut off at max_length={recipe.max_length} ({name})",
                style="yellow",
            )


def _say_where_nothing_stops(display: Display, train: Supervision, trainer: Trainer) -> None:
    """Warn where no answer ends with a token at which the model would stop, as some templates leave it out."""
    tokenizer, settings = trainer.processing_class, getattr(trainer.model, "generation_config", None)
    configured = getattr(settings, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    stops = {token for token in (tokenizer.eos_token_id, *several) if token is not None}
    if stops and not ends_with_any(train.dataset, stops):
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stops))))
        display.say(
            f"warning: no answer ends with {names}, so the model does not learn to stop. Give the data as messages, or "
            "set chat_template_path to a template that ends an answer so.",
            style="yellow",
        )


def _write_recipe(path: Path, recipe: Recipe, model: nn.Module) -> None:
    """The recipe with every default written out, and the versions that it ran with."""
    packages = ("transformers", "peft", "trl", "datasets")
    device = next(model.parameters()).device
    versions = {
        "expertune": expertune.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the CUDA that it was built for, which its package does not name
        **{package: version(package) for package in packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
    }
    text = yaml.safe_dump(recipe.resolved() | {VERSIONS: versions}, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


@contextmanager
def _bars_of_hosts(*, shown: bool) -> Iterator[None]:
    """The hosts' own progress bars on or off, and afterwards as they were."""
    before = not datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    _set_bars(shown, shown)
    try:
        yield
    finally:
        _set_bars(*before)


def _set_bars(of_datasets: bool, of_transformers: bool) -> None:
    (datasets.enable_progress_bars if of_datasets else datasets.disable_progress_bars)()
    bars = transformers.utils.logging
    (bars.enable_progress_bar if of_transformers else bars.disable_progress_bar)()
