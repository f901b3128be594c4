"""What decoders are told of a batch's samples: that padding behind needs no mask, and where packed samples start."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import expertune
from expertune.attention.sequences import Sequences
from expertune.hosts.samples import Labels, Teller
from tests.attention.chosen import kernels_chosen
from tests.cases import needs_cuda
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, of_tokens, run
from tests.hosts.recorded import both, make, run_all_as_recorded, step, tokens

FAMILIES = ["qwen3_moe", "gpt_oss", "glm4_moe_lite"]
PACKED = torch.cat((torch.arange(5), torch.arange(7)))[None]


def handed_down(model: nn.Module) -> list[dict[str, Any]]:
    """The keywords with which layers are called, from now on."""
    seen: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if name.endswith("layers.0"):
            module.register_forward_pre_hook(lambda _, _args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_needs_no_mask_in_training(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family))).train()
    seen = handed_down(model)
    inputs = batch()
    model(**inputs, use_cache=False)
    assert [kwargs.get("attention_mask") for kwargs in seen] == [None]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    model.eval()(**inputs, use_cache=False)
    model.train()(**inputs | {"attention_mask": inputs["attention_mask"].flip(-1)}, use_cache=False)
    expertune.optimize(model, attention="host")(**inputs, use_cache=False)
    assert all(kwargs["attention_mask"] is not None for kwargs in seen[1:])
    assert len(seen) == 5


@pytest.mark.parametrize("by_call", [False, True])
def test_attention_that_is_turned_to_both_directions_keeps_its_mask(checkpoint: Checkpoint, by_call: bool) -> None:
    model, stock = (load_tiny(checkpoint("qwen3_moe")).train() for _ in range(2))
    expertune.optimize(model)
    seen, inputs = handed_down(model), batch()
    for each in (model, stock):
        for module in each.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = by_call
    keywords = {"is_causal": False} if by_call else {}
    outs = [each(**inputs, use_cache=False, **keywords).logits for each in (model, stock)]
    assert seen[0]["attention_mask"] is not None
    torch.testing.assert_close(*[of_tokens(out, inputs) for out in outs])


@pytest.mark.parametrize("family", FAMILIES)
def test_where_packed_samples_start_goes_down(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family))).train()
    seen = handed_down(model)
    model(input_ids=tokens(0, batch=1), position_ids=PACKED, use_cache=False)
    (kwargs,) = seen
    assert kwargs["attention_mask"] is None
    for side in "qk":
        assert kwargs[f"cu_seq_lens_{side}"].tolist() == [0, 5, 12, 12, 12]
        assert kwargs[f"max_length_{side}"] == 12
    model(input_ids=tokens(0, batch=1), position_ids=torch.arange(12)[None], use_cache=False)
    assert seen[1].get("cu_seq_lens_q") is None, "one sample is not packed"
    with torch.no_grad():
        model.eval()(input_ids=tokens(0, batch=1), position_ids=PACKED, use_cache=False)
    evaluated = seen.pop()
    assert all(torch.equal(evaluated[f"cu_seq_lens_{side}"], kwargs[f"cu_seq_lens_{side}"]) for side in "qk")
    assert evaluated["attention_mask"] is None
    model.train()
    mask = torch.tensor([[1] * 7 + [0] * 5])
    positions = torch.tensor([[*range(7), *[1] * 5]])  # as some derive them from a mask
    labels = torch.where(mask == 0, -100, tokens(0, batch=1))
    given = {"attention_mask": mask, "labels": labels, "position_ids": positions}
    model(input_ids=tokens(0, batch=1), use_cache=False, **given)
    assert seen[2]["attention_mask"] is None
    assert seen[2].get("cu_seq_lens_q") is None, "beside a mask no sample starts"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "positions", [PACKED, torch.cat((torch.arange(5), torch.arange(40, 47)))[None]], ids=["0", "40"]
)
def test_beside_a_mask_positions_start_no_samples(checkpoint: Checkpoint, family: str, positions: torch.Tensor) -> None:
    """As PoSE skips positions within a sample (Zhu et al. 2023)."""
    folder, inputs = checkpoint(family), batch(length=12) | {"position_ids": positions.expand(2, -1)}
    ours, stock = expertune.optimize(load_tiny(folder)), load_tiny(folder)
    for trains in (True, False):
        truth = run(stock.train(trains), inputs)
        assert_equal_within(run(ours.train(trains), inputs), truth, 1e-11)
    recorded, plain, capture = both(folder, family)
    for seed in range(5):
        ids = tokens(seed)
        given = {"attention_mask": torch.ones_like(ids), "position_ids": inputs["position_ids"]}
        torch.testing.assert_close(step(recorded, ids, **given), step(plain, ids, **given))
    assert capture.replays > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reads", ["labels", "nothing", "hidden states"])
def test_padding_that_is_read_keeps_its_mask(checkpoint: Checkpoint, family: str, reads: str) -> None:
    """In a loss on all tokens, or by a caller who makes the loss."""
    folder, inputs = checkpoint(family), batch()
    if reads == "labels":
        inputs["labels"] = inputs["input_ids"]
    elif reads == "nothing":
        del inputs["labels"]
    more = {"use_cache": False, "output_hidden_states": reads == "hidden states"}
    ours, stock = expertune.optimize(load_tiny(folder)).train(), load_tiny(folder).train()
    if family == "gpt_oss":
        with nullcontext() if reads != "labels" else pytest.warns(UserWarning, match="Padding has labels"):
            ours(**inputs, **more)
        return
    outs = [model(**inputs, **more) for model in (ours, stock)]
    torch.testing.assert_close(outs[0].logits, outs[1].logits)


@pytest.mark.parametrize("hands_down", [True, False])
def test_a_mask_stays_where_the_host_would_look_at_positions_without(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, hands_down: bool
) -> None:
    decoder = expertune.optimize(load_tiny(checkpoint("qwen3_moe"))).train().model
    teller = Teller(decoder, Labels())
    monkeypatch.setattr(teller, "_hands_down", hands_down)
    inputs = {"input_ids": tokens(0), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    _, kwargs = teller(decoder, (), inputs) or ((), inputs)
    assert (kwargs["attention_mask"] is None) is not hands_down
    inputs["position_ids"] = PACKED.expand(2, -1)
    _, kwargs = teller(decoder, (), inputs) or ((), inputs)
    assert kwargs["attention_mask"] is not None


class Answers(TorchDispatchMode):
    """Counts how often Python asks for a number that a device has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_samples_are_not_asked_whether_they_are_packed(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family)), graphs=False).train()
    ids = tokens(0)
    inputs: list[dict[str, torch.Tensor]] = [{}, {"attention_mask": torch.ones_like(ids)}]
    counts = []
    for more in inputs:
        with Answers() as answers:
            model.model(input_ids=ids, use_cache=False, **more)
        counts.append(answers.count)
    assert counts == [0, 1], "whether padding lies behind"


