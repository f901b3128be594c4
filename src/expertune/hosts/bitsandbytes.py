"""Steps of bitsandbytes' 8-bit AdamW, `optim="adamw_8bit"` of a trainer, taken by our kernel in one launch.

bitsandbytes launches a kernel and waits for the device for each parameter. Our kernel reads and writes the same state,
so its optimizer and its checkpoints stay what they are: before a step we step the parameters that we can and put their
gradients aside, theirs passes those by, and after it the gradients are back. The first step of a parameter, which makes
its state, is theirs. torch calls a hook of ours before the step of every optimizer. It looks for those of bitsandbytes,
and gives them two of their own, by which parameters of models of ours are stepped.

A step differs from theirs in the order of rounding, and in two things. Decay comes before the update and not after it.
And a second moment above zero is never rounded to zero (`dynamic_8bit.py`).
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from threading import Lock
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from expertune.kernels import has_triton
from expertune.kernels.launch import ceil_div
from expertune.optim import dynamic_8bit
from expertune.optim.fused_step import DTYPES, FusedStep

_MOMENTS = ("state1", "state2", "absmax1", "absmax2")
_MAPS = (("dynamic", True), ("udynamic", False))  # their names, and whether codes have signs
_DEVICES = ("cuda",)  # on which our kernel runs
_TAKEN = "_expertune"  # under which name an optimizer keeps what is ours

_models: WeakSet[nn.Module] = WeakSet()  # whose optimizers are looked at
_lock = Lock()  # of these, which other threads may take over or give back
_handles: list[RemovableHandle] = []  # of our hook before every step, once it lies


def take_over(model: nn.Module) -> None:
    """Step this model's parameters by our kernel where bitsandbytes' 8-bit AdamW would, until `give_back`."""
    with _lock:
        _models.add(model)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_all))


def give_back(model: nn.Module) -> None:
    """Leave this model's parameters to bitsandbytes again."""
    with _lock:
        _models.discard(model)
        while _handles and not _models:
            _handles.pop().remove()


def _ours() -> list[nn.Module]:
    """The models that are ours now."""
    with _lock:
        return list(_models)


class _Taken:
    """What we keep of an optimizer: how its parameters are stepped, and the gradients that lie aside within a step.

    Its hooks are the last before a step and the first after it, so that other hooks see and change gradients as ever.
    """

    def __init__(self, optimizer: Any) -> None:
        self._step = FusedStep(_MOMENTS, is_by_chance=False)
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._seen: dict[int, tuple[Any, bool]] = {}
        self._models: set[int] = set()
        self._before = optimizer.register_step_pre_hook(self.before)
        self._after = optimizer.register_step_post_hook(self.after)

    def take_places(self, optimizer: Any) -> None:
        """Be the last before a step and the first after it; others may have come since."""
        optimizer._optimizer_step_pre_hooks.move_to_end(self._before.id)
        optimizer._optimizer_step_post_hooks.move_to_end(self._after.id, last=False)

    def before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step the parameters that are ours, and put their gradients aside.

        With a closure, which computes the gradients within the step, it is theirs.
        """
        self._put_back()  # of a step that failed
        has_closure = any(each is not None for each in (*args[1:], *kwargs.values()))
        if not has_closure and _is_as_known(optimizer.args):
            with torch.no_grad():
                self._take(optimizer)

    def after(self, _optimizer: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """Give the gradients back."""
        self._put_back()

    def _take(self, optimizer: Any) -> None:
        models = {*map(id, _ours())}
        if self._models != models or len(self._seen) > sum(len(group["params"]) for group in optimizer.param_groups):
            self._models = models  # some have come or gone, or parameters have gone
            self._seen.clear()
        overrides = optimizer.mng.pid2config, optimizer.mng.index2config
        held = cache(_held)  # looked up once a step, if at all
        for number, group in enumerate(optimizer.param_groups):
            params: list[Tensor] = []
            states: list[dict[str, Any]] = []
            for index, param in enumerate(group["params"]):
                if param.grad is None or id(param) in overrides[0] or (number, index) in overrides[1]:
                    continue
                if self._is_ours(param, state := optimizer.state[param], held):
                    params.append(param)
                    states.append(state)
            for param in params if optimizer.is_paged else ():
                optimizer.prefetch_state(param)
            self._step(number, group, params, states)
            for param in params:
                self._aside.append((param, cast(Tensor, param.grad)))
                param.grad = None

    def _put_back(self) -> None:
        for param, grad in self._aside:
            if param.grad is None:
                param.grad = grad
        self._aside.clear()

    def _is_ours(self, param: Tensor, state: Mapping[str, Any], held: Callable[[], set[int]]) -> bool:
        """Whether our kernel steps a parameter. Its first step, which makes its state, is theirs."""
        assert param.grad is not None
        codes = state.get("state1")
        if codes is None or param.dtype not in DTYPES or param.grad.dtype not in DTYPES:
            return False
        if not (param.grad.is_contiguous() and param.is_contiguous()):
            return False
        seen = self._seen.get(id(param))
        if seen is None or seen[0] is not codes:
            seen = self._seen[id(param)] = codes, id(param) in held() and _is_known(param, state)
        return seen[1]


def _held() -> set[int]:
    """The `id` of each parameter of our models."""
    return {id(param) for model in _ours() for param in model.parameters()}


def _is_known(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter and its state are what our kernel reads."""
    blocks = ceil_div(param.numel(), dynamic_8bit.BLOCK)
    return (
        type(param) in (nn.Parameter, Tensor)
        and param.device.type in _DEVICES
        and all(isinstance(state.get(name), Tensor) for name in _MOMENTS)
        and all(state[name].dtype == torch.uint8 and state[name].is_contiguous() for name in _MOMENTS[:2])
        and all(state[name].numel() == blocks for name in _MOMENTS[2:])
    )


def _before_all(optimizer: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    """Before any optimizer's step, and all hooks of its own: see whether it is one of bitsandbytes' that we step."""
    theirs = sys.modules.get("bitsandbytes.optim.optimizer")
    if theirs is None or not isinstance(optimizer, theirs.Optimizer2State) or not optimizer.initialized:
        return  # the first step, in which they read what overrides say, is theirs
    taken = vars(optimizer).get(_TAKEN)
    if taken is None and _is_adamw_8bit(optimizer):
        taken = vars(optimizer)[_TAKEN] = _Taken(optimizer)
    if taken is not None:
        taken.take_places(optimizer)


def _is_adamw_8bit(optimizer: Any) -> bool:
    """Whether one of two moments is bitsandbytes' AdamW with these in 8 bits, as we know it."""
    maps = optimizer.name2qmap
    return (
        has_triton()
        and optimizer.optimizer_name == "adam"
        and type(optimizer).__module__.startswith("bitsandbytes.")
        and _is_as_known(optimizer.args)
        and all(_has_our_values(maps.get(name), is_signed) for name, is_signed in _MAPS)
    )


def _is_as_known(args: Any) -> bool:
    """Whether an optimizer's settings are those that our kernel knows."""
    return (
        args.optim_bits == 8
        and args.max_unorm == 0
        and not args.skip_zeros
        and getattr(args, "percentile_clipping", 100) == 100  # of older versions, as the next
        and getattr(args, "block_wise", True)
    )


def _has_our_values(codes: Tensor | None, is_signed: bool) -> bool:
    ours = dynamic_8bit.values(is_signed=is_signed)
    return codes is not None and codes.shape == ours.shape and torch.allclose(codes.cpu(), ours, rtol=1e-5, atol=1e-9)
