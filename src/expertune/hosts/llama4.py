"""Llama 4, whose experts stand outside Transformers' interface: its MoE block hands our walk the chosen experts.

The router's weight scales what goes into an expert, not what comes out of it. The host gives every expert every token,
times zero where it was not chosen, and sums over all experts; nothing but zeros comes of those zeros. So here each
choice walks as a token of its own, already scaled, with one expert and the weight one. Router, shared expert and what a
layer takes from its block stay the host's.
Source: Llama4TextMoe and Llama4TextExperts, transformers 5.2 to 5.24.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from expertune.hosts import forwards


def is_experts(module: nn.Module) -> bool:
    """Whether these are Llama 4's experts, also while they are parametrized."""
    return isinstance(module, Llama4TextExperts) and type(module).forward is Llama4TextExperts.forward


def is_block(module: nn.Module) -> bool:
    """Whether this is Llama 4's MoE block, which knows how to call its experts."""
    return isinstance(module, Llama4TextMoe) and type(module).forward is Llama4TextMoe.forward


def bind(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> None:
    """Give each of these instances another forward."""
    for module in modules:
        forwards.give(module, partial(forward, module))


def block_forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Instead of the block's own forward.

    Args:
        block: the MoE block.
        hidden_states: `(…, D)`.

    Returns:
        `out_TD`, and the router's logits `(T, E)`.
    """
    experts = _unwrapped(block.experts)
    if is_experts(experts) and "_expertune" not in vars(experts):  # the model was restored, and somebody has kept this
        given: tuple[Tensor, Tensor] = type(block).forward(block, hidden_states)
        return given
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    score_TE, logits_TE = block.router(x_TD)
    # Read off, not chosen again, and in the order of the experts: a recomputed layer, whose scores may be rounded
    # otherwise, gives the same. Where a score has underflowed, another expert stands in: its score is zero too.
    expert_TK = (
        (score_TE != 0).byte().sort(dim=1, descending=True, stable=True).indices[:, : _unwrapped(block.router).top_k]
    )
    score_TK = score_TE.gather(1, expert_TK)
    # before the experts: a recomputed layer may leave their output out only if nothing after them is saved
    shared_TD = block.shared_expert(x_TD)
    x_ND = (x_TD.unsqueeze(1) * score_TK.unsqueeze(-1)).flatten(0, 1)
    expert_N1 = expert_TK.reshape(-1, 1)
    # by name: hooks see the host's one input, whose gradient they may change
    y_ND = block.experts(x_ND, top_k_index=expert_N1, top_k_weights=x_ND.new_ones(expert_N1.shape))
    return shared_TD + y_ND.view(*expert_TK.shape, -1).sum(1), logits_TE


def _unwrapped(module: Any) -> Any:
    """What PEFT may have wrapped."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
