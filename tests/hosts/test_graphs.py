"""Models whose layers are replayed: every step's loss and gradients as without; and on a GPU with real graphs."""

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Cache

import expertune
from expertune.graphs import recording
from expertune.graphs.piece import Piece
from expertune.graphs.pool import Pool
from expertune.hosts import graphs
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.graphs.replayed import FakeCapture
from tests.hosts import memories
from tests.hosts.models import load_tiny
from tests.hosts.recorded import TARGETS, both, make, recorder_of, run_all_as_recorded, step, tokens

_LAYERS = [f"layers.{i}{part}" for i in range(2) for part in ("", ".self_attn", ".mlp")]
PIECES = {
    "qwen3_moe": _LAYERS,
    "gpt_oss": _LAYERS,
    "glm4_moe_lite": [
        "layers.0",
        "layers.0.self_attn",
        "layers.0.mlp",
        "layers.1",
        "layers.1.self_attn",
        "layers.1.mlp",
        "layers.1.mlp.shared_experts",
    ],
    "gemma3_text": [f"layers.{i}{part}" for i in range(2) for part in ("", ".self_attn")],
}


@pytest.mark.parametrize("family", PIECES)
def test_every_step_is_the_same(checkpoint: Checkpoint, family: str) -> None:
    ours, stock, capture = both(checkpoint(family), family)
    names = [name for name, module in ours.named_modules() if isinstance(vars(module).get("forward"), Piece)]
    assert [name.removeprefix("base_model.model.model.") for name in names] == PIECES[family]
    for seed in range(5):
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
    assert capture.replays == 3 * 2 * 2
    assert "CUDA graphs: 2 of 2 layers, 1 kinds of calls" in str(expertune.explain(ours))


def test_stock_adapters_that_come_later_to_a_dense_model_are_taken_in(checkpoint: Checkpoint) -> None:
    folder, capture = checkpoint("gemma3_text"), FakeCapture()
    ours, stock = (load_tiny(folder, torch.float32) for _ in range(2))
    expertune.optimize(ours, memory="fast")
    recorder = recorder_of(ours)
    recorder._pool_of = capture.pool
    config = LoraConfig(r=4, target_modules=TARGETS["gemma3_text"], init_lora_weights=False)
    torch.manual_seed(0)
    ours = get_peft_model(ours, config)
    torch.manual_seed(0)
    stock = get_peft_model(stock, config)
    for seed in range(5):
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
    assert capture.replays == 3 * 2 * 2


def test_a_trainers_gradient_checkpointing_does_not_keep_a_layer_from_being_recorded(checkpoint: Checkpoint) -> None:
    """TRL turns it on by default, and lets inputs require gradients for it."""
    ours, stock, capture = both(checkpoint("qwen3_moe"), memory="fast")
    for model in (ours, stock):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for seed in range(5):
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
    assert capture.replays == 3 * 2 * 2


def test_a_layer_that_runs_again_is_not_recorded_and_gives_memory_back(checkpoint: Checkpoint) -> None:
    """The planner is asked in every step, wherever the host checkpoints: around a layer, or in its forward (5.2x)."""
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    card = memories.Card(memories.PLENTY)
    memories.auto(ours, card=card)
    recorder = recorder_of(ours)
    recorder._pool_of = lambda _: Pool(capture, card)

    def replays(length: int, seed: int = 0) -> int:
        before, ids = capture.replays, tokens(seed, length=length)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
        return capture.replays - before

    # the first step is measured, two are seen, the next is recorded
    assert [replays(12, seed) for seed in range(5)] == [0, 0, 0, 2 * 2, 2 * 2]
    assert sum(piece.recordings for piece in recorder.pieces) == 2
    assert replays(14) == 0, "a longer batch is measured anew"
    assert sum(piece.recordings for piece in recorder.pieces) == 2, "there is memory enough"
    assert replays(12) == 2 * 2
    card.left = memories.TOO_LITTLE
    assert replays(12) == 0
    assert sum(piece.recordings for piece in recorder.pieces) == 0


