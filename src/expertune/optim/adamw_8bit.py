"""AdamW whose moments are kept in 8 bits, and whose step is one launch for all parameters.

The moments take two bytes a parameter instead of eight. A parameter in bfloat16 is rounded by chance (`by_chance.py`).
"""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from expertune.optim import dynamic_8bit
from expertune.optim.fused_step import DTYPES, FusedStep

# of a parameter: the codes of its moments, then the maxima of their blocks
_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_max", "exp_avg_sq_max")
_is_sparse = attrgetter("grad.is_sparse")


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with both moments in 8 bits, 2.03 bytes a parameter.

    For a trainer of Transformers or TRL: `optimizer_cls_and_kwargs=(expertune.AdamW8bit, {"lr": 2e-4})`.

    `clip_coef`, a number or a tensor on any device, multiplies the gradients of the next step, which stay as they
    are; None leaves them. `expertune.clip_in_step` sets it. (torch's name, in `clip_grad_norm_`.)

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
        self._step = FusedStep(_MOMENTS, is_by_chance=True)
        self.clip_coef: Tensor | float | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was known of parameters and states is looked at anew."""
        super().__setstate__(state)
        self._step, self.clip_coef = FusedStep(_MOMENTS, is_by_chance=True), None

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
        clip_coef = None if self.clip_coef is None else torch.as_tensor(self.clip_coef)
        self.clip_coef = None
        for number, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            if any(map(_is_sparse, params)):
                raise ValueError("AdamW8bit takes no sparse gradients. Use torch.optim.SparseAdam for that parameter.")
            self._step(number, group, params, [self.state[param] or self._begin(param) for param in params], clip_coef)
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


def _why_not(param: Tensor) -> str | None:
    """Why a parameter cannot be stepped, in words; None if it can."""
    if param.dtype not in DTYPES:
        return f"AdamW8bit trains {', '.join(map(str, DTYPES))}; got a parameter in {param.dtype}."
    if param.numel() == 0:
        return None
    dense = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride != dense:
            return (
                "AdamW8bit trains parameters that fill their memory without gaps; got one of shape "
                f"{tuple(param.shape)} with strides {param.stride()}. Make it contiguous."
            )
        dense *= size
    return None
