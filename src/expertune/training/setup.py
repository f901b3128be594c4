"""From a recipe to what TRL's trainer takes: the model with its adapters, the tokenizer, the arguments."""

from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
from typing import Any

import torch
import transformers
import trl
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from packaging.version import Version
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.training_args import OptimizerNames
from trl import SFTConfig

import expertune
from expertune.backends import refuse_unknown
from expertune.optim.adamw_8bit import AdamW8bit
from expertune.training.errors import UserError, one_paragraph
from expertune.training.recipe import LORA_FIELDS, Recipe


def make_arguments(recipe: Recipe, *, has_eval: bool) -> SFTConfig:
    """The arguments of TRL's trainer.

    It neither cuts nor packs nor saves: rows are cut and packed after they were counted, folders written whole.

    Args:
        recipe: the run.
        has_eval: whether there are rows to evaluate on.

    Raises:
        UserError: Transformers does not know a name, or there are more GPUs or processes than one.
    """
    _check_names(recipe)
    try:
        arguments = _arguments(recipe, has_eval=has_eval)
    except ValueError as error:  # an optimizer that Transformers does not know
        raise UserError(f"{one_paragraph(error)} Correct the recipe.") from error
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible and a run uses one. Make one visible, as in CUDA_VISIBLE_DEVICES=0."
        )
    if arguments.world_size > 1:
        raise UserError(
            f"{arguments.world_size} processes were started and a run is one. Start it without a launcher; to train on "
            "several GPUs, give a model from expertune.load to an SFTTrainer of your own under that launcher."
        )
    return arguments


def own_optimizer(arguments: SFTConfig) -> tuple[type[AdamW8bit], dict[str, Any]] | None:
    """Ours where the arguments name the one that Transformers takes from bitsandbytes; None where they name another.

    Args:
        arguments: from `make_arguments`.
    """
    if arguments.optim != OptimizerNames.ADAMW_8BIT:
        return None
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return AdamW8bit, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


def load_model(recipe: Recipe) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base model through the walk, and its tokenizer.

    Raises:
        UserError: it cannot be had, or the recipe asks of it what it cannot do.
    """
    named = f"model_name_or_path {recipe.model_name_or_path!r}"
    try:
        model, tokenizer = expertune.load(
            recipe.model_name_or_path,
            max_seq_length=recipe.max_length,
            load_in_4bit=recipe.load_in_4bit,
            dtype=None if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
            backend=recipe.moe_backend,
            memory=recipe.memory,
            full_finetuning=recipe.finetuning_type == "full",
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
        )
    except (ValueError, OSError) as error:
        where = "" if Path(recipe.model_name_or_path).exists() else f" (there is no such folder in {Path.cwd()})"
        raise UserError(f"{named}{where}: {one_paragraph(error)}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{named}: its weights alone do not fit the GPU. "
            f"{one_paragraph(error)} Take a smaller model or a larger card"
            f"{', or set dtype=bfloat16' if recipe.dtype == 'float32' else ''}."
        ) from error
    except _OF_FILES as error:
        if not _was_reading(error):
            raise
        mend = _INSTALL if isinstance(error, ImportError) else _FETCH
        raise UserError(f"{named} cannot be loaded ({type(error).__name__}: {one_paragraph(error)}). {mend}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{named} has no tokenizer: what was loaded knows no tokens but {len(tokenizer)} special ones. Put the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights."
        )
    # `load` lowered it to max_length; rows are cut here later, and the tokenizer is saved as it came
    tokenizer.model_max_length = tokenizer.init_kwargs.get("model_max_length", VERY_LARGE_INTEGER)
    if recipe.chat_template_path is not None:
        tokenizer.chat_template = _chat_template(recipe.chat_template_path, tokenizer)
    return model, tokenizer


# what hosts raise where files are cut, lack something or do not fit together, or a package that they need is not here
_OF_FILES = (
    ImportError,
    SafetensorError,
    UnpicklingError,
    EOFError,
    StrictDataclassError,
    RuntimeError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)
_OF_STATES = {"linear_attention", "mamba", "conv"}  # as a config names such layers
_INSTALL = "Install what it needs, or take a model that does not need it."
_FETCH = "Where a file is cut, fetch it again; where config.json does not fit the other files, mend it."


def _was_reading(error: BaseException) -> bool:
    """Whether a host raised it as it read the files; else it is a bug of ours, or the device's."""
    frames = walk_tb(error.__traceback__)
    is_of_device = isinstance(error, torch.AcceleratorError)
    return not is_of_device and any(frame.f_code.co_name == "from_pretrained" for frame, _ in frames)


def check_packing(model: nn.Module, recipe: Recipe) -> None:
    """Refuse to pack for a model in which samples of one sequence would not stay apart.

    Raises:
        UserError: it has layers that hand a state on from token to token.
    """
    config = without_adapters(model).config.get_text_config()
    kinds = sorted(_OF_STATES.intersection(getattr(config, "layer_types", None) or ()))
    if recipe.packing and kinds:
        raise UserError(
            f"packing lays samples into one sequence, in which {config.model_type} does not keep them apart: it has "
            f"layers of {', '.join(kinds)}, which hand a state on from sample to sample. Set packing=false."
        )