@pytest.mark.parametrize("how", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_one_row_are_of_all(checkpoint: Checkpoint, family: str, how: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family))).train(how == "training")
    with torch.inference_mode(how == "inference"):
        outs = [
            model(input_ids=tokens(0), position_ids=each, use_cache=False).logits
            for each in (PACKED, PACKED.repeat(2, 1))
        ]
        apart = [model(input_ids=part, use_cache=False).logits for part in tokens(0).split([5, 7], dim=1)]
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(outs[0], torch.cat(apart, dim=1))


@pytest.mark.parametrize("given", ["a cache", "an empty cache", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_positions_start_no_samples(checkpoint: Checkpoint, family: str, given: str) -> None:
    """As in Transformers, which then looks at no positions; where none is given, evaluation makes one."""
    outs = []
    for model in (expertune.optimize(load_tiny(checkpoint(family))), load_tiny(checkpoint(family))):
        past = None if given == "none" else DynamicCache(config=model.config)
        with torch.no_grad():
            if given == "a cache":
                past = model.eval()(input_ids=tokens(1, batch=1)).past_key_values
            out = model.eval()(input_ids=tokens(0, batch=1), position_ids=PACKED, past_key_values=past)
            more = model(input_ids=tokens(2, batch=1), past_key_values=out.past_key_values)
        outs.append(torch.cat((out.logits, more.logits)))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_of_one_call_holds_for_its_second_forward(
    checkpoint: Checkpoint, family: str, memory: str
) -> None:
    """Positions of two calls before backward: beside a mask of one, whose layers run again, and alone in the other."""
    ours, plain = (expertune.optimize(load_tiny(checkpoint(family)), memory=how) for how in (memory, None))
    grads = []
    for model in (ours, plain):
        ids, positions = tokens(0, batch=1), PACKED.clone()
        losses = [
            model.train()(input_ids=ids, labels=ids, position_ids=positions, attention_mask=mask, use_cache=False).loss
            for mask in (torch.ones_like(ids), None)
        ]
        sum(losses).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_equal_within(*grads, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", [True, False])
def test_a_decoder_may_be_called_by_place(checkpoint: Checkpoint, family: str, trains: bool) -> None:
    inputs = batch()
    outs = []
    for model in (expertune.optimize(load_tiny(checkpoint(family))), load_tiny(checkpoint(family))):
        out = model.model.train(trains)(inputs["input_ids"], inputs["attention_mask"], use_cache=False)
        outs.append(of_tokens(out.last_hidden_state, inputs))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("skips", [[*range(0, 24, 2)], [*range(5), *range(20, 27)], [0, 1, 2, 2, 2, *range(3, 10)]])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_positions_that_skip_mean_is_the_hosts_to_say(
    checkpoint: Checkpoint, family: str, skips: list[int], trains: bool
) -> None:
    """Transformers' masks let a sample begin there; gpt-oss makes its own without looking at positions."""
    inputs = batch(length=12) | {"position_ids": torch.tensor([skips, skips])}
    del inputs["attention_mask"]
    ours, stock = expertune.optimize(load_tiny(checkpoint(family))), load_tiny(checkpoint(family))
    assert_equal_within(run(ours.train(trains), inputs), run(stock.train(trains), inputs), 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_that_there_are_no_weights_is_said_to_who_asks_for_them(checkpoint: Checkpoint, family: str) -> None:
    model = expertune.optimize(load_tiny(checkpoint(family)))
    with pytest.warns(UserWarning, match=r"output_attentions gives none.*attention='host'"):
        model(**batch(), output_attentions=True)
    expertune.optimize(model, attention="host")
    model.set_attn_implementation("eager")
    assert len(model(**batch(), output_attentions=True).attentions) == 2


def test_positions_in_more_dimensions_are_the_hosts_to_read(checkpoint: Checkpoint) -> None:
    decoder = expertune.optimize(load_tiny(checkpoint("qwen3_moe"))).train().model
    positions = PACKED.expand(3, 1, -1)
    _, kwargs = Teller(decoder, Labels())(
        decoder, (), {"input_ids": tokens(0, batch=1), "position_ids": positions}
    ) or ((), {})
    assert kwargs["attention_mask"] is None, "with one the host would not look for packed samples"


def test_what_a_collator_tells_is_not_looked_for(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"))).train()
    searched = step(model, tokens(0, batch=1), position_ids=PACKED)
    monkeypatch.setattr(Sequences, "of_positions", None)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    for mine, theirs in zip(step(model, tokens(0, batch=1), position_ids=PACKED, **told), searched, strict=True):
        assert mine is None or theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_replayed_whatever_a_batch_is_made_of(checkpoint: Checkpoint, family: str, memory: str) -> None:
    ours, stock, capture = both(checkpoint(family), family, memory=memory)
    starts = [(5, 7), (3, 4, 5), (1, 11), (6, 6), (2, 2, 8)]
    for seed, lengths in enumerate(starts):
        ids, positions = tokens(seed, batch=1), torch.cat([torch.arange(length) for length in lengths])[None]
        torch.testing.assert_close(*[step(model, ids, position_ids=positions) for model in (ours, stock)])
    assert capture.replays == 3 * 2 * 2
    for seed in range(5):
        mask = (torch.arange(12) < torch.tensor([[12], [7 + seed]])).long()
        given = {"attention_mask": mask, "labels": torch.where(mask == 0, -100, tokens(seed))}
        torch.testing.assert_close(*[step(model, tokens(seed), **given) for model in (ours, stock)])
    assert capture.replays == 2 * 3 * 2 * 2
    assert "CUDA graphs: 2 of 2 layers, 2 kinds of calls" in str(expertune.explain(ours))


def test_sequences_are_rounded_to_few_kinds() -> None:
    starts = torch.tensor([0, 100, 101, 700, 1000, 1100], dtype=torch.int32)
    rounded = Sequences(start_C=starts, longest=599).rounded(1100)
    assert rounded.start_C.tolist() == [*starts.tolist(), *[1100] * 11]
    assert rounded.longest == 1024
    assert Sequences(start_C=starts, longest=599).rounded(800).longest == 800, "no more than there are"
    assert Sequences(start_C=starts[:2], longest=100).rounded(100).start_C.numel() == 2
    assert torch.equal(rounded.of_rows(torch.arange(1100)).bincount(), starts.diff())


@needs_cuda
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(checkpoint: Checkpoint, family: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that lie elsewhere in each batch, through one recording: the bits of the same without recordings."""
    ran = kernels_chosen(monkeypatch)
    run_all_as_recorded(monkeypatch, with_heads=memory == "fast")
    ours, stock = (
        make(checkpoint(family), family, graphs=graphs, memory=memory).cuda().bfloat16() for graphs in (True, False)
    )
    for seed in range(7):
        ids = tokens(seed, batch=1, length=300).cuda()
        cut = 50 + 29 * seed  # the longest of each has at most 256
        positions = torch.cat((torch.arange(cut), torch.arange(300 - cut)))[None].cuda()
        results = [step(model, ids, position_ids=positions) for model in (ours, stock)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert "flash" in ran
    assert "CUDA graphs: 2 of 2 layers, 1 kinds of calls" in str(expertune.explain(ours))
