"""Steps of AdamW with moments in 8 bits, one launch for all parameters that are alike.

The moments are in bitsandbytes' format (`dynamic_8bit.py`). The update is torch's: decay first, then `m / (√v + eps)`,
with both moments as they are before they are rounded.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.kernels import has_triton
from expertune.optim import by_chance, dynamic_8bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_dtype = attrgetter("dtype")


class FusedStep:
    """Steps the parameters of an optimizer's groups.

    What a step asks of each of thousands of parameters takes milliseconds: so what they have in common is known until
    one of them, its state or its moments is another, or a gradient has another form.

    Args:
        moments: under which names a parameter's state holds the codes of its moments, then the maxima of their blocks;
            it counts steps as `step`.
        is_by_chance: whether a parameter in bfloat16 is rounded by chance (`by_chance.py`), or to the nearest.
    """

    def __init__(self, moments: Sequence[str], *, is_by_chance: bool) -> None:
        self._moments = itemgetter(*moments)
        self._is_by_chance = is_by_chance
        self._known: dict[int, _Known] = {}

    def __call__(
        self,
        number: int,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        clip_coef: Tensor | None = None,
    ) -> None:
        """One step, of parameters and states in place. Waits for nothing.

        Args:
            number: of the group.
            group: has the settings: `lr`, `betas`, `eps` and `weight_decay`.
            params: those of the group that have a gradient, in one of `DTYPES`, dense.
            states: theirs.
            clip_coef: a number that multiplies the gradients, on any device; None leaves them.
        """
        grads = [param.grad for param in params if param.grad is not None]
        for alike in self._alike(number, params, states, grads):
            alike.step(grads, clip_coef, group)

    def _alike(
        self, number: int, params: list[Tensor], states: list[dict[str, Any]], grads: list[Tensor]
    ) -> "list[_Alike]":
        """The parameters of a group by what a launch has in common."""
        tensors = [*params, *chain.from_iterable(map(self._moments, states))]
        steps = [state["step"] for state in states]
        apart = [step - steps[0] for step in steps]  # which stays as it is while all of them are stepped
        form = [*map(id, tensors)], [*map(id, states)], [*map(_dtype, grads)], [*map(Tensor.stride, grads)], apart
        known = self._known.get(number)
        if known is None or known.form != form:
            places: defaultdict[Any, list[int]] = defaultdict(list)
            for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
                places[param.device, param.dtype, grad.dtype, state["step"]].append(i)
            alike = [self._of(i, params, states, grads) for i in places.values()]
            known = self._known[number] = _Known(form, tensors, alike)
        return known.alike

    def _of(
        self, places: list[int], params: list[Tensor], states: list[dict[str, Any]], grads: list[Tensor]
    ) -> "_Alike":
        mine, theirs = [params[n] for n in places], [states[n] for n in places]
        launch = _launcher(mine, [*map(self._moments, theirs)], self._is_by_chance)
        return _Alike(places, mine, theirs, grads, launch)


class _Alike:
    """Parameters that share device, dtypes and number of steps.

    Args:
        places: of theirs among the parameters of their group that have gradients.
        params: themselves.
        states: theirs.
        grads: of all, as they are laid out.
        launch: steps them.
    """

    def __init__(
        self,
        places: list[int],
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Tensor],
        launch: "_Launch",
    ) -> None:
        self._places, self._params, self._states, self._launch = places, params, states, launch
        self._turned = [n for n, i in enumerate(places) if grads[i].stride() != params[n].stride()]

    def step(self, grads: list[Tensor], clip_coef: Tensor | None, group: dict[str, Any]) -> None:
        """One step.

        Args:
            grads: of all parameters of the group that have one.
            clip_coef: what multiplies them.
            group: has the settings.
        """
        for state in self._states:
            state["step"] += 1
        mine = [grads[i] for i in self._places]
        for n in self._turned:  # so that its numbers lie in the order of the parameter's
            mine[n] = torch.empty_like(self._params[n]).copy_(mine[n])
        device = self._params[0].device
        clip_coef = _one(device) if clip_coef is None else clip_coef.to(device, non_blocking=True)
        self._launch(mine, clip_coef, _update(group, self._states[0]["step"]))


class _Known(NamedTuple):
    """What a group was when it was last looked at.

    Args:
        form: which its parameters, states and moments are, and how the gradients are laid out.
        tensors: those; they live on, so that no other gets the `id` of one.
        alike: the parameters, by what a launch has in common.
    """

    form: tuple[list[Any], ...]
    tensors: list[Tensor]
    alike: list[_Alike]


def _update(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """The numbers of step `count`, from 1: decay, both betas, size, correction of the root, eps, the count itself."""
    # as fractions also where they are whole: kernels are compiled for one or the other
    lr, beta1, beta2 = map(float, (group["lr"], *group["betas"]))
    step_size, root_correction = lr / (1 - beta1**count), (1 - beta2**count) ** -0.5
    return 1 - lr * group["weight_decay"], beta1, beta2, step_size, root_correction, float(group["eps"]), count


_Launch = Callable[[Sequence[Tensor], Tensor, tuple[float, ...]], None]


def _launcher(params: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], is_by_chance: bool) -> _Launch:
    """What steps such parameters, of their gradients, what multiplies these, and the numbers of the step.

    Raises:
        ValueError: moments lie on another device.
    """
    device = params[0].device
    if others := {moment.device for each in moments for moment in each if not _is_paged(moment)} - {device}:
        raise ValueError(
            f"the moments of parameters on {device} lie on {', '.join(map(str, others))}. Before a step, move the "
            "optimizer's state to the parameters' device."
        )
    if device.type == "cuda" and has_triton():
        from expertune.kernels.adamw_8bit import Stepped, adamw_8bit  # imports Triton, which is optional

        stepped = Stepped(params, moments, is_by_chance=is_by_chance)
        return lambda grads, clip_coef, update: adamw_8bit(stepped, grads, clip_coef, tables(device), update)

    def step_each(grads: Sequence[Tensor], clip_coef: Tensor, update: tuple[float, ...]) -> None:
        for param, grad, each in zip(params, grads, moments, strict=True):
            plain_step(param, grad, clip_coef, each, update, is_by_chance=is_by_chance)

    return step_each


def _is_paged(moment: Tensor) -> bool:
    """Whether CUDA moves its memory to wherever it is read: bitsandbytes says so of what it makes as the CPU's."""
    return getattr(moment, "is_paged", False)


