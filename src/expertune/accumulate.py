"""Accumulate: which gradients of a backward pass may be added to `.grad` by whoever computes them, and sums of them.

Autograd is otherwise given a new tensor to add: for the factors of many experts that costs more traffic than all else
that is done with them. So it is left out where nobody could tell.

A recorded pass writes to the same memory in every replay, from where gradients would have to be copied. So those that
can be are not part of it, but postponed: computed after the replay, where they belong.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expertune.recorded_pass import RecordedPass, Running
from expertune.shapes import Tensors


@dataclass(frozen=True)
class Postponed:
    """Gradients that are computed once a recorded backward pass has been replayed.

    Args:
        leaves: whose gradients.
        bind: makes `compute` from the tensors that it reads, which stay where they are.
        saved: those it reads first, made before that pass.
        made: those it reads then, made in it.
    """

    leaves: tuple[Tensor, ...]
    bind: Callable[[Tensors], Callable[[Tensors], Tensors]]
    saved: Tensors
    made: Tensors

    @cached_property
    def compute(self) -> Callable[[Tensors], Tensors]:
        """Of each leaf what its gradient is added to in place, or None: the gradients, None where one was added."""
        return self.bind((*self.saved, *self.made))


class Postponement(RecordedPass):
    """Of one backward pass that is recorded: the gradients of leaves that it covers may be postponed."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__(leaves)
        self.postponed: list[Postponed] = []


_running: Running[Postponement] = Running()
_adding = threading.RLock()


@contextmanager
def postponing(leaves: Sequence[Tensor]) -> Iterator[list[Postponed]]:
    """Around a backward pass that is recorded, of these leaves: gives what has been postponed by its end."""
    postponement = Postponement(leaves)
    with _running.during(postponement):
        yield postponement.postponed


def postponement_of(leaves: Sequence[Tensor | None]) -> Postponement | None:
    """That to which the gradients of all of these may be left; None if they are wanted now."""
    return _running.of(leaves)


@contextmanager
def sums(ctx: Any, tensors: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Of each tensor its `.grad`, where a gradient of this backward pass may be added to it in place; else None.

    That is so of a leaf that has a gradient from before, without hooks that would want to see the new one, in a
    backward pass that adds to `.grad` rather than handing the gradient out. Meanwhile no other thread adds; on a GPU
    autograd has one for all passes.

    Args:
        ctx: of the `torch.autograd.Function` whose backward runs.
        tensors: among its inputs.
    """
    found = _sums(ctx, tensors)
    with _adding if any(total is not None for total in found) else nullcontext():
        yield found


def _sums(ctx: Any, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    totals = [None if tensor is None or not _is_plain(tensor) else tensor.grad for tensor in tensors]
    if all(total is None for total in totals):  # as in the first batch of a step
        return totals
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    leaves = {id(node.variable): node for node in nodes if getattr(node, "variable", None) is not None}
    return [
        total if total is not None and (node := leaves.get(id(tensor))) is not None and _will_run(node) else None
        for tensor, total in zip(tensors, totals, strict=True)
    ]


def plus(total: Tensor | None, grad: Tensor | None, *, widens: bool = True) -> Tensor | None:
    """A sum of gradients with one more, in place.

    Args:
        total: None before the first.
        grad: None for none.
        widens: whether a sum is held in float32 or wider.
    """
    if grad is None:
        return total
    if total is None:
        return grad.to(torch.promote_types(grad.dtype, torch.float32)) if widens else grad
    return total.add_(grad)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a leaf with a gradient, and nothing but autograd would see one more."""
    grad = tensor.grad if tensor.is_leaf and tensor.requires_grad else None  # else the pass would add nothing
    return (
        grad is not None
        and type(grad) is Tensor
        and grad.dtype == tensor.dtype
        and grad.is_contiguous()
        and not grad.requires_grad
        and not tensor._backward_hooks
        and not getattr(tensor, "_post_accumulate_grad_hooks", None)
        # autograd lets the caller wait for the stream of what it adds itself
        and (not grad.is_cuda or torch._C._cuda_getCurrentRawStream(grad.device.index) == 0)
    )


def _will_run(node: Any) -> bool:
    """Whether the pass will add to the leaf's `.grad`."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's word for `autograd.grad` of the leaf
        return False
