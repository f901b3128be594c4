"""Steps of bitsandbytes' 8-bit AdamW, `optim="adamw_8bit"` of a trainer, taken by our kernel in one launch.

bitsandbytes launches a kernel and waits for the device for each parameter. Our kernel reads and writes the same state,
so its optimizer and its checkpoints stay what they are: before a step we step the parameters that we can and put their
gradients aside, theirs passes those by, and after it the gradients are back. The first step of a parameter, which makes
its state, is theirs. torch calls such hooks around the step of every optimizer; ours look at those of models of ours.

A step differs from theirs in the order of rounding, and in two things. Decay comes before the update and not after it.
And a second moment above zero is never rounded to zero (`dynamic_8bit.py`).
"""

import sys
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from expertune.kernels import has_triton
from expertune.kernels.launch import ceil_div
from expertune.optim import dynamic_8bit
from expertune.optim.fused_step import DTYPES, FusedStep

_MOMENTS = ("state1", "state2", "absmax1", "absmax2")
_MAPS = (("dynamic", True), ("udynamic", False))  # their names, and whether codes have signs
_DEVICES = ("cuda",)  # on which our kernel runs

_models: WeakSet[nn.Module] = WeakSet()  # whose optimizers are looked at
_taken: "WeakKeyDictionary[Optimizer, _Taken | None]" = WeakKeyDictionary()  # what was seen of them
_handles: list[RemovableHandle] = []  # of our two hooks, once they lie


def take_over(model: nn.Module) -> None:
    """Step this model's parameters by our kernel where bitsandbytes' 8-bit AdamW would, until `give_back`."""
    _models.add(model)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))
    _taken.clear()


def give_back(model: nn.Module) -> None:
    """Leave this model's parameters to bitsandbytes again."""
    _models.discard(model)
    _taken.clear()
    if not _models:
        while _handles:
            _handles.pop().remove()


class _Taken:
    """What we keep of an optimizer: how its parameters are stepped, and the gradients that lie aside within a step."""

    def __init__(self, optimizer: Any) -> None:
        self._step = FusedStep(_MOMENTS, is_by_chance=False)
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._overridden = {*optimizer.mng.pid2config}, {*optimizer.mng.index2config}
        self._seen: dict[int, tuple[Any, bool]] = {}

    def step(self, optimizer: Any) -> None:
        """Step the parameters that are ours, and put their gradients aside."""
        self._aside.clear()
        for number, group in enumerate(optimizer.param_groups):
            params: list[Tensor] = []
            states: list[dict[str, Any]] = []
            for index, param in enumerate(group["params"]):
                if param.grad is not None and self._is_ours(number, index, param, state := optimizer.state[param]):
                    params.append(param)
                    states.append(state)
            for param in params if optimizer.is_paged else ():
                optimizer.prefetch_state(param)
            self._step(number, group, params, states)
            for param in params:
                self._aside.append((param, cast(Tensor, param.grad)))
                param.grad = None

    def put_back(self) -> None:
        """The gradients, after the step."""
        for param, grad in self._aside:
            param.grad = grad
        self._aside.clear()

    def _is_ours(self, number: int, index: int, param: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether our kernel steps a parameter. Its first step, which makes its state, is theirs."""
        assert param.grad is not None
        codes = state.get("state1")
        if codes is None or not (param.grad.is_contiguous() and param.is_contiguous()):
            return False
        seen = self._seen.get(id(param))
        if seen is None or seen[0] is not codes:
            pids, indices = self._overridden
            is_theirs = id(param) in pids or (number, index) in indices
            seen = self._seen[id(param)] = codes, not is_theirs and _is_known(param, state)
        return seen[1]


def _is_known(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter and its state are what our kernel reads."""
    blocks = ceil_div(param.numel(), dynamic_8bit.BLOCK)
    return (
        type(param) in (nn.Parameter, Tensor)
        and param.device.type in _DEVICES
        and param.dtype in DTYPES
        and param.grad is not None
        and param.grad.dtype in DTYPES
        and all(isinstance(state.get(name), Tensor) for name in _MOMENTS)
        and all(state[name].dtype == torch.uint8 and state[name].is_contiguous() for name in _MOMENTS[:2])
        and all(state[name].numel() == blocks for name in _MOMENTS[2:])
    )


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Torch's hook before a step. With a closure, which computes the gradients within it, the step is theirs."""
    if optimizer not in _taken:
        if not getattr(optimizer, "initialized", True):  # the first step, in which they read what overrides say
            return
        _taken[optimizer] = _Taken(optimizer) if _is_adamw_8bit(optimizer) and _is_of_a_model(optimizer) else None
    taken = _taken[optimizer]
    if taken is not None and all(each is None for each in (*args[1:], *kwargs.values())):
        with torch.no_grad():
            taken.step(optimizer)


def _after_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    """Torch's hook after a step."""
    if (taken := _taken.get(optimizer)) is not None:
        taken.put_back()


def _is_adamw_8bit(optimizer: Any) -> bool:
    """Whether an optimizer is bitsandbytes' AdamW with moments in 8 bits, as we know it."""
    theirs = sys.modules.get("bitsandbytes.optim.optimizer")
    if theirs is None or not isinstance(optimizer, theirs.Optimizer2State) or optimizer.optimizer_name != "adam":
        return False
    args, maps = optimizer.args, optimizer.name2qmap
    return (
        has_triton()
        and type(optimizer).__module__.startswith("bitsandbytes.")
        and args.optim_bits == 8
        and args.max_unorm == 0
        and not args.skip_zeros
        and getattr(args, "percentile_clipping", 100) == 100  # of older versions, as the next
        and getattr(args, "block_wise", True)
        and all(_has_our_values(maps.get(name), is_signed) for name, is_signed in _MAPS)
    )


def _has_our_values(codes: Tensor | None, is_signed: bool) -> bool:
    ours = dynamic_8bit.values(is_signed=is_signed)
    return codes is not None and codes.shape == ours.shape and torch.allclose(codes.cpu(), ours, rtol=1e-5, atol=1e-9)


def _is_of_a_model(optimizer: Optimizer) -> bool:
    """Whether it steps a parameter of a model that is ours."""
    held = {id(param) for model in _models for param in model.parameters()}
    return any(id(param) in held for group in optimizer.param_groups for param in group["params"])
