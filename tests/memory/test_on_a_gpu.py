"""With real streams: inputs moved to pinned memory, the same bits in less room; and the experts' peak by tiles."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import expertune
from expertune.activations import SwiGlu
from expertune.backends import choose
from expertune.experts import experts
from expertune.hosts.sizes import model_bytes
from expertune.memory import policy, token_tiles
from expertune.memory.meter import room_of
from expertune.memory.needs import Batches, least_needs
from expertune.memory.offload import LEAST_TOKENS, CudaLane, Offload
from expertune.memory.replay import LayerMemory, RoutingReplay
from expertune.memory.token_tiles import TokenTiles
from expertune.shapes import ExpertsLayout, LoraFactors, Problem
from expertune.walk import ExpertsStep, Projection
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch
from tests.hosts.passes import assert_equal_within, run
from tests.memory.checkpoints import checkpoint_layer

pytestmark = needs_cuda

LAYERS, WIDTH = 12, 1024
INPUT = LEAST_TOKENS * WIDTH * 2  # bytes


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).sin()


class _Model(nn.Module):
    def __init__(self, offload: Offload | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        replay = RoutingReplay()
        self.calls = [
            replay.wrap(
                checkpoint_layer,
                memory=LayerMemory(
                    moving=None if offload is None else partial(offload.moving, stays=layer is self.layers[-1])
                ),
            )
            for layer in self.layers
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        for call, layer in zip(self.calls, self.layers, strict=True):
            x = call(layer, x)
        return x

    def step(self, seed: int) -> list[Tensor]:
        """Gradients of a batch made on the device, so that nothing before it waits for the host."""
        self.zero_grad()
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(1, LEAST_TOKENS, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)
        self(x.requires_grad_()).square().mean().backward()
        return [p.grad for p in self.parameters() if p.grad is not None]


class _CountingLane(CudaLane):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.num_buffers = 0

    def buffer(self, num_bytes: int) -> Tensor:
        self.num_buffers += 1
        buffer = super().buffer(num_bytes)
        assert buffer.is_pinned()
        return buffer


def test_gradients_are_bit_equal_step_after_step() -> None:
    lane = _CountingLane(torch.device("cuda", torch.cuda.current_device()))
    plain, moved = _Model(None), _Model(Offload(lambda _: lane))
    for seed in range(5):
        truth, ours = plain.step(seed), moved.step(seed)
        assert len(ours) == len(truth) == 2 * LAYERS
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert lane.num_buffers == LAYERS - 1


def test_on_a_stream_of_the_callers_too() -> None:
    plain, moved = _Model(None).step(0), _Model(Offload())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [moved.step(0) for _ in range(2)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for ours in results for a, b in zip(ours, plain, strict=True))


def _peak(model: _Model) -> int:
    model.step(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.step(1)
    return torch.cuda.max_memory_allocated() - before


def test_the_peak_of_a_step_falls_by_the_inputs_that_are_moved() -> None:
    kept = _peak(_Model(None))
    moved = _peak(_Model(Offload()))
    # Of all but the last layer less what is on the card meanwhile: in backward the one that comes back while another is
    # used, in forward those that still leave while the next layer runs.
    assert moved <= kept - (LAYERS - 4) * INPUT


def test_the_allocator_takes_no_more_than_is_allocated_though_the_host_runs_ahead() -> None:
    """Under `record_stream` the memory of every input would wait for the host, which is layers ahead."""
    model = _Model(Offload())
    model.step(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(10**9)
    model.step(1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated() < LAYERS // 2 * INPUT


def test_forward_and_backward_wait_for_nothing_once_buffers_are_there() -> None:
    model = _Model(Offload())
    model.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _experts_peak(num_tokens: int, tiles: TokenTiles | None) -> int:
    """The most bytes that the experts of one layer take, forward and backward, beside inputs and weights."""
    gc.collect()  # what other tests have left would be freed meanwhile
    num_experts, top_k, width, hidden, rank = 16, 4, 512, 256, 16
    layout = ExpertsLayout(
        num_experts=num_experts,
        model_width=width,
        expert_width=hidden,
        has_gate=True,
        is_transposed=False,
        has_bias=False,
    )
    widths = (width, 2 * hidden, hidden)
    capability = torch.cuda.get_device_capability()
    backend, _ = choose(Problem(device="cuda", capability=capability, dtype=torch.bfloat16, widths=widths))
    step = ExpertsStep(layout=layout, gate=SwiGlu(), backend=backend)

    def projection(width_in: int, width_out: int) -> Projection:
        a = torch.randn(num_experts * rank, width_in, device="cuda").requires_grad_()
        b = torch.randn(width_out, rank * num_experts, device="cuda").requires_grad_()
        weight = torch.randn(num_experts, width_out, width_in, device="cuda", dtype=torch.bfloat16)
        return Projection(weight=weight, adapters=(LoraFactors(a=a, b=b, scale=1.0),))

    pair = projection(width, 2 * hidden), projection(hidden, width)
    x_TD = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    scores_TE = torch.randn(num_tokens, num_experts, device="cuda").softmax(-1)
    weight_TK, expert_TK = scores_TE.topk(top_k, dim=-1)
    weight_TK = weight_TK.detach().requires_grad_()
    dout_TD = torch.randn_like(x_TD)
    leaves = [x_TD, weight_TK, *(factor for p in pair for f in p.adapters for factor in (f.a, f.b))]
    peaks = []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if tiles is None:
            out_TD = experts(x_TD, step.dispatch(expert_TK), weight_TK, pair, step)
        else:
            out_TD = token_tiles.experts(x_TD, tiles.dispatch(expert_TK, step), weight_TK, pair, step)
        torch.autograd.grad(out_TD, leaves, dout_TD)
        del out_TD
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return min(peaks[2:])  # from the third on by noted launches; what others have begun in threads may take memory, too


def test_the_experts_peak_grows_by_what_goes_in_and_out_of_the_walk() -> None:
    tiles = TokenTiles(least_tokens=4096, least_rows=0)
    more_tokens = 2 * 4096 * 3
    more = _experts_peak(2 * 4096 * 4, tiles) - _experts_peak(2 * 4096, tiles)
    in_and_out = 2 * 512 * 2 + 4 * (4 + 12)  # output, its input's gradient; of each choice the router's and the sort
    slack = 2**20  # lists of tiles of rows, and what the allocator rounds up
    assert more <= more_tokens * in_and_out + slack
    whole = _experts_peak(2 * 4096 * 4, None) - _experts_peak(2 * 4096, None)
    assert whole > 2 * more, "the whole walk keeps rows, so the test can fail"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", {}), ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 2})],
)
def test_a_lean_models_gradients_are_those_of_one_that_keeps_all(
    family: str, settings: dict[str, Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "Offload", lambda: Offload(least_tokens=1))
    monkeypatch.setattr(policy, "TokenTiles", lambda: TokenTiles(least_tokens=16, least_rows=0))
    results = []
    for memory in ("fast", "lean"):
        model = stock(checkpoint(family, num_hidden_layers=4, **settings), lora()).float().cuda()
        expertune.optimize(model, memory=memory)
        inputs = {name: value.cuda() for name, value in batch(num_rows=4, length=32).items()}
        results.append([run(model, inputs) for _ in range(3)][-1])
    assert_equal_within(results[1], results[0], 1e-3)


@pytest.mark.parametrize("memory", ["fast", "auto", "lean"])
def test_a_step_takes_no_less_than_its_bound(checkpoint: Checkpoint, memory: str) -> None:
    widths = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts_per_tok": 4, "num_hidden_layers": 8}
    model = stock(checkpoint("qwen3_moe", **widths), lora(r=16), torch.bfloat16).cuda()
    expertune.optimize(model, memory=memory)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0)
    rows, length = LEAST_TOKENS // 64, 64
    inputs = {name: value.cuda() for name, value in batch(num_rows=rows, length=length).items()}
    sizes = model_bytes(inner)
    needs = least_needs(
        sizes,
        optimizer=2 * sizes.gradients,
        memory=memory,
        batches=Batches(tokens=rows * length, tokens_later=rows * length, sums_gradients=False),
    )
    others = torch.cuda.memory_allocated() - sizes.base - sizes.trained
    for _ in range(2):  # there is optimizer state in the second one
        torch.cuda.reset_peak_memory_stats()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert needs.inputs + needs.kept > 0
    assert needs.total <= torch.cuda.max_memory_allocated() - max(others, 0)


def test_room_is_what_can_still_be_had() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = room_of(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    after = room_of(device)
    assert before is not None
    assert after is not None
    assert 0 <= after < torch.cuda.get_device_properties(device).total_memory - held.nbytes
    assert before - after == pytest.approx(held.nbytes, abs=2**26)
