"""What a forward pass keeps for backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept_for_backward(leaving_out: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Around the pass: gives the bytes of each storage that it keeps, by address.

    Args:
        leaving_out: tensors whose storages are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in leaving_out}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
