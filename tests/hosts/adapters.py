"""Stock PEFT's adapters on the experts: the truth that the walk's are compared with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.hosts.models import load_tiny

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def lora(**settings: Any) -> LoraConfig:
    """Experts and attention, with factors that are both random, so that every product matters."""
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["o_proj"],
        "target_parameters": list(EXPERTS),
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | settings)


def wrap(model: nn.Module, config: LoraConfig, seed: int = 3) -> PeftModel:
    """Stock `get_peft_model`, with factors by seed. The config is copied, because PEFT changes it."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]
    assert isinstance(wrapped, PeftModel)
    return wrapped


def stock(folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A host's eager model under stock PEFT."""
    return wrap(load_tiny(folder, dtype), config)


def _takes_several() -> bool:
    """Whether this PEFT takes a second adapter on parameters. Its first versions with such adapters refuse it."""
    model = nn.ModuleDict({"experts": nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 3, 4))})})
    config = LoraConfig(r=1, target_modules=[], target_parameters=["experts.w"])
    try:
        get_peft_model(model, copy.deepcopy(config)).add_adapter("second", copy.deepcopy(config))  # type: ignore[arg-type]
    except ValueError as refusal:
        assert "target_parameters" in str(refusal)
        return False
    return True


several_adapters = pytest.mark.skipif(not _takes_several(), reason="this PEFT takes one adapter on parameters")
