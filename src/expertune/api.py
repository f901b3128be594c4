"""The verbs: `load`, `add_lora`, `optimize`, `restore`, `explain`."""

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from expertune.backends import refuse_unknown
from expertune.hosts import attach, early, peft, recompute, report, traversal, trl_head
from expertune.hosts.attached import attached
from expertune.hosts.classes import auto_class, is_cut
from expertune.hosts.coverage import Coverage, coverage
from expertune.hosts.own_device import take_own_device
from expertune.hosts.targets import Targets, resolve
from expertune.hosts.transformers import num_positions

_BACKEND_VARIABLE = "EXPERTUNE_MOE_BACKEND"
_INITS = ("true", "false", "gaussian")  # which look at no module, as others do
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Fields of LoraConfig by which PEFT chooses among modules, but not among parameters.
_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")
# What `from_pretrained` of models, configs and tokenizers all take.
_OF_THE_HUB = (
    "revision",
    "trust_remote_code",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
# By how Transformers' classes with a head of their own end: PEFT trains that head, and saves it, for these tasks alone.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_MEMORY = ("auto", "fast", "lean")
_ATTENTION = ("auto", "host")
_Model = TypeVar("_Model", bound=nn.Module)


def load(
    name_or_path: str,
    *,
    max_seq_length: int | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    memory: str | None = "auto",
    full_finetuning: bool = False,
    **from_pretrained: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model whose experts run through the walk, and its tokenizer.

    Args:
        name_or_path: a hub id or folder, as `from_pretrained` takes it; or a folder with a PEFT adapter, which is then
            loaded onto its base model, trainable.
        max_seq_length: the tokenizer's limit; None: the model's. (TRL cuts rows at `max_length` of its `SFTConfig`.)
        load_in_4bit: not supported yet.
        dtype: of the weights; None takes the checkpoint's.
        backend: "auto", "triton", "grouped_mm" or "native_torch". None: `EXPERTUNE_MOE_BACKEND` if set, else "auto".
        memory: "lean" checkpoints every layer, with the routing replayed, moves long inputs of layers to the host and
            walks long batches in tiles; "auto" checkpoints only those layers whose activations the card has no room
            for (found in the first step), and is lean in steps that would not fit even so; "fast" checkpoints none.
            It takes the place of a trainer's `gradient_checkpointing`; None leaves that to the trainer.
        full_finetuning: train all base weights. Otherwise they are frozen, until `add_lora` adds what is trained.
        from_pretrained: more for `from_pretrained` of the model, and of config and tokenizer where they take it
            (`revision`, `local_files_only`, …). With `attn_implementation` the attention stays the host's.

    Raises:
        ValueError: a setting is unknown or cannot be honoured for this model, or nothing of it would run better (see
            `optimize`).
    """
    if load_in_4bit:
        raise ValueError(
            "load_in_4bit=True is not supported yet: bitsandbytes leaves fused experts in 16 bits, so it would save "
            "next to nothing on this model. Load without it."
        )
    requested = _requested(backend, memory)
    saved, base = peft.adapter_and_base(name_or_path)
    if saved is not None and full_finetuning:
        raise ValueError(f"{name_or_path} is an adapter; full_finetuning=True needs a whole model. Merge it first.")
    shared = {key: from_pretrained[key] for key in _OF_THE_HUB if key in from_pretrained}
    config = AutoConfig.from_pretrained(base, **shared)
    _check_length(max_seq_length, config)
    if "attn_implementation" in from_pretrained:
        _check_attention(from_pretrained["attn_implementation"], config, shared.get("trust_remote_code"))
    if torch.cuda.is_available():
        from_pretrained.setdefault("device_map", {"": take_own_device()})
    _warn_of_cut(base, config)
    model = auto_class(config).from_pretrained(base, dtype=dtype or "auto", **from_pretrained)
    if saved is not None:
        peft.check_saved(saved, model)
    tokenizer = AutoTokenizer.from_pretrained(base, **shared)
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    model.requires_grad_(full_finetuning)
    if saved is not None:
        model = PeftModel.from_pretrained(model, name_or_path, is_trainable=True)
    attention = "host" if "attn_implementation" in from_pretrained else "auto"
    return _begun(optimize(model, backend=requested, memory=memory, attention=attention)), tokenizer


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: Sequence[str] | str = "all-linear",
    autocast_adapter_dtype: bool = True,
    **lora_config: Any,
) -> PeftModel:
    """Wrap the model with a stock PEFT adapter, run it through the walk, and print what it trains.

    Args:
        model: from `load`, or any Transformers model; it is optimized if it was not.
        r: rank, per expert. Gate and up are one fused projection and share it.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        target_modules: names such as "q_proj" or "gate_proj", which reach routed experts, shared experts and dense
            layers alike, or "all-linear": all of them and the attention. The router is trained only by its own name,
            a vision or audio tower only by dotted endings of paths.
        autocast_adapter_dtype: whether factors of a model in 16 bits are held in float32, as PEFT does. False holds
            them and their gradients in the model's dtype, in half the memory; then train bfloat16 with
            `expertune.AdamW8bit`, whose rounding lets small updates count.
        lora_config: more fields of `peft.LoraConfig` (`use_rslora`, `rank_pattern`, `init_lora_weights`, …).

    Raises:
        ValueError: the model has adapters already, a target matches nothing, a setting cannot be honoured, or
            `optimize` refuses the model.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "this model has adapters already. To train another one call model.add_adapter(name, config), or start from "
            "the base model: model.unload()."
        )
    model = _transformers_model(model)
    targets = resolve(model, target_modules, lora_config.pop("target_parameters", None) or ())
    _check_lora_settings(targets, r, lora_config)
    lora_config |= {name: targets.reached_by(name, lora_config[name]) for name in _PATTERNS if lora_config.get(name)}
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        **{"lora_dropout": 0.0, "bias": "none", "task_type": _task_type(model)} | lora_config,
    )
    if attached(model) is None:
        optimize(model)
    wrapped = _wrap(model, config, targets, autocast_adapter_dtype=autocast_adapter_dtype)
    _warn_of_lost(wrapped)
    console = Console()
    console.print(coverage(wrapped))
    if targets.left:
        left = ", ".join(targets.left)
        console.print(f"left as it is: {left}; name its modules by dotted paths to train it", soft_wrap=True)
    traversal.bind(wrapped)
    return wrapped


