"""Fine-tune Mixture-of-Experts language models fast and in little memory, inside Transformers, PEFT and TRL.

The verbs are loaded when they are first used, so that `import expertune` and `expertune --help` stay quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertune.api import add_lora, explain, load, optimize, restore, trained

__all__ = ["add_lora", "explain", "load", "optimize", "restore", "trained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'expertune' has no attribute {name!r}")
    from expertune import api

    return getattr(api, name)
