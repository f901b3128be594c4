"""The roofline of each part of a LoRA step: its time on a card, from its FLOPs and bytes alone.

    python benchmarks/roofline.py [--shape qwen3] [--layers 12] [--contexts 1024,4096] [--rank 64] [--card CARD]

A step is forward and backward of one sequence and the optimizer, with frozen bfloat16 weights and float32 factors on
the attention and on all experts; nothing is computed twice but the scores of the attention in its backward. Each
product reads its operands and writes its result once, in bfloat16, and takes the longer of what its FLOPs and what its
bytes need; elementwise work that can be part of a product is. The logits never reach memory. Every expert has rows.
Factors are read in float32 in forward and in backward, and their gradients written. A short context can be faster than
this: what one product writes may still lie in the cache for the next, and some experts may have no rows.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dimensions import Attention, Dimensions, Experts, Layer, dimensions
from parts import PARTS
from shapes import SHAPES

_BF16, _FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Card:
    """What one GPU sustains: TFLOP/s of dense bfloat16 products, TB/s to and from its memory."""

    tflops: float
    tb_s: float


CARDS = {
    # An H200: a plain bfloat16 product of 8,192³ random numbers over nearly a second (the first 15 ms read 777, then
    # the card's power limit tells), and a plain copy.
    "NVIDIA H200": Card(tflops=680, tb_s=4.24),
    # An H100 (SXM, 80 GB): a plain copy; its products are taken to be the H200's, which has the same chip.
    "H100 80GB HBM3": Card(tflops=680, tb_s=3.0),
}


@dataclass(frozen=True)
class Work:
    """One operation: the part of a step it belongs to, its name, its FLOPs, and the bytes it reads and writes."""

    part: str
    name: str
    flops: float
    bytes: float

    def roofline_ms(self, card: Card) -> float:
        """The longer of what the FLOPs and what the bytes need."""
        return max(self.flops / card.tflops, self.bytes / card.tb_s) / 1e9


def card_of(device: str) -> Card | None:
    """The ceilings of a device by its full name; None where they were not measured."""
    return next((card for name, card in CARDS.items() if name in device), None)


def step(model: Dimensions, tokens: int, rank: int) -> list[Work]:
    """All operations of one step."""
    work = [operation for layer in model.layers for operation in _layer(model, layer, tokens, rank)]
    work += _head(model, tokens)
    return [*work, *_optimizer(count_factors(model, rank))]


def roofline_ms(work: list[Work], card: Card) -> dict[str, float]:
    """Milliseconds of each part."""
    return {part: sum(each.roofline_ms(card) for each in work if each.part == part) for part in PARTS}


def count_factors(model: Dimensions, rank: int) -> int:
    """Numbers in all LoRA factors."""
    number = 0
    for layer in model.layers:
        number += sum(rank * (i + o) for i, o in layer.attention.linears)
        if layer.experts:
            number += layer.experts.number * rank * (2 * model.width + 3 * layer.experts.width)
    return number


def _layer(model: Dimensions, layer: Layer, tokens: int, rank: int) -> list[Work]:
    work = [*_attention(layer.attention, tokens), *_rest(model, layer, tokens)]
    for i, o in layer.attention.linears:
        work += _linear(tokens, i, o, rank)
    if layer.experts:
        work += _linear(tokens, model.width, layer.experts.number, rank=0)  # the router
        work += _experts(layer.experts, model.width, tokens, rank)
    if layer.dense_width:
        work += _linear(tokens, model.width, 2 * layer.dense_width, rank=0)
        work += _linear(tokens, layer.dense_width, model.width, rank=0)
    return work


def _linear(T: int, I: int, O: int, rank: int) -> list[Work]:  # noqa: E741
    """A frozen dense linear, with LoRA unless its rank is 0."""
    flops = 2 * T * I * O + 2 * T * rank * (I + O)
    moved = _BF16 * (T * (I + O) + I * O) + _FP32 * rank * (I + O)
    work = [Work("dense products", "forward", flops, moved), Work("dense products", "backward", flops, moved)]
    if rank:
        gradients = _BF16 * T * (I + O) + _FP32 * rank * (I + O)
        work.append(Work("dense products", "factors' gradients", 2 * T * rank * (I + O), gradients))
    return work


def _experts(experts: Experts, D: int, T: int, R: int) -> list[Work]:
    """The walk of one layer, from the sorted rows to their sum; only h, the mids and x are kept for backward."""
    E, F, N = experts.number, experts.width, T * experts.per_token

    def operation(name: str, flops: float, row_numbers: int, weights: int, factors: int, tokens: int = 0) -> Work:
        return Work("experts", name, flops, _BF16 * (N * row_numbers + weights + T * tokens) + _FP32 * factors)

    up, down = E * R * (D + 2 * F), E * R * (F + D)  # numbers in the factors of gate_up and of down
    up_flops, down_flops = 4 * N * D * F + 2 * N * R * (D + 2 * F), 2 * N * D * F + 2 * N * R * (F + D)
    return [
        operation("gate_up forward", up_flops, D + 3 * F, 2 * E * D * F, up),  # writes h and the gate's output
        operation("down forward", down_flops, F + D, E * D * F, down),
        operation("combine", 0, D, 0, 0, tokens=D),
        operation("down backward", down_flops, D + 5 * F, E * D * F, down),  # reads h, writes dh and the gate's output
        operation("gate_up backward", up_flops, 2 * F + D, 2 * E * D * F, up),
        operation("sum of dx", 0, D, 0, 0, tokens=D),
        operation("factors' gradients", 2 * N * R * (2 * D + 3 * F), 2 * D + 3 * F, 0, up + down),
    ]


def _attention(attention: Attention, T: int) -> list[Work]:
    """Two products of all pairs forward and five backward: the scores, again, and four gradients."""
    w = min(attention.window or T, T)
    pairs = attention.heads * (w * (w + 1) // 2 + (T - w) * w)
    qk, v = attention.qk_width, attention.v_width
    queries, outputs = T * attention.heads * qk, T * attention.heads * v
    keys_and_values = T * attention.kv_heads * (qk + v)
    moved = _BF16 * (queries + keys_and_values + outputs)
    return [
        Work("attention", "forward", 2 * pairs * (qk + v), moved),
        # reads what forward read and wrote, and the output's gradient; writes those of queries, keys and values
        Work("attention", "backward", 2 * pairs * (3 * qk + 2 * v), 2 * moved),
    ]


def _rest(model: Dimensions, layer: Layer, T: int) -> list[Work]:
    """Norms with the residual stream's sums, rotary embeddings with the norms of heads, the gates of dense parts."""
    attention = layer.attention
    heads = T * attention.qk_width * (attention.heads + attention.kv_heads)
    work = [
        # forward reads the stream and what is added, writes both; backward reads two gradients and the stream
        Work("the rest", "norms", 0, _BF16 * layer.norms * (4 + 4) * T * model.width),
        Work("the rest", "rotary", 0, _BF16 * (2 + (3 if attention.has_head_norms else 2)) * heads),
    ]
    if layer.dense_width:
        work.append(Work("the rest", "dense gate", 0, _BF16 * (3 + 5) * T * layer.dense_width))
    return work


