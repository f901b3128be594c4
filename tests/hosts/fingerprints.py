"""What a model is, in a form to compare: to see that a refusal changed nothing and `restore` left nothing behind."""

from typing import Any

from torch import nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that the verbs may touch: attributes, hooks, configs, checkpoint functions, what is trained."""
    return {
        path: (
            type(module),
            sorted(vars(module)),
            list(map(id, module._forward_pre_hooks.values())),
            list(map(id, module._forward_hooks.values())),
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_experts_implementation", None),
            getattr(module, "gradient_checkpointing", None),
            id(getattr(module, "_gradient_checkpointing_func", None)),
            [(name, id(p), p.requires_grad) for name, p in module.named_parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    }