def optimize(
    model: _Model,
    *,
    backend: str | None = None,
    memory: str | None = None,
    attention: str = "auto",
    graphs: bool = True,
) -> _Model:
    """Run the experts of this one model through the walk, in place. Undone by `restore`.

    Args:
        model: a Transformers or PEFT model. Adapters that are attached later are taken in too.
        backend: as for `load`.
        memory: as for `load`; None leaves what was set before, and gradient checkpointing as it is.
        attention: "auto" runs it through ours where the host would form all scores (sinks, sliding windows, packed
            samples); "host" leaves it as it is.
        graphs: whether layers with adapters, or parts of them, may be replayed as CUDA graphs, once calls of the same
            shapes, on at most 8,192 tokens, have come twice.

    Raises:
        ValueError: a layer, an adapter or a setting cannot be honoured, or the model has neither experts nor attention
            that would run through ours; the model is then as it was.
    """
    inner = _transformers_model(model)
    requested = _requested(backend, memory)
    if memory == "lean" and not inner.supports_gradient_checkpointing:
        raise ValueError(f"memory='lean' needs gradient checkpointing, which {type(inner).__name__} does not support.")
    if attention not in _ATTENTION:
        raise ValueError(f"unknown attention {attention!r}; choose one of {list(_ATTENTION)}")
    if isinstance(model, PeftModel):
        _warn_of_lost(model)
    state = attach.attach(inner, requested, is_attention_ours=attention == "auto", uses_graphs=graphs)
    if memory is not None:
        recompute.set_memory(inner, state, memory)
    traversal.bind(inner, trl_head.bind)
    traversal.bind(model)
    return model


def restore(model: _Model) -> _Model:
    """Undo `optimize`: the model runs as stock Transformers and PEFT again. Gradient checkpointing stays as it is."""
    inner = _transformers_model(model)
    attach.detach(inner)
    for each in {inner, model}:
        traversal.unbind(each)
    return model


def explain(model: nn.Module) -> report.Explanation:
    """Per layer: backend, weights, adapters, and why better backends were passed over."""
    return report.explain(_transformers_model(model))


def trained(model: nn.Module) -> Coverage:
    """What the model trains, by part: the table that `add_lora` prints."""
    return coverage(model)


def _begun(model: _Model) -> _Model:
    """The model, for which what its first step needs is being built."""
    early.begin(_transformers_model(model))
    return model


def _requested(backend: str | None, memory: str | None) -> str:
    """The backend asked for, by argument or else by the environment. Refuses unknown names."""
    requested = backend if backend is not None else os.environ.get(_BACKEND_VARIABLE) or "auto"
    refuse_unknown(requested, "backend" if backend is not None else _BACKEND_VARIABLE)
    if memory is not None and memory not in _MEMORY:
        raise ValueError(f"unknown memory {memory!r}; choose one of {list(_MEMORY)}")
    return requested


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"expected a Transformers or PEFT model, got {type(model).__name__}. Pass the model itself, before "
            "torch.compile, DDP or FSDP wrap it; of a pipeline or a trainer its `model`."
        )
    return inner


