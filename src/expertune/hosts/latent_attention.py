"""Multi-head latent attention (DeepSeek, GLM-4.7-Flash and their kin), whose heads are put together in one pass.

Hosts split what the projections give, rotate a part, and join it to the rest in new tensors of all heads, for queries
and for keys. The classes are several and nearly all alike. One is taken over if a small instance of it, on random
numbers, gives what the code below gives; what the attention is run by stays the host's choice.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from expertune.attention.latent import assemble
from expertune.attention.rotary import Rotation
from expertune.hosts import attention as ours
from expertune.hosts import rotary, siblings
from expertune.hosts.formulas import agree

_SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "v_head_dim": 10,
    "attention_dropout": 0.0,
    "_attn_implementation": "eager",
}
_PARTS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "config", "scaling", "qk_nope_head_dim")
_TAKES_ANY_WIDTHS = ("eager", "sdpa", *ours.ALL)
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ROTATES, _ROTATES_COMPLEX = "apply_rotary_pos_emb", "apply_rotary_emb"  # the second is DeepSeek-V2's


def find(model: nn.Module) -> list[nn.Module]:
    """The attentions that compute what `forward` does. Changes nothing."""
    known: dict[tuple[type, int], bool] = {}
    found = []
    for module in model.modules():
        if not all(hasattr(module, name) for name in _PARTS):
            continue
        key = (type(module), id(module.config))
        if key not in known:
            known[key] = _follows(type(module), module.config)
        if known[key]:
            found.append(module)
    return found


def forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """The attention's forward; the host's own with a cache, under a compiler and for kernels that want values padded.

    Args:
        attention: the module.
        hidden_states: `(B, T, D)`.
        position_embeddings: cosines and sines, `(B, T, R)`, or both as complex numbers, `(B, T, R/2)`.
        attention_mask: as the attention that runs it takes it.
        past_key_values: a cache of keys and values; newer hosts call it `cache`.
        kwargs: are handed down.
    """
    cached = past_key_values is not None or kwargs.get("cache") is not None
    takes_any_widths = attention.config._attn_implementation in _TAKES_ANY_WIDTHS
    is_ours = takes_any_widths and not cached and not torch.compiler.is_compiling()
    if not is_ours or (rotation := rotation_of(attention)) is None:
        caches = {} if past_key_values is None else {"past_key_values": past_key_values}
        return rotary.forward(
            attention,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **caches,
            **kwargs,
        )
    kwargs.pop("cache", None)
    with siblings.together(attention):
        return _forward(attention, rotation, hidden_states, position_embeddings, attention_mask, **kwargs)


def _forward(
    attention: Any,
    rotation: Rotation,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    shape = (*hidden_states.shape[:-1], -1)
    q = _queries(attention, hidden_states).view(*shape, attention.qk_head_dim)
    latent_BTL, rot_BTR = attention.kv_a_proj_with_mqa(hidden_states).split(
        [attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
    )
    kv = attention.kv_b_proj(attention.kv_a_layernorm(latent_BTL))
    kv = kv.view(*shape, attention.qk_nope_head_dim + attention.v_head_dim)
    if isinstance(position_embeddings, Tensor):
        position_embeddings = (position_embeddings.real, position_embeddings.imag)
    q_BHTD, k_BHTD, v_BHTV = assemble(q, kv, rot_BTR, *position_embeddings, rotation)
    del q, kv
    names, implementation = _globals(type(attention).forward), attention.config._attn_implementation
    attend = names[_INTERFACE].get_interface(implementation, names["eager_attention_forward"])
    if implementation in ours.ALL:  # what was put together is new, and nobody else has it
        kwargs["overwrites"] = True
    out_BTHV, weights = attend(
        attention,
        q_BHTD,
        k_BHTD,
        v_BHTV,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return attention.o_proj(out_BTHV.reshape(shape)), weights


def _queries(attention: Any, hidden_states: Tensor) -> Tensor:
    if attention.q_lora_rank is None:
        return attention.q_proj(hidden_states)
    return attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))


def rotation_of(attention: Any) -> Rotation | None:
    """By which formula an attention rotates; None if it is not known.

    Scores are the same in whichever order both queries and keys are left.
    """
    if _takes_complex_angles(type(attention)):  # neighbours are turned as complex numbers
        return Rotation(interleaved=True, shared=False, half_width=True, passes=False)
    name = _ROTATES + ("_interleave" if getattr(attention.config, "rope_interleave", False) else "")
    function: Callable[..., Any] | None = _globals(type(attention).forward).get(name)
    return None if function is None else rotary.rotation_of(function)


def _takes_complex_angles(kind: type) -> bool:
    names = _globals(kind.forward)  # type: ignore[attr-defined]
    return _ROTATES_COMPLEX in names and _ROTATES not in names


@cache
def _globals(forward: Callable[..., Any]) -> dict[str, Any]:
    """What the code of a class's forward finds in its module."""
    code = inspect.unwrap(forward)
    return code.__globals__ if isinstance(code, FunctionType) else {}


def _follows(kind: type, config: Any) -> bool:
    """Whether a small instance gives the numbers that `_forward` gives."""
    names = _globals(kind.forward)  # type: ignore[attr-defined]
    if not {_INTERFACE, "eager_attention_forward"} <= names.keys():
        return False
    small = copy.deepcopy(config)
    try:
        for name, value in _SMALL.items():
            setattr(small, name, value)
        if small.q_lora_rank is not None:
            small.q_lora_rank = 8
        attention = _instance(kind, small)
        rotation = rotation_of(attention)
        if rotation is None:
            return False
        width = 2 if rotation.half_width else 4
        draw = torch.Generator().manual_seed(0)
        x, cos, sin = (torch.randn(2, 3, n, generator=draw) for n in (16, width, width))
        angles = torch.complex(cos, sin) if _takes_complex_angles(kind) else (cos, sin)
        given = kind.forward(  # type: ignore[attr-defined]
            attention, hidden_states=x, position_embeddings=angles, attention_mask=None
        )[0]
        mine = _forward(attention, rotation, x, angles, None)[0]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # it is built or called in another way
        return False
    return agree(given, mine)


def _instance(kind: type, config: Any) -> Any:
    """An attention in float32 on the CPU, with random weights, in evaluation."""
    with torch.device("cpu"):
        attention: nn.Module = kind(config, layer_idx=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return attention.eval()