@lru_cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


@lru_cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of the first and of the second moment stand for, as the kernel takes it."""
    signed, unsigned = (dynamic_8bit.values(is_signed=is_signed).to(device) for is_signed in (True, False))
    return signed, unsigned


def plain_step(
    param: Tensor,
    grad: Tensor,
    clip_coef: Tensor,
    moments: Sequence[Tensor],
    update: tuple[float, ...],
    *,
    is_by_chance: bool = True,
) -> None:
    """The step of one parameter in plain torch, in place: what the kernel is held against.

    Args:
        param: dense.
        grad: laid out as `param` is.
        clip_coef: what multiplies it.
        moments: their codes and the maxima of their blocks.
        update: the numbers of the step.
        is_by_chance: whether bfloat16 is rounded by chance.
    """
    decay, beta1, beta2, step_size, root_correction, eps, count = update
    mean_codes, square_codes, mean_maximum, square_maximum = moments
    g, p = _in_memory(grad).float() * clip_coef.float(), _in_memory(param)
    mean = dynamic_8bit.decode(_in_memory(mean_codes), mean_maximum, is_signed=True)
    square = dynamic_8bit.decode(_in_memory(square_codes), square_maximum, is_signed=False)
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    stepped = p.float() * decay - step_size * mean / (square.sqrt() * root_correction + eps)
    p.copy_(by_chance.to_bfloat16(stepped, int(count)) if is_by_chance and p.dtype == torch.bfloat16 else stepped)
    for codes, maximum, x, is_signed in (
        (mean_codes, mean_maximum, mean, True),
        (square_codes, square_maximum, square, False),
    ):
        new_codes, new_maximum = dynamic_8bit.encode(x, is_signed=is_signed)
        _in_memory(codes).copy_(new_codes)
        maximum.copy_(new_maximum)


def _in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers in the order in which they lie, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))
