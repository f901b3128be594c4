"""The widths of a shape that decide how much a step computes and moves."""

from dataclasses import dataclass
from typing import Any

from shapes import model_config


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one layer.

    Attributes:
        linears: (in, out) of each linear; all of them take LoRA.
        heads, kv_heads: of queries, and of keys and values.
        qk_width, v_width: of one head.
        window: keys that a query sees at most; None: all before it.
        has_head_norms: whether queries and keys are normed, head by head.
    """

    linears: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    qk_width: int
    v_width: int
    window: int | None
    has_head_norms: bool


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of one layer; gate, up and down take LoRA."""

    number: int
    per_token: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention: its attention.
        experts: its routed experts; None in a dense layer.
        dense_width: of the gated part that every token takes, which is frozen: a dense layer's, or the shared experts';
            0: there is none.
        norms: RMS norms over the model's width.
    """

    attention: Attention
    experts: Experts | None
    dense_width: int
    norms: int


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A model: width, vocabulary, layers."""

    width: int
    vocabulary: int
    layers: tuple[Layer, ...]


def dimensions(shape: str, layers: int) -> Dimensions:
    """The dimensions of a shape of `shapes.py` with this many layers, read from Transformers' config."""
    config = model_config(shape, layers)
    found = tuple(_READERS[config.model_type](config, index) for index in range(layers))
    return Dimensions(width=config.hidden_size, vocabulary=config.vocab_size, layers=found)


def _grouped_queries(config: Any, window: int | None, has_head_norms: bool) -> Attention:
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return Attention(
        linears=((width, queries), (width, keys), (width, keys), (queries, width)),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        qk_width=head,
        v_width=head,
        window=window,
        has_head_norms=has_head_norms,
    )


def _latent(config: Any) -> Attention:
    """DeepSeek's multi-head latent attention: keys and values, and mostly queries, come out of narrow projections."""
    width, heads, qk = config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    narrow = config.q_lora_rank
    return Attention(
        linears=(
            *(((width, narrow), (narrow, heads * qk)) if narrow else ((width, heads * qk),)),
            (width, config.kv_lora_rank + config.qk_rope_head_dim),
            (config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
            (heads * config.v_head_dim, width),
        ),
        heads=heads,
        kv_heads=heads,
        qk_width=qk,
        v_width=config.v_head_dim,
        window=None,
        has_head_norms=False,
    )


def _window(config: Any, index: int) -> int | None:
    return config.sliding_window if config.layer_types[index] == "sliding_attention" else None


def _qwen3_moe(config: Any, _: int) -> Layer:
    experts = Experts(
        number=config.num_experts, per_token=config.num_experts_per_tok, width=config.moe_intermediate_size
    )
    return Layer(attention=_grouped_queries(config, None, True), experts=experts, dense_width=0, norms=2)


def _gpt_oss(config: Any, index: int) -> Layer:
    experts = Experts(
        number=config.num_local_experts, per_token=config.num_experts_per_tok, width=config.intermediate_size
    )
    attention = _grouped_queries(config, _window(config, index), False)
    return Layer(attention=attention, experts=experts, dense_width=0, norms=2)


def _latent_moe(config: Any, *, is_dense: bool) -> Layer:
    if is_dense:
        return Layer(attention=_latent(config), experts=None, dense_width=config.intermediate_size, norms=2)
    width = config.moe_intermediate_size
    experts = Experts(number=config.n_routed_experts, per_token=config.num_experts_per_tok, width=width)
    return Layer(attention=_latent(config), experts=experts, dense_width=config.n_shared_experts * width, norms=2)


def _glm(config: Any, index: int) -> Layer:
    return _latent_moe(config, is_dense=config.mlp_layer_types[index] == "dense")


def _deepseek_v3(config: Any, index: int) -> Layer:
    return _latent_moe(config, is_dense=index < config.first_k_dense_replace)


def _gemma3(config: Any, index: int) -> Layer:
    attention = _grouped_queries(config, _window(config, index), True)
    return Layer(attention=attention, experts=None, dense_width=config.intermediate_size, norms=4)


_READERS = {
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "glm4_moe_lite": _glm,
    "deepseek_v3": _deepseek_v3,
    "gemma3_text": _gemma3,
}
