"""The bytes that autograd has saved for backward, counted while they lie there, and the bound on them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.hosts.sizes import model_bytes
from expertune.memory.needs import Batches, least_needs


def least_saved(model: PreTrainedModel, memory: str, num_tokens: int) -> int:
    """The bound on what a batch leaves for backward."""
    # where gradients and state are nothing, the optimizer's step is never the moment that takes most
    sizes = replace(model_bytes(model), gradients=0)
    batches = Batches(tokens=num_tokens, tokens_later=0, sums_gradients=False)
    needs = least_needs(sizes, optimizer=0, memory=memory, batches=batches)
    return needs.inputs + needs.kept


class SavedBytes:
    """Each storage once, however often it was saved, from the first time to when the last is let go.

    Args:
        model: whose parameters are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._now = 0
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._holders: Counter[int] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around forward and backward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor):
            yield

    def _pack(self, tensor: Tensor) -> "_Holder":
        return _Holder(self, tensor, is_counted=tensor.untyped_storage().data_ptr() not in self._own)

    def add(self, tensor: Tensor, number: int) -> None:
        """One holder of a tensor more, or less."""
        storage = tensor.untyped_storage()
        before = self._holders[storage.data_ptr()]
        self._holders[storage.data_ptr()] += number
        self._now += storage.nbytes() * ((before + number > 0) - (before > 0))
        self.peak = max(self.peak, self._now)


class _Holder:
    """A saved tensor, which tells when it is let go."""

    def __init__(self, saved: SavedBytes, tensor: Tensor, is_counted: bool) -> None:
        self.tensor = tensor
        self._saved = saved if is_counted else None
        if self._saved is not None:
            self._saved.add(tensor, 1)

    def __del__(self) -> None:
        if self._saved is not None:
            self._saved.add(self.tensor, -1)