def test_someone_may_lay_a_forward_around_a_layers(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"), memory="lean")
    calls: list[int] = []
    for model in (ours, stock):
        for number, layer in enumerate(model.get_base_model().model.layers):

            def around(*args: Any, number: int = number, inner: Any = layer.forward, **kwargs: Any) -> Any:
                calls.append(number)
                return inner(*args, **kwargs)

            layer.forward = around
    torch.testing.assert_close(step(ours, tokens(0)), step(stock, tokens(0)))
    assert set(calls) == {0, 1}
    assert capture.replays == 0


def test_router_logits_and_their_loss_are_the_hosts(checkpoint: Checkpoint) -> None:
    """The routers' logits leave a recording as outputs with gradient, and only where they are asked for."""
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for model in (ours, stock):
        model.base_model.model.model.layers[0].mlp.gate.weight.requires_grad_(True)
    for seed in range(10):
        ids = tokens(seed)
        extra = {"output_router_logits": True} if seed in (2, 3, 4, 5, 6, 8) else {}
        torch.testing.assert_close(step(ours, ids, **extra), step(stock, ids, **extra))
        logits = [model(input_ids=ids, use_cache=False, **extra).router_logits for model in (ours, stock)]
        torch.testing.assert_close(*logits)
    assert capture.replays > 3 * 2 * 2


def test_explain_says_that_no_more_are_made(checkpoint: Checkpoint) -> None:
    """Once their memory was given back three times, for steps that needed it."""
    ours, _, _ = both(checkpoint("qwen3_moe"))
    recorder = recorder_of(ours)
    ids = torch.randint(3, 60, (2, 9))
    for _ in range(3):
        assert "no more are made" not in str(expertune.explain(ours))
        for _ in range(3):
            step(ours, ids)
        assert "2 of 2 layers" in str(expertune.explain(ours))
        recorder.release()
    for _ in range(4):
        step(ours, ids)
    assert "CUDA graphs: 0 of 2 layers, 0 kinds of calls; no more are made" in str(expertune.explain(ours))


def test_recordings_that_have_paid_may_be_given_back_as_often_as_memory_is_wanted(checkpoint: Checkpoint) -> None:
    """As where now and then a batch is longer than any before."""
    ours, _, _ = both(checkpoint("qwen3_moe"))
    recorder = recorder_of(ours)
    ids = tokens(0)
    for _ in range(4):
        for _ in range(22):
            step(ours, ids)
        assert "2 of 2 layers" in str(expertune.explain(ours))
        recorder.release()
    assert recorder.is_on


def test_hidden_states_and_attentions_are_collected(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for seed in range(5):
        ids = tokens(seed)
        for extra in (
            {},
            {"output_hidden_states": True},
            {"output_hidden_states": [0, -1]},
            {"output_attentions": True},
        ):
            torch.testing.assert_close(step(ours, ids, **extra), step(stock, ids, **extra))
            collected = [model(input_ids=ids, use_cache=False, **extra) for model in (ours, stock)]
            for name in ("hidden_states", "attentions"):
                torch.testing.assert_close(*[getattr(each, name) for each in collected])
    assert capture.replays


@pytest.mark.parametrize("inner", ["mlp.gate", "self_attn.q_proj"])
def test_a_hook_that_comes_later_is_called(checkpoint: Checkpoint, inner: str) -> None:
    ours, _, capture = both(checkpoint("qwen3_moe"))
    for seed in range(4):
        step(ours, tokens(seed))
    assert capture.replays
    heard: list[Any] = []
    layer = ours.base_model.model.model.layers[0]
    handle = layer.get_submodule(inner).register_forward_hook(lambda *call: heard.append(call))
    for seed in range(5):
        step(ours, tokens(seed))
        assert len(heard) == seed + 1
    handle.remove()
    before = capture.replays
    for seed in range(3):
        step(ours, tokens(seed))
    assert capture.replays > before


TRAINED_BESIDE = ("post_attention_layernorm.weight", "q_norm.weight", "gate_up_proj", "down_proj", "mlp.gate.weight")


@pytest.mark.parametrize("trained", TRAINED_BESIDE)
def test_what_is_trained_beside_adapters(checkpoint: Checkpoint, trained: str) -> None:
    """Base weights that a layer's own code, or ours, reads while it is recorded."""
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for model in (ours, stock):
        for name, parameter in model.named_parameters():
            if name.endswith(trained):
                parameter.requires_grad_(True)
    for seed in range(5):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert capture.replays


def test_modules_that_are_saved_whole(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"), modules_to_save=["post_attention_layernorm"])
    for seed in range(5):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    assert capture.replays


def test_a_cache_that_a_call_fills_is_not_kept(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's default outside trainers: such layers are not recorded, and nothing holds their caches."""
    made: list[weakref.ref[Cache]] = []
    init = Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda cache, *args, **kw: made.append(weakref.ref(cache)) or init(cache, *args, **kw)
    )
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for seed in range(5):
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids, use_cache=True), step(stock, ids, use_cache=True))
    assert len(made) == 10
    gc.collect()
    assert not any(cache() for cache in made)
    assert "0 of 2 layers and 2 parts of layers" in str(expertune.explain(ours))
    assert capture.replays == 3 * 2 * 2, "their experts are"


def test_packed_padded_and_longer_batches_between(checkpoint: Checkpoint) -> None:
    """Where padding lies in front, ours looks for it in the layer, so such a batch is not replayed as a plain one.

    Its experts are: they do not depend on where samples lie.
    """
    ours, stock, capture = both(checkpoint("gpt_oss"))
    packed = torch.cat((torch.arange(5), torch.arange(7)))[None]
    padding = torch.ones(1, 12, dtype=torch.long)
    padding[:, :4] = 0
    for seed in range(5):
        ids = tokens(seed, batch=1)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
        for inputs in ({"position_ids": packed}, {"attention_mask": padding}):
            torch.testing.assert_close(step(ours, ids, **inputs), step(stock, ids, **inputs))
    assert "2 of 2 layers and 2 parts of layers" in str(expertune.explain(ours))
    # of each kind two are seen, and each of the others replays two layers or the experts of two
    assert capture.replays == 3 * 3 * 2 * 2


def test_long_batches_are_replayed_as_layers_alone(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some length on the experts by themselves keep a device busy, and the rest of a layer still does not."""
    monkeypatch.setattr(graphs, "_MOST_TOKENS_OF_BLOCK", 11)
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for cache, replays in ((True, 0), (False, 3 * 2 * 2)):
        for seed in range(5):
            ids = tokens(seed, batch=1)
            torch.testing.assert_close(step(ours, ids, use_cache=cache), step(stock, ids, use_cache=cache))
        assert capture.replays == replays


def test_batches_are_added_to_gradients_from_before(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient accumulation: large gradients go from the recording's memory straight to `.grad`."""
    monkeypatch.setattr(recording, "_LARGE", 1)
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for seed in range(4):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
    for seed in range(4):
        for model in (ours, stock):
            model(input_ids=tokens(seed), labels=tokens(seed), use_cache=False).loss.backward()
        both_grads = ([p.grad for p in model.parameters()] for model in (ours, stock))
        torch.testing.assert_close(*both_grads)
    assert capture.replays == 6 * 2 * 2


@pytest.mark.parametrize("comes_first", [True, False])
def test_a_reference_without_adapters_does_not_end_recordings(checkpoint: Checkpoint, comes_first: bool) -> None:
    """As trainers of preferences take it: before the forward (GRPO), or between forward and backward (DPO)."""

    def refer(model: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=ids, use_cache=False).logits

    def compare(model: Any, ids: torch.Tensor) -> list[torch.Tensor | None]:
        model.zero_grad()
        reference = refer(model, ids) if comes_first else None
        logits = model(input_ids=ids, use_cache=False).logits
        reference = refer(model, ids) if reference is None else reference
        (logits - reference).square().sum().backward()
        return [logits.detach(), reference, *(p.grad for p in model.parameters())]

    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for seed in range(6):
        ids = tokens(seed)
        torch.testing.assert_close(compare(ours, ids), compare(stock, ids))
    assert capture.replays == 4 * 2 * 2
    assert capture.preparations == 4 * 2


def test_adapters_that_change_are_seen(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    ids = tokens(0)
    for _ in range(3):
        step(ours, ids)
    for change in (
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ):
        for model in (ours, stock):
            change(model)
            model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
        for _ in range(4):
            torch.testing.assert_close(step(ours, ids), step(stock, ids))
    assert capture.replays


def test_generation_runs_as_without(checkpoint: Checkpoint) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"), memory="fast")
    for seed in range(4):
        ids = tokens(seed)
        torch.testing.assert_close(step(ours, ids), step(stock, ids))
    before, prompt = capture.replays, tokens(9)[:1, :4]
    generated = [model.eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for model in (ours, stock)]
    assert torch.equal(*generated)
    assert capture.replays == before > 0


def test_restore_and_copies(checkpoint: Checkpoint) -> None:
    ours = make(checkpoint("qwen3_moe"), "", graphs=True)
    twin = copy.deepcopy(ours)
    mine = {id(module) for module in ours.modules()}
    pieces = [vars(module).get("forward") for module in twin.modules()]
    assert not mine & {id(piece.module) for piece in pieces if isinstance(piece, Piece)}
    expertune.restore(ours)
    assert not any(isinstance(vars(module).get("forward"), Piece) for module in ours.modules())


def test_copies_are_replayed_by_recordings_of_their_own(checkpoint: Checkpoint) -> None:
    """As for an average of weights."""
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    for seed in range(4):
        step(ours, tokens(seed))
    twin, copies = copy.deepcopy(ours), FakeCapture()
    recorder_of(twin)._pool_of = copies.pool
    replays, preparations = capture.replays, capture.preparations
    for seed in range(5):
        torch.testing.assert_close(step(twin, tokens(seed)), step(stock, tokens(seed)))
    assert copies.replays == 3 * 2 * 2
    assert copies.preparations == 3 * 2
    assert (capture.replays, capture.preparations) == (replays, preparations), "those of the first model"


@needs_cuda
@pytest.mark.parametrize("large", [recording._LARGE, 0], ids=["", "all gradients by themselves"])
@pytest.mark.parametrize("family", PIECES)
def test_on_a_gpu(checkpoint: Checkpoint, family: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 under autocast: the same kernels on the same numbers, so the same bits."""
    monkeypatch.setattr(recording, "_LARGE", large)
    run_all_as_recorded(monkeypatch)
    folder = checkpoint(family)
    ours, stock = (make(folder, family, graphs=graphs).cuda().bfloat16() for graphs in (True, False))
    for seed in range(6):
        ids = tokens(seed, length=32).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            results = [step(model, ids) for model in (ours, stock)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        for model in (ours, stock):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
    assert "CUDA graphs: 2 of 2 layers, 1 kinds of calls" in str(expertune.explain(ours))


@pytest.mark.parametrize("way", [expertune.optimize, expertune.restore])
def test_a_piece_that_somebody_keeps_runs_its_module_from_then_on(checkpoint: Checkpoint, way: Any) -> None:
    ours, stock, capture = both(checkpoint("qwen3_moe"))
    layer = ours.get_base_model().model.layers[0]
    layer.forward = partial(lambda forward, *args, **kwargs: forward(*args, **kwargs), layer.forward)
    way(ours)
    if way is expertune.optimize:
        recorder_of(ours)._pool_of = capture.pool
    for seed in range(6):
        torch.testing.assert_close(step(ours, tokens(seed)), step(stock, tokens(seed)))