def set_balance_loss(model: nn.Module, recipe: Recipe) -> None:
    """Turn the routers' balance loss on or off, where TRL of every version looks.

    Raises:
        UserError: the recipe asks for it, and the model has none.
    """
    inner = without_adapters(model)
    config = inner.config.get_text_config()
    has_settings = hasattr(config, "output_router_logits") and hasattr(config, "router_aux_loss_coef")
    if has_settings and _computes_balance_loss(inner, config):
        if recipe.router_aux_loss_coef is not None:
            config.router_aux_loss_coef = recipe.router_aux_loss_coef
            # a copy that Transformers made when it built the model; it counts for TRL before 1.8
            inner.router_aux_loss_coef = recipe.router_aux_loss_coef
        config.output_router_logits = config.router_aux_loss_coef != 0
    elif recipe.router_aux_loss_coef:
        raise UserError(
            f"router_aux_loss_coef={recipe.router_aux_loss_coef:g} is set, but {config.model_type} has no balance "
            f"loss that TRL {trl.__version__} computes. Drop it."
        )
    elif has_settings:
        config.router_aux_loss_coef, config.output_router_logits = 0.0, False


def _computes_balance_loss(model: Any, config: Any) -> bool:
    """Whether TRL's loss does: it needs the number of experts. Llama 4, for one, has the settings alone.

    Since 1.8 TRL asks the config, but of gpt-oss before Transformers 5.6; before, the model's own loss is taken.
    """
    is_models_own = Version(trl.__version__) < Version("1.8")
    is_gpt_oss = config.model_type == "gpt_oss" and Version(transformers.__version__) < Version("5.6")
    return hasattr(model if is_models_own or is_gpt_oss else config, "num_experts")


def name_decoder(model: nn.Module) -> None:
    """Give this one model the right name of its decoder, by which TRL 1.16 finds it; Llama 4's class names another."""
    inner = without_adapters(model)
    if inner.base_model is inner and hasattr(inner, "model"):
        inner.base_model_prefix = "model"


def add_adapters(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with the recipe's adapters; one that was loaded from an adapter keeps that one.

    Raises:
        UserError: a target matches nothing, a setting cannot be honoured, or they do not fit the GPU.
    """
    if isinstance(model, PeftModel):
        held = next(iter(model.peft_config.values()))
        if changed := [field for field in LORA_FIELDS if _is_other(field, recipe, held)]:
            raise UserError(
                f"{recipe.model_name_or_path!r} is an adapter, which is trained further as it is; drop "
                f"{', '.join(changed)}, or begin from its base model."
            )
        return model
    try:
        return expertune.add_lora(model, **{field: getattr(recipe, field) for field in LORA_FIELDS})
    except ValueError as error:
        raise UserError(one_paragraph(error)) from error
    except torch.OutOfMemoryError as error:
        smaller = ", set autocast_adapter_dtype=false" if recipe.autocast_adapter_dtype else ""
        raise UserError(
            f"the adapters do not fit the GPU beside the weights. {one_paragraph(error)} Lower r{smaller}, or train "
            "fewer target_modules."
        ) from error


def without_adapters(model: nn.Module) -> Any:
    """The Transformers model inside PEFT's, if it is in one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _arguments(recipe: Recipe, *, has_eval: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=recipe.output_dir,
        max_length=None,
        padding_free=recipe.packing,
        pad_to_multiple_of=_length_multiple(recipe),
        max_steps=recipe.max_steps if recipe.max_steps is not None else -1,
        num_train_epochs=recipe.num_train_epochs if recipe.num_train_epochs is not None else 1,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optim,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_steps is not None and has_eval else "no",
        eval_steps=recipe.eval_steps,
        save_strategy="no",
        report_to=recipe.report_to,
        # the weights' own dtype is computed in; no autocast around it
        bf16=False,
        gradient_checkpointing=False,  # expertune's `memory` has decided it
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # no wait for the step before
    )


def _length_multiple(recipe: Recipe) -> int | None:
    """Of batches: on a GPU layers are replayed where lengths come again; elsewhere it would be padding for nothing.

    Packed batches have no mask, so a balance loss would count their padding.
    """
    counts_padding = recipe.packing and recipe.router_aux_loss_coef != 0
    return 128 if torch.cuda.is_available() and not counts_padding else None


def _is_other(field: str, recipe: Recipe, held: Any) -> bool:
    """Whether a recipe asks for something that an adapter does not have: said, and no list of what it adapts."""
    asked = getattr(recipe, field)
    is_said = field in recipe.model_fields_set and isinstance(asked, bool | int | float) and hasattr(held, field)
    return bool(getattr(held, field) != asked) if is_said else bool(asked != _default(field))


def _default(field: str) -> Any:
    return Recipe.model_fields[field].default


def _check_names(recipe: Recipe) -> None:
    """Names that would be refused only after the weights were loaded."""
    if recipe.moe_backend is not None:
        try:
            refuse_unknown(recipe.moe_backend, "moe_backend")
        except ValueError as error:
            raise UserError(str(error)) from error
    optimizers = [each.value for each in OptimizerNames]
    if recipe.optim not in optimizers:
        raise UserError(
            f"unknown optim {recipe.optim!r}; take adamw_torch, adamw_8bit or another of Transformers' names: "
            f"{', '.join(optimizers)}."
        )
    trackers = ["none", "all", *get_available_reporting_integrations()]
    if recipe.report_to not in trackers:
        raise UserError(
            f"report_to {recipe.report_to!r} is not installed here, or not known to Transformers; choose one of "
            f"{', '.join(trackers)}."
        )


def _chat_template(path: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    if Path(path).is_file():
        try:
            template: Any = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template_path {path!r} cannot be read as text in UTF-8: {error}") from error
    else:
        try:
            template = AutoTokenizer.from_pretrained(path).chat_template
        except (ValueError, OSError) as error:
            raise UserError(
                f"chat_template_path {path!r} is neither a file nor a tokenizer: {one_paragraph(error)}"
            ) from error
        if template is None:
            raise UserError(f"the tokenizer at chat_template_path {path!r} has no chat template. Name another.")
    if isinstance(template, str):
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=template, tokenize=False)
        except TemplateError as error:
            raise UserError(f"the chat template of {path!r} does not work: {one_paragraph(error)}. Mend it.") from error
    return template
