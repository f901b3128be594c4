"""Gradients clipped within the step of `AdamW8bit`, where a trainer reads and writes all of them once more.

A trainer has Accelerate clip: torch computes the norm of all gradients, then multiplies each by `max_norm / norm`, or
by one. The step reads them anyway, and takes the factor along.
"""

from collections.abc import Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer

from expertune.kernels import has_triton
from expertune.optim.adamw_8bit import AdamW8bit
from expertune.optim.fused_step import DTYPES

_EPS = 1e-6  # torch's, in `clip_grad_norm_`
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU)  # each process has all of each gradient


def clip_in_step(trainer: Trainer) -> None:
    """Have `AdamW8bit` clip gradients while it reads them, where this trainer steps by it.

    The norm is returned and logged as before, on a GPU computed in two launches, and the step is the same; gradients
    stay as they are until then, so callbacks see them unclipped. Where another optimizer steps, where gradients are
    scaled (fp16) or lie in parts (FSDP, DeepSpeed), Accelerate clips them as before.

    Args:
        trainer: of Transformers or TRL, with `max_grad_norm` among its arguments.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"expected a trainer of Transformers or TRL, got {type(trainer).__name__}. Pass the trainer itself."
        )
    accelerator = trainer.accelerator
    hosts = accelerator.clip_grad_norm_

    @wraps(hosts)
    def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        optimizer = adamw_8bit_of(trainer.optimizer)
        is_whole = accelerator.distributed_type in _WHOLE and accelerator.scaler is None
        if optimizer is None or norm_type != 2 or not is_whole:
            return hosts(parameters, max_norm, norm_type)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm, optimizer.clip_coef = _norm_and_clip_coef(grads, max_norm)
        return norm

    accelerator.clip_grad_norm_ = clip_grad_norm_


def _norm_and_clip_coef(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, and what multiplies them."""
    if has_triton() and grads and _are_alike(grads):
        from expertune.kernels.grad_norm import norm_and_clip_coef  # imports Triton, which is optional

        return norm_and_clip_coef(grads, max_norm)
    norm = torch.nn.utils.get_total_norm(grads)
    return norm, (max_norm / (norm + _EPS)).clamp(max=1.0)


def _are_alike(grads: Sequence[Tensor]) -> bool:
    """Whether our kernel reads them: dense, and on one GPU."""
    device = grads[0].device
    return device.type == "cuda" and all(
        type(grad) is Tensor and grad.device == device and grad.dtype in DTYPES and grad.is_contiguous()
        for grad in grads
    )


def adamw_8bit_of(optimizer: Any) -> AdamW8bit | None:
    """The `AdamW8bit` that a trainer's optimizer is or wraps; None if it is another one."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, AdamW8bit) else None
