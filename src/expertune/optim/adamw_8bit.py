"""AdamW whose moments are kept in 8 bits, and whose step is one launch for all parameters.

The moments are kept in bitsandbytes' format (`dynamic_8bit.py`): two bytes a parameter instead of eight. Theirs is a
launch for each parameter, and a wait. The update is torch's: decay first, then `m / (√v + eps)`, with both moments as
they are before they are rounded. A parameter in bfloat16 is rounded by chance (`by_chance.py`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from expertune.kernels import has_triton
from expertune.optim import by_chance, dynamic_8bit

# of a parameter: the codes of its moments, then the maxima of their blocks
_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_max", "exp_avg_sq_max")
_moments = itemgetter(*_MOMENTS)
_dtype, _is_sparse = attrgetter("dtype"), attrgetter("is_sparse")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with both moments in 8 bits, 2.03 bytes a parameter.

    For a trainer of Transformers or TRL: `optimizer_cls_and_kwargs=(expertune.AdamW8bit, {"lr": 2e-4})`.

    `clip_coef`, a number on any device, multiplies the gradients of the next step, which stay as they are; None leaves
    them. `expertune.clip_in_step` sets it. (torch's name, in `clip_grad_norm_`.)

    Args:
        params: parameters or groups of them, in float32, bfloat16 or float16; their gradients in any of these. In
            bfloat16 updates are rounded up or down by chance, the same in every run, so that small ones count.
        lr: learning rate.
        betas: of the running means of the gradient and of its square.
        eps: is added to the root of the latter.
        weight_decay: decoupled from the gradient.

    Raises:
        ValueError: a setting is out of range, or a parameter has another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        are_betas = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        if not (are_betas and all(setting >= 0 for setting in (lr, eps, weight_decay))):
            raise ValueError(
                "expected lr, eps and weight_decay of at least 0 and two betas in [0, 1), "
                f"got {lr=}, {eps=}, {weight_decay=}, {betas=}."
            )
        self._known: dict[int, _Known] = {}
        self.clip_coef: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was known of parameters and states is looked at anew."""
        super().__setstate__(state)
        self._known, self.clip_coef = {}, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses what the step does not read: other dtypes, and numbers that do not fill their memory."""
        super().add_param_group(param_group)
        if refused := [reason for param in self.param_groups[-1]["params"] if (reason := _why_not(param)) is not None]:
            self.param_groups.pop()
            raise ValueError(refused[0])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient. Waits for nothing.

        Args:
            closure: computes loss and gradients anew, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip_coef, self.clip_coef = self.clip_coef, None
        for number, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            grads = [param.grad for param in params]
            for alike in self._alike(number, params, grads):
                alike.step(grads, clip_coef, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but the moments keep their dtypes, which torch would cast to the parameter's.

        Args:
            state_dict: from `state_dict`.

        Raises:
            ValueError: it is another optimizer's, or of parameters of other sizes.
        """
        if wrong := [state.keys() for state in state_dict["state"].values() if not set(_MOMENTS) <= state.keys()]:
            raise ValueError(
                f"expected the state of an AdamW8bit, with {', '.join(_MOMENTS)}; got {', '.join(map(str, wrong[0]))}. "
                "Go on with the optimizer that the state is of, or begin without a state."
            )
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        ours = [param for group in self.param_groups for param in group["params"]]
        pairs = zip(saved, ours, strict=False)  # torch refuses groups of other numbers
        held = [(param, state_dict["state"][number]) for number, param in pairs if number in state_dict["state"]]
        for param, state in held:
            sizes = [state[name].numel() for name in _MOMENTS]
            expected = [moment.numel() for moment in _zero_moments(torch.empty_like(param, device="meta"))]
            if sizes != expected:
                raise ValueError(
                    f"expected moments of {expected} numbers for a parameter of shape {tuple(param.shape)}, got "
                    f"{sizes}: the state is of a parameter of another size, such as an adapter of another rank. Go on "
                    "with that one, or begin without a state."
                )
        super().load_state_dict(state_dict)
        for param, state in held:
            self.state[param].update({name: state[name].to(param.device, copy=True) for name in _MOMENTS})

    def _alike(self, number: int, params: list[Tensor], grads: list[Tensor]) -> "list[_Alike]":
        """The parameters of a group that have a gradient, by what a launch has in common.

        What a step asks of each of thousands takes milliseconds: so this is known until one of them, its state or its
        moments is another, or a gradient has another form.
        """
        if any(map(_is_sparse, grads)):
            raise ValueError("AdamW8bit takes no sparse gradients. Use torch.optim.SparseAdam for that parameter.")
        states = [self.state[param] or self._begin(param) for param in params]
        tensors = [*params, *chain.from_iterable(map(_moments, states))]
        form = [*map(id, tensors)], [*map(id, states)], [*map(_dtype, grads)], [*map(Tensor.stride, grads)]
        known = self._known.get(number)
        if known is None or known.form != form:
            places: defaultdict[Any, list[int]] = defaultdict(list)
            for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
                places[param.device, param.dtype, grad.dtype, state["step"]].append(i)
            alike = [_Alike(i, [params[n] for n in i], [states[n] for n in i], grads) for i in places.values()]
            known = self._known[number] = _Known(form, tensors, alike)
        return known.alike

    def _begin(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        state: dict[str, Any] = self.state[param]
        state["step"] = 0
        state.update(zip(_MOMENTS, _zero_moments(param), strict=True))
        return state


def _zero_moments(param: Tensor) -> tuple[Tensor, ...]:
    """As `_MOMENTS` names them."""
    mean, mean_maximum = dynamic_8bit.zeros(param, is_signed=True)
    square, square_maximum = dynamic_8bit.zeros(param, is_signed=False)
    return mean, square, mean_maximum, square_maximum


class _Alike:
    """Parameters that share device, dtypes and number of steps.

    Args:
        places: of theirs among the parameters of their group that have gradients.
        params: themselves.
        states: theirs.
        grads: of all, as they are laid out.
    """

    def __init__(
        self, places: list[int], params: list[Tensor], states: list[dict[str, Any]], grads: list[Tensor]
    ) -> None:
        self._places, self._params, self._states = places, params, states
        self._turned = [n for n, i in enumerate(places) if grads[i].stride() != params[n].stride()]
        self._launch = _launcher(params, [*map(_moments, states)])

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


def _why_not(param: Tensor) -> str | None:
    """Why a parameter cannot be stepped, in words; None if it can."""
    if param.dtype not in _DTYPES:
        return f"AdamW8bit trains {', '.join(map(str, _DTYPES))}; got a parameter in {param.dtype}."
    dense = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride != dense:
            return (
                "AdamW8bit trains parameters that fill their memory without gaps; got one of shape "
                f"{tuple(param.shape)} with strides {param.stride()}. Make it contiguous."
            )
        dense *= size
    return None


def _update(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """The numbers of step `count`, from 1: decay, both betas, size, correction of the root, eps, the count itself."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    step_size, root_correction = lr / (1 - beta1**count), (1 - beta2**count) ** -0.5
    return 1 - lr * group["weight_decay"], beta1, beta2, step_size, root_correction, group["eps"], count


def _launcher(
    params: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]
) -> Callable[[Sequence[Tensor], Tensor, tuple[float, ...]], None]:
    """What steps such parameters, of their gradients, what multiplies these, and the numbers of the step."""
    device = params[0].device
    if device.type == "cuda" and has_triton():
        from expertune.kernels.adamw_8bit import Stepped, adamw_8bit  # imports Triton, which is optional

        stepped = Stepped(params, moments)
        return lambda grads, clip_coef, update: adamw_8bit(stepped, grads, clip_coef, tables(device), update)

    def step_each(grads: Sequence[Tensor], clip_coef: Tensor, update: tuple[float, ...]) -> None:
        for param, grad, each in zip(params, grads, moments, strict=True):
            plain_step(param, grad, clip_coef, each, update)

    return step_each


@lru_cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


@lru_cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of the first and of the second moment stand for, as the kernel takes it."""
    signed, unsigned = (dynamic_8bit.values(is_signed=is_signed).to(device) for is_signed in (True, False))
    return signed, unsigned


def plain_step(
    param: Tensor, grad: Tensor, clip_coef: Tensor, moments: Sequence[Tensor], update: tuple[float, ...]
) -> None:
    """The step of one parameter in plain torch, in place: what the kernel is held against.

    Args:
        param: dense.
        grad: laid out as `param` is.
        clip_coef: what multiplies it.
        moments: their codes and the maxima of their blocks.
        update: the numbers of the step.
    """
    decay, beta1, beta2, step_size, root_correction, eps, count = update
    mean_codes, square_codes, mean_maximum, square_maximum = moments
    g, p = _in_memory(grad).float() * clip_coef.float(), _in_memory(param)
    mean = dynamic_8bit.decode(mean_codes, mean_maximum, is_signed=True)
    square = dynamic_8bit.decode(square_codes, square_maximum, is_signed=False)
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    stepped = p.float() * decay - step_size * mean / (square.sqrt() * root_correction + eps)
    p.copy_(by_chance.to_bfloat16(stepped, int(count)) if p.dtype == torch.bfloat16 else stepped)
    for codes, maximum, x, is_signed in (
        (mean_codes, mean_maximum, mean, True),
        (square_codes, square_maximum, square, False),
    ):
        new_codes, new_maximum = dynamic_8bit.encode(x, is_signed=is_signed)
        codes.copy_(new_codes)
        maximum.copy_(new_maximum)


def _in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers in the order in which they lie, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))
