"""The bytes that a run takes at least, by part: a lower bound, so that what is refused by it could not have run.

A run comes through three moments, at each of which all of that moment's parts lie on the device at once:

- the optimizer steps: weights, gradients and its state;
- backward begins, in any step: weights, and what forward has kept;
- backward begins, in a step after the first one: its state too, and where micro batches are summed, gradients.

The one that takes most is the bound. Not counted is what another trainer or kernel may do without: logits, what
attention and norms keep, the working memory of a layer, what the allocator cannot use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertune.memory.offload import LEAST_TOKENS
from expertune.memory.token_tiles import TokenTiles


class LayerBytes(NamedTuple):
    """Of one layer and token.

    Args:
        input: of what goes into the layer.
        kept: what its experts keep for backward, `2D + K(4F + 4R + 14)` in 16 bits; 0 without experts.
    """

    input: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What of a model takes memory in training.

    Args:
        base: bytes of the weights that are not trained.
        trained: bytes of those that are.
        gradients: bytes of those that a text surely gives a gradient, and so of their gradients.
        num_gradients: their numbers.
        layers: in the order in which they run, from the first that takes part in backward.
    """

    base: int
    trained: int
    gradients: int
    num_gradients: int
    layers: tuple[LayerBytes, ...]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Tokens in the largest micro batch that a run surely meets.

    Args:
        tokens: in any step.
        tokens_later: while there is optimizer state, and with `sums_gradients` a gradient too; 0 if there is none.
        sums_gradients: whether an optimizer step sums the gradients of several micro batches.
    """

    tokens: int
    tokens_later: int
    sums_gradients: bool


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes at one moment of a run, by part.

    Args:
        base: weights that are not trained.
        trained: weights that are.
        gradients: of trained weights.
        optimizer: its state.
        inputs: of layers, kept to run them again.
        kept: for backward, by experts.
    """

    base: int
    trained: int
    gradients: int = 0
    optimizer: int = 0
    inputs: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Each part by its name in words."""
        return {
            "base weights": self.base,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "layer inputs": self.inputs,
            "kept by experts": self.kept,
        }


def least_needs(model: ModelBytes, *, optimizer: int, memory: str, batches: Batches) -> Needs:
    """What a run needs at the moment that takes most.

    Args:
        model: its bytes.
        optimizer: bytes of the optimizer's state.
        memory: "auto", "fast" or "lean". "auto" is bounded as "lean" is, which it turns to in a step that needs it.
        batches: what is trained on.
    """
    inputs, kept = _activations(model.layers, memory, batches.tokens)
    moments = [
        Needs(base=model.base, trained=model.trained, gradients=model.gradients, optimizer=optimizer),
        Needs(base=model.base, trained=model.trained, inputs=inputs, kept=kept),
    ]
    if batches.tokens_later:
        inputs, kept = _activations(model.layers, memory, batches.tokens_later)
        gradients = model.gradients if batches.sums_gradients else 0
        moments.append(
            Needs(
                base=model.base,
                trained=model.trained,
                gradients=gradients,
                optimizer=optimizer,
                inputs=inputs,
                kept=kept,
            )
        )
    return max(moments, key=lambda needs: needs.total)


def _activations(layers: Sequence[LayerBytes], memory: str, tokens: int) -> tuple[int, int]:
    """Bytes of layer inputs and of what experts keep, when most of both lies on the device."""
    if memory == "fast":
        return 0, tokens * sum(layer.kept for layer in layers)
    is_moved = tokens >= LEAST_TOKENS
    rerun_tokens = min(tokens, TokenTiles().least_tokens)
    most = (0, 0)
    for number, layer in enumerate(layers):  # each runs again, with the inputs of those before it still there
        first = max(number - 1, 0) if is_moved else 0  # the one before is on its way back
        inputs = tokens * sum(before.input for before in layers[first : number + 1])
        most = max(most, (inputs, rerun_tokens * layer.kept), key=sum)
    return most
