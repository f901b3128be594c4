"""The moments of a run, in made-up bytes."""

import pytest

from expertune.memory.needs import Batches, LayerBytes, ModelBytes, Needs, least_needs
from expertune.memory.offload import LEAST_TOKENS

LAYERS = (LayerBytes(input=2, kept=0), LayerBytes(input=2, kept=50), LayerBytes(input=2, kept=30))
MODEL = ModelBytes(base=1000, trained=100, gradients=90, num_gradients=45, layers=LAYERS)
STATE = 180


def needs(memory: str, tokens: int, later: int = 0, *, sums: bool = False, optimizer: int = STATE) -> Needs:
    batches = Batches(tokens=tokens, tokens_later=later, sums_gradients=sums)
    return least_needs(MODEL, optimizer=optimizer, memory=memory, batches=batches)


def test_few_tokens_need_most_when_the_optimizer_steps() -> None:
    assert needs("fast", 1, 1) == Needs(base=1000, trained=100, gradients=90, optimizer=STATE)
    assert needs("fast", 1, 1).total == 1370


def test_what_is_there_when_backward_begins() -> None:
    assert needs("fast", 10) == Needs(base=1000, trained=100, kept=800)
    assert needs("fast", 10, 10) == Needs(base=1000, trained=100, optimizer=STATE, kept=800)
    assert needs("fast", 10, 10, sums=True) == Needs(base=1000, trained=100, gradients=90, optimizer=STATE, kept=800)
    # the longest batch may come in the first step, before there is any state
    assert needs("fast", 20, 10) == Needs(base=1000, trained=100, kept=1600)


def test_checkpointed_layers_keep_their_inputs_and_run_again_one_at_a_time() -> None:
    second_runs_again = Needs(base=1000, trained=100, inputs=2 * 2 * 10, kept=50 * 10)
    assert needs("auto", 10) == needs("lean", 10) == second_runs_again
    expensive_last = ModelBytes(base=0, trained=0, gradients=0, num_gradients=0, layers=(*LAYERS, LayerBytes(25, 30)))
    batches = Batches(tokens=10, tokens_later=0, sums_gradients=False)
    last = least_needs(expensive_last, optimizer=0, memory="auto", batches=batches)
    assert (last.inputs, last.kept) == (31 * 10, 30 * 10)


@pytest.mark.parametrize("more", [0, 1000])
@pytest.mark.parametrize("memory", ["auto", "lean"])
def test_of_a_long_batch_two_inputs_and_one_tile_are_held(memory: str, more: int) -> None:
    """`auto` too, in a step that the card is too small for."""
    tokens = LEAST_TOKENS + more
    before, long = needs(memory, LEAST_TOKENS - 1), needs(memory, tokens)
    assert (before.inputs, before.kept) == (2 * 2 * (LEAST_TOKENS - 1), 50 * (LEAST_TOKENS - 1))
    assert (long.inputs, long.kept) == (2 * 2 * tokens, 50 * LEAST_TOKENS)
    many = ModelBytes(base=0, trained=0, gradients=0, num_gradients=0, layers=LAYERS[1:] * 10)
    batches = Batches(tokens=tokens, tokens_later=0, sums_gradients=False)
    assert least_needs(many, optimizer=0, memory=memory, batches=batches).inputs == 2 * 2 * tokens


def test_parts_are_named() -> None:
    parts = Needs(base=1, trained=2, gradients=3, optimizer=4, inputs=5, kept=6).parts()
    assert list(parts.values()) == [1, 2, 3, 4, 5, 6]
    assert parts["optimizer state"] == 4
