"""The recipe: everything a run is told, checked before anything is loaded.

Names are those of Transformers, TRL and PEFT wherever they have one. Relative paths are relative to the folder in which
the command runs, not to the recipe's own.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LORA_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "target_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "autocast_adapter_dtype",
)
_COLUMNS = Literal[
    "text", "prompt", "completion", "messages", "instruction", "input", "output", "conversations", "tools"
]


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string, because it has no dot; every user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # pydantic says what is wrong with it
    return value


def _names(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) and value != "all-linear" else value


_Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Recipe(BaseModel):
    """One run, from the data to the files it leaves. Strict: unknown fields and wrong types are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    model_name_or_path: str
    """The model to fine-tune: a hub id or a folder. A folder with a PEFT adapter is trained further."""
    revision: str = "main"
    """Branch, tag or commit of the model on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights; "auto" takes the checkpoint's. Adapters are float32,
    unless autocast_adapter_dtype is false."""
    load_in_4bit: bool = False
    """Not supported yet: refused."""
    moe_backend: str | None = None
    """What runs the experts: "auto", "triton", "grouped_mm" or "native_torch". None: the environment variable
    EXPERTUNE_MOE_BACKEND if it is set, else "auto"."""
    memory: Literal["auto", "fast", "lean"] = "auto"
    """What is kept from forward to backward: "fast" keeps everything, "auto" and "lean" recompute layers."""

    finetuning_type: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or all base weights."""
    r: Annotated[int, Field(gt=0)] = 16
    """LoRA rank, per expert."""
    lora_alpha: Annotated[_Float, Field(gt=0)] = 32
    """The adapter's output is scaled by `lora_alpha / r`."""
    lora_dropout: Annotated[_Float, Field(ge=0, lt=1)] = 0
    """Dropout before the adapter. Not on experts."""
    use_dora: bool = False
    """Train magnitudes apart from directions. Not on experts."""
    target_modules: Annotated[list[str] | Literal["all-linear"], BeforeValidator(_names)] = "all-linear"
    """Names such as q_proj or gate_proj, which reach routed experts, shared experts and dense layers alike, or
    "all-linear". The router is trained only by its own name."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Another rank for the names that a pattern matches."""
    alpha_pattern: dict[str, Annotated[_Float, Field(gt=0)]] = {}
    """Another alpha for the names that a pattern matches."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How the adapter begins: true as nothing, "gaussian" as nothing with a normal A, false as noise (for tests)."""
    autocast_adapter_dtype: bool = True
    """Hold the adapter of a model in 16 bits in float32. false: in the model's dtype, its gradients too, in half the
    memory; with optim adamw_8bit small updates count all the same."""

    dataset_name: str
    """The data: a JSONL, JSON, Parquet or CSV file, a folder of them, or a hub id."""
    dataset_config: str | None = None
    """Name of the configuration of a hub dataset."""
    dataset_train_split: str | None = None
    """Split of a hub dataset; in a folder, the files whose names begin so. None: "train". Not for a single file."""
    eval_dataset_name: str | None = None
    """Data to evaluate on, as `dataset_name`."""
    dataset_test_split: str | None = None
    """As `dataset_train_split`, for `eval_dataset_name`. None: "test"."""
    eval_size: Annotated[_Float, Field(ge=0)] = 0
    """Hold out this many rows of the data (1 or more), or this fraction (below 1), to evaluate on. 0: none."""
    dataset_format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = "auto"
    """The shape of a row; "auto" tells it by the columns."""
    columns: dict[str, _COLUMNS] = {}
    """The data's own column names to ours, such as {question: prompt, answer: completion}."""
    chat_template_path: str | None = None
    """A Jinja file, or a folder or hub id of a tokenizer, whose chat template is used instead of the model's own."""
    max_length: Annotated[int, Field(gt=1)] | None = 1024
    """Tokens in the longest sequence; longer ones are cut at the end. None: nothing is cut."""
    packing: bool = False
    """Lay several rows into one sequence of `max_length` tokens; they do not see each other. Not
    for models with layers of linear attention, Mamba or convolutions, which hand a state on."""

    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps. None: as many as `num_train_epochs` takes."""
    num_train_epochs: Annotated[_Float, Field(gt=0)] | None = None
    """Passes over the data. None: 1, unless `max_steps` is set."""
    per_device_train_batch_size: Annotated[int, Field(gt=0)] = 2
    """Rows in one forward pass; in evaluation too."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 4
    """Forward passes in one optimizer step."""
    learning_rate: Annotated[_Float, Field(gt=0)] = 1e-4
    """The highest learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """How the learning rate falls."""
    warmup_steps: Annotated[_Float, Field(ge=0)] = 0
    """Steps in which the learning rate rises from 0; below 1, the fraction of all steps."""
    weight_decay: Annotated[_Float, Field(ge=0)] = 0
    """Of AdamW."""
    max_grad_norm: Annotated[_Float, Field(ge=0)] = 1
    """Gradients are scaled down to this norm. 0: never."""
    optim: str = "adamw_torch"
    """The optimizer, by Transformers' name for it; adamw_8bit is expertune.AdamW8bit and needs no bitsandbytes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of adapters, data order and held-out rows."""
    logging_steps: Annotated[int, Field(gt=0)] = 10
    """Steps between two lines of `metrics.jsonl`."""
    eval_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between two evaluations. None: before the first step and after the last only."""
    save_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between two saves of the weights to `checkpoint-N`. None: after the last step only."""
    router_aux_loss_coef: Annotated[_Float, Field(ge=0)] | None = None
    """Weight of the loss that balances the experts. None: what the model's config says. 0: off."""
    output_dir: str
    """The folder that the run writes. It must be new or empty."""
    overwrite_output_dir: bool = False
    """Replace what an earlier run of expertune wrote to `output_dir`, once this one has finished; until then it lies in
    a folder `earlier-run-N` there. Other files are never touched."""
    report_to: str = "none"
    """An experiment tracker that Transformers knows, such as "tensorboard" or "wandb"."""

    @model_validator(mode="after")
    def _check_together(self) -> "Recipe":
        lora = [field for field in LORA_FIELDS if field in self.model_fields_set]
        if self.finetuning_type == "full" and lora:
            raise ValueError(f"{', '.join(lora)} belong to LoRA, but finetuning_type is full; drop one or the other")
        if self.eval_size and self.eval_dataset_name is not None:
            raise ValueError("eval_size and eval_dataset_name both say what to evaluate on; give one of them")
        if self.eval_size >= 1 and self.eval_size != int(self.eval_size):
            raise ValueError(f"eval_size is a whole number of rows or a fraction below 1, got {self.eval_size}")
        has_eval = self.eval_size or self.eval_dataset_name is not None
        if self.eval_steps is not None and not has_eval:
            raise ValueError("eval_steps is set, but there is nothing to evaluate on; set eval_size too")
        if self.dataset_test_split is not None and self.eval_dataset_name is None:
            raise ValueError("dataset_test_split is set without eval_dataset_name, which it is a split of")
        if self.packing and self.max_length is None:
            raise ValueError("packing fills sequences of max_length tokens; set max_length to a number")
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs both say how long to train; give one of them")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError("lr_scheduler_type constant has no warm-up; use constant_with_warmup or drop warmup_steps")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, for a file that makes this recipe again; LoRA's only where there is LoRA."""
        return self.model_dump(exclude=set() if self.finetuning_type == "lora" else set(LORA_FIELDS))