def _head(model: Dimensions, T: int) -> list[Work]:
    """The embedding, the last norm, and the products of the head: logits, and the gradient of what it reads."""
    product = Work("dense products", "head", *_head_product(model, T))
    rows = _BF16 * T * model.width
    return [Work("the rest", "embedding", 0, 2 * rows), product, product, Work("the rest", "last norm", 0, 5 * rows)]


def _head_product(model: Dimensions, T: int) -> tuple[int, int]:
    return 2 * T * model.width * model.vocabulary, _BF16 * (model.width * model.vocabulary + T * model.width)


def _optimizer(factors: int) -> list[Work]:
    """The norm of the gradients, then AdamW with 8-bit moments and one float32 scale for 256 of them."""
    moments = 2 * (1 + _FP32 / 256)
    update = 3 * _FP32 + 2 * moments  # the gradient is read, the factor and its moments are read and written
    return [Work("optimizer", "norm", 0, _FP32 * factors), Work("optimizer", "AdamW", 0, update * factors)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--card", choices=CARDS, default="NVIDIA H200")
    args = parser.parse_args()
    contexts = [int(context) for context in args.contexts.split(",")]
    model = dimensions(args.shape, args.layers)
    columns = [roofline_ms(step(model, context, args.rank), CARDS[args.card]) for context in contexts]
    table = Table("part", *(f"{context:,}" for context in contexts), title=f"roofline on an {args.card}, ms")
    for part in PARTS:
        table.add_row(part, *(f"{parts[part]:.2f}" for parts in columns))
    table.add_row("sum", *(f"{sum(parts.values()):.2f}" for parts in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
