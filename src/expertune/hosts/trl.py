"""TRL and Transformers trainers: the proof, after the first step's backward, that every adapter learns."""

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.hosts.coverage import adapted_name


def adapters_without_gradient(model: nn.Module) -> list[str]:
    """Paths of trainable LoRA layers neither of whose factors received a gradient that is not zero."""
    silent = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            factors = [layers[adapter].weight for layers in (module.lora_A, module.lora_B) if adapter in layers]
            trained = [factor for factor in factors if factor.requires_grad]
            if trained and not any(factor.grad is not None and factor.grad.any() for factor in trained):
                silent.append(adapted_name(path, module))
    return silent


class GradientProof(TrainerCallback):
    """Stops a run that trains nothing, and any at its first optimizer step if an adapter received no gradient.

    The experts of a layer count as one adapter: an expert that saw no token, or none whose output reaches a supervised
    token, rightly receives none.
    """

    def __init__(self) -> None:
        self._is_proven = False

    def on_train_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Each run is proven anew, also after a resume."""
        self._is_proven = False
        if not any(parameter.requires_grad for parameter in kwargs["model"].parameters()):
            raise RuntimeError(
                "nothing of this model is trained. Call expertune.add_lora(model), load it with full_finetuning=True, "
                "or read an adapter to go on with by PeftModel.from_pretrained(…, is_trainable=True)."
            )

    def on_pre_optimizer_step(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of the first step, once."""
        if self._is_proven:
            return
        if silent := adapters_without_gradient(kwargs["model"]):
            shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            raise RuntimeError(
                f"{len(silent)} adapters received no gradient in the first step: {shown}. They would stay untrained. "
                "Leave them out of target_modules if the data does not reach them, as text does not reach what sees; "
                "else check that the batch holds supervised tokens, and that the model was passed to "
                "expertune.optimize after the adapters were attached."
            )
        trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        if not any(parameter.grad is not None and parameter.grad.any() for parameter in trained):
            raise RuntimeError(
                f"none of the {len(trained)} trained tensors received a gradient in the first step. Check that the "
                "batch holds supervised tokens, and that the model's output depends on what is trained."
            )
        self._is_proven = True
