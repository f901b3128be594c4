"""Which tokens have a label, counted before a model's layers run, so that nobody waits for the count after them.

A trainer picks the hidden states that have a label by a mask, and puts what is computed of them back by it. Each time
torch asks the device how many there are: twice in forward, when all layers must be done, and twice in backward. Until
the answer has come nothing more is submitted, and then the device waits for Python. Here the count is asked for before
the layers, and comes while they run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

IGNORED = -100  # the label of a token that is not learned, in Transformers and torch


class LabelRows(TorchFunctionMode):
    """While it is entered, `x[mask]` and `masked_scatter` by the mask `label != -100` wait for nothing.

    Without it they are torch's own; so are all others.

    Args:
        label: int64. The mask is that of any tensor on the same memory.
    """

    def __init__(self, label: Tensor) -> None:
        super().__init__()
        self._label = label
        self._mask = label != IGNORED
        self._count = _Coming(self._mask.sum())
        self._rows: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:  # by which TRL calls none of these
            return func(*args, **kwargs)
        if func in (torch.Tensor.__ne__, torch.Tensor.ne, torch.ne) and self._is_label(*args):
            return self._mask
        if func is torch.Tensor.__getitem__ and args[1] is self._mask:
            return self._take(args[0])
        if func is torch.Tensor.masked_scatter and args[1] is self._mask and args[0].shape == self._mask.shape:
            return self._put(args[0], args[2])
        return func(*args)

    def _is_label(self, x: Any, other: Any) -> bool:
        mine = self._label
        is_same = isinstance(x, Tensor) and x.data_ptr() == mine.data_ptr() and x.dtype == mine.dtype
        is_same = is_same and x.shape == mine.shape and x.stride() == mine.stride()
        return is_same and isinstance(other, int) and other == IGNORED

    def _take(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[self._mask.dim() :])
        return flat if self._has_all() else flat.index_select(0, self._places())

    def _put(self, into: Tensor, x: Tensor) -> Tensor:
        if self._has_all():
            return x.view(into.shape)
        return into.reshape(-1).index_copy(0, self._places(), x).view(into.shape)

    def _has_all(self) -> bool:
        return self._count.value() == self._mask.numel()

    def _places(self) -> Tensor:
        if self._rows is None:  # a sort knows how long its result is
            order = self._mask.reshape(-1).to(torch.uint8).argsort(descending=True, stable=True)
            self._rows = order[: self._count.value()]
        return self._rows


class _Coming:
    """A number on its way from the device.

    Args:
        x: a scalar.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, self._event = x, None
        if x.is_cuda:
            self._x = torch.empty((), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._event = torch.cuda.current_stream(x.device).record_event()

    def value(self) -> int:
        """Once it has come."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._x)