def _check_length(max_seq_length: int | None, config: Any) -> None:
    if max_seq_length is not None and max_seq_length < 1:
        raise ValueError(f"max_seq_length must be at least 1, got {max_seq_length}.")
    limit = num_positions(config)
    if max_seq_length is not None and limit is not None and max_seq_length > limit:
        raise ValueError(
            f"max_seq_length={max_seq_length} is beyond the {limit} positions of this model. The nearest that works is "
            f"max_seq_length={limit}, which a recipe calls max_length."
        )


def _check_attention(asked: Any, config: Any, trust_remote_code: bool | None) -> None:
    """Refuse an attention that the host cannot run here. It says so when it builds the model, here without memory."""
    with torch.device("meta"):
        make = partial(auto_class(config).from_config, trust_remote_code=trust_remote_code)
        try:
            make(copy.deepcopy(config), attn_implementation=asked)  # which it writes into the config
        except (ImportError, ValueError) as error:
            make(config)  # raises by itself what is wrong without the attention too
            raise ValueError(
                f"attn_implementation={asked!r} cannot run here: {' '.join(str(error).split())} Drop "
                "attn_implementation, and one that runs here is chosen."
            ) from error


def _check_lora_settings(targets: Targets, r: int, settings: dict[str, Any]) -> None:
    """Refuse before PEFT changes the model what PEFT cannot do on parameters."""
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}.")
    if unknown := sorted(settings.keys() - {each.name for each in fields(LoraConfig)}):
        raise ValueError(
            f"add_lora takes what PEFT's LoraConfig takes, which has no {', '.join(unknown)}. What is computed again "
            "in backward is said to expertune.load (memory=…); seeds are set by torch.manual_seed."
        )
    if selecting := [key for key in _SELECTING if settings.get(key) is not None]:
        raise ValueError(
            f"{', '.join(selecting)} would not reach the experts, so add_lora does not take it. Name what to train in "
            "target_modules by dotted endings of its path, such as 'layers.0.self_attn.q_proj'."
        )
    refused = [key for key in ("lora_dropout", "use_dora", "lora_bias") if settings.get(key)]
    if str(settings.get("init_lora_weights", True)).lower() not in _INITS:
        refused.append("init_lora_weights")
    if targets.parameters and refused:
        raise ValueError(
            f"{', '.join(f'{key}={settings[key]}' for key in refused)} cannot be used on experts: there is no module "
            "to apply it to, only their weights. Leave it out, or target the attention alone."
        )


def _wrap(model: PreTrainedModel, config: LoraConfig, targets: Targets, *, autocast_adapter_dtype: bool) -> PeftModel:
    """PEFT's model, with all that was asked for adapted; else the model is left as it was."""
    with warnings.catch_warnings():  # PEFT looks for what patterns match among modules, and experts' weights are none
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert isinstance(wrapped, PeftModel)
    try:
        attach.bind_all(model)
        _check_adapted(wrapped, targets)
    except ValueError:
        wrapped.unload()
        raise
    return wrapped


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name for a model that generates, or with a new head to be trained; None for one that only encodes."""
    if hasattr(model, "prepare_inputs_for_generation"):
        return "CAUSAL_LM"
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)


def _warn_of_cut(name: str, config: Any) -> None:
    if is_cut(config):
        warnings.warn(
            f"of {name} the language model alone is loaded, without what sees: Transformers' whole {config.model_type} "
            "model does not run. Inputs other than text are ignored, and what is saved of it has no other part.",
            stacklevel=3,
        )


def _warn_of_lost(model: PeftModel) -> None:
    if lost := peft.lost_when_read(model):
        warnings.warn(
            f"PEFT {version('peft')} will not find {len(lost)} of this adapter's tensors again when it reads a saved "
            f"adapter of this model type, for instance {lost[0]} (so it would rename it). Merge the adapter before you "
            "save (merge_and_unload), or leave the modules out of target_modules.",
            stacklevel=3,
        )


def _check_adapted(model: PeftModel, targets: Targets) -> None:
    adapted = coverage(model).adapted
    if missing := sorted(targets.paths - adapted):
        raise ValueError(
            f"PEFT attached no adapter to {missing[:5]} ({len(missing)} in all), though they were asked for."
        )
    assert adapted == targets.paths, f"PEFT adapted also {sorted(adapted - targets.paths)}"
