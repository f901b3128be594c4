"""The roofline against values computed by hand, and against figures that were counted or measured elsewhere."""

import pytest

from dimensions import Attention, Dimensions, Experts, Layer, dimensions
from parts import PARTS
from roofline import Card, Work, card_of, count_factors, roofline_ms, step
from shapes import SHAPES

# one layer: 2 query heads over 1 of width 4, 4 experts of width 3 with 2 a token
ONE = Dimensions(
    width=8,
    vocabulary=10,
    layers=(
        Layer(
            attention=Attention(
                linears=((8, 8), (8, 4), (8, 4), (8, 8)),
                heads=2,
                kv_heads=1,
                qk_width=4,
                v_width=4,
                window=None,
                has_head_norms=True,
            ),
            experts=Experts(number=4, per_token=2, width=3),
            dense_width=0,
            norms=2,
        ),
    ),
)
TOKENS, RANK = 16, 2


def summed(part: str, model: Dimensions = ONE, tokens: int = TOKENS, rank: int = RANK) -> tuple[float, float]:
    work = [each for each in step(model, tokens, rank) if each.part == part]
    return sum(each.flops for each in work), sum(each.bytes for each in work)


def test_factors() -> None:
    # 2 * (16 + 12 + 12 + 16) of the attention, 4 * 2 * (2 * 8 + 3 * 3) of the experts
    assert count_factors(ONE, RANK) == 112 + 200


def test_experts() -> None:
    flops, moved = summed("experts")
    # 32 rows: 12NDF of the weights, 6NR(2D + 3F) of the factors
    assert flops == 12 * 32 * 8 * 3 + 6 * 32 * 2 * 25
    # rows 16D + 28F bytes, weights of 3 * 4 * 8 * 3 numbers twice, x and dx once, factors three times in float32
    assert moved == 32 * (16 * 8 + 28 * 3) + 2 * 2 * 288 + 2 * 2 * 16 * 8 + 3 * 4 * 200


def test_attention() -> None:
    # 136 pairs a head; 2 products forward, 5 backward, 2 * 4 FLOPs a pair each
    # q and o 128 numbers, k and v 64 each; once forward, twice backward, in 2 bytes
    assert summed("attention") == (2 * 136 * 7 * 8, 3 * 2 * (128 + 128 + 64 + 64))


def test_dense_products() -> None:
    flops, moved = summed("dense products")
    # weights of 64 + 32 + 32 + 64 numbers, the router's 32 and the head's 80, each twice; LoRA three times
    assert flops == 2 * 2 * 16 * (192 + 32 + 80) + 3 * 2 * 16 * 112
    linears = 3 * 2 * 16 * 56 + 2 * 2 * 192 + 3 * 4 * 112
    router = 2 * 2 * (16 * 12 + 32)
    head = 2 * 2 * (80 + 16 * 8)
    assert moved == linears + router + head


def test_optimizer() -> None:
    # norm 4; gradient 4, factor 4 + 4, moments 2 + 2, their scales 16 / 256
    assert summed("optimizer") == (0, pytest.approx(312 * 20.0625))


def test_the_rest() -> None:
    # two norms of 8 passes, rotary and norms of 3 heads in 5, the embedding in 2, the last norm in 5; 2 bytes each
    assert summed("the rest") == (0, 2 * (2 * 8 * 128 + 5 * 16 * 4 * 3 + 2 * 128 + 5 * 128))


def test_a_window_leaves_pairs_out() -> None:
    layer = ONE.layers[0]
    windowed = Attention(**vars(layer.attention) | {"window": 4})
    model = Dimensions(**vars(ONE) | {"layers": (Layer(**vars(layer) | {"attention": windowed}),)})
    assert summed("attention", model)[0] == 2 * (1 + 2 + 3 + 13 * 4) * 7 * 8


def test_a_part_takes_the_longer_of_both_for_each_operation() -> None:
    card = Card(tflops=2.0, tb_s=0.5)
    work = [Work("experts", "products", 4e12, 0.5e12), Work("experts", "copies", 1e12, 1e12)]
    assert roofline_ms(work, card) == dict.fromkeys(PARTS, 0) | {"experts": 2000 + 2000}


def test_the_widths_are_those_of_the_host() -> None:
    assert count_factors(dimensions("qwen3", 12), 64) == 642_514_944  # a run said 642.5 million
    windows = [layer.attention.window for layer in dimensions("gptoss", 4).layers]
    assert windows == [128, None, 128, None]
    dense, *sparse = dimensions("glm", 3).layers
    assert (dense.experts, dense.dense_width) == (None, 10240)
    assert {(layer.experts.number, layer.dense_width) for layer in sparse if layer.experts} == {(64, 1536)}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_roofline(shape: str) -> None:
    parts = roofline_ms(step(dimensions(shape, 6), 4096, 16), Card(tflops=1, tb_s=1))
    idle = {"experts"} if shape == "gemma3" else set()
    assert {part for part, ms in parts.items() if not ms} == idle


def test_a_card_is_found_by_its_full_name() -> None:
    assert card_of("NVIDIA H100 80GB HBM3") == Card(tflops=680, tb_s=3.0)
    assert card_of("NVIDIA H200") == Card(tflops=680, tb_s=4.24)
    for other in ("NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"):
        assert card_of(other) is None
