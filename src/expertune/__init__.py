"""Fine-tune Mixture-of-Experts language models fast and in little memory, inside Transformers, PEFT and TRL.

What it offers is loaded when it is first used, so that `import expertune` and `expertune --help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertune.api import add_lora, explain, load, optimize, restore, trained
    from expertune.hosts.clipping import clip_in_step
    from expertune.hosts.trl import GradientProof
    from expertune.optim.adamw_8bit import AdamW8bit

__all__ = [
    "AdamW8bit",
    "GradientProof",
    "add_lora",
    "clip_in_step",
    "explain",
    "load",
    "optimize",
    "restore",
    "trained",
]
__version__ = "0.1.0"

_ELSEWHERE = {
    "AdamW8bit": "expertune.optim.adamw_8bit",
    "GradientProof": "expertune.hosts.trl",
    "clip_in_step": "expertune.hosts.clipping",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'expertune' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "expertune.api")), name)
