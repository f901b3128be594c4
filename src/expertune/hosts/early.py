"""What a model's first step has to build beside its walk, built while the model is still being set up.

Triton compiles a kernel when it is first launched, and cuDNN an attention when it is first called, forward and backward
together in more than four seconds. The walk builds its own kernels side by side (`kernels/ahead.py`); everything else
would be built one after another. So when a model has been loaded, what its layers will call is called once on zeros, in
threads. What fails there fails again, in words, where it is needed.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from expertune.activations import Gate
from expertune.attention.attend import attend
from expertune.attention.hopper import MOST_WITH_SINKS
from expertune.attention.normed_heads import norm_and_rotate, why_not
from expertune.attention.rotary import Rotation
from expertune.gated_mlp import gated_mlp
from expertune.hosts import attention, forwards, mlps, norms, rotary, router
from expertune.hosts.blocks import decoders
from expertune.kernels import has_triton
from expertune.loss.log_probs import Head, label_log_probs
from expertune.optim.adamw_8bit import AdamW8bit
from expertune.rms_norm import rms_norm
from expertune.router import route
from expertune.shapes import RoutingRule
from expertune.split_linear import Linear

_NUM_TOKENS = 1024  # of attention: on fewer, cuDNN may take another kernel
_MLP_WIDTH = 16  # of what goes in and out of an MLP, which its kernels do not see


class Call(NamedTuple):
    """An operation, and what it is called with; equal to another of the same kind.

    Args:
        function: of the tensors.
        shapes: of these, which are zeros and want a gradient.
        dtype: theirs.
    """

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    def run(self, device: torch.device) -> None:
        """There and back."""
        inputs = [torch.zeros(shape, dtype=self.dtype, device=device, requires_grad=True) for shape in self.shapes]
        out = self.function(*inputs)
        torch.autograd.grad(out, inputs, torch.zeros_like(out))


def begin(model: PreTrainedModel) -> list["Future[Any]"]:
    """Call in threads, without waiting, what a step of this model will call beside its walk.

    Args:
        model: optimized. Nothing is begun unless it lies on a CUDA device and there is Triton.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or not has_triton():
        return []
    works: list[Callable[..., None]] = [call.run for call in calls(model)]
    head = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(head, Tensor) and head.device == device:
        works.append(partial(_log_probs, head.detach()))
    works.append(_optimizer_step)
    pool = ThreadPoolExecutor(len(works), "expertune", initializer=torch.cuda.set_device, initargs=(device,))
    begun = [pool.submit(work, device) for work in works]
    pool.shutdown(wait=False)
    return begun


def calls(model: PreTrainedModel) -> list[Call]:
    """Attention, norms, routers and dense MLPs of a model, one call of each kind, the longest first."""
    parts = (_attentions, _heads, _norms, _routers, _mlps)
    return list(dict.fromkeys(call for part in parts for call in part(model)))


def _attentions(model: PreTrainedModel) -> Iterator[Call]:
    for decoder in decoders(model):
        num_heads = getattr(decoder.config, "num_attention_heads", None)
        for module in attention.attentions_of(decoder):
            widths = attention.widths_of(module)
            if widths is None or not isinstance(num_heads, int):
                continue
            width, value_width = widths
            num_shared = num_heads // getattr(module, "num_key_value_groups", 1)
            sizes = ((num_heads, width), (num_shared, width), (num_shared, value_width))
            shapes = tuple((1, _NUM_TOKENS, *size) for size in sizes)
            if not attention.is_ours(decoder):
                yield Call(_hosts, shapes, decoder.dtype)
                continue
            has_sinks = attention.has_sinks(module)
            # whole samples of more tokens than ours attends to; below it runs the kernels of windows and packed samples
            whole = tuple((1, 2 * MOST_WITH_SINKS, *size) for size in sizes) if has_sinks else shapes
            yield Call(_Attention(None, has_sinks), whole, decoder.dtype)
            yield Call(_Attention(_NUM_TOKENS // 8, has_sinks), shapes, decoder.dtype)


def _hosts(q_BTHD: Tensor, k_BTJD: Tensor, v_BTJV: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTJD, v_BTJV))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@dataclass(frozen=True)
class _Attention:
    window: int | None
    has_sinks: bool

    def __call__(self, q_BTHD: Tensor, k_BTJD: Tensor, v_BTJV: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTJD, v_BTJV))
        sinks_H = q.new_zeros(q.shape[1]) if self.has_sinks else None
        return attend(q, k, v, scale=1.0, window=self.window, sinks_H=sinks_H)


def _heads(model: PreTrainedModel) -> Iterator[Call]:
    """Norms of queries and keys that are rotated in the same pass."""
    for decoder in decoders(model):
        frequencies = next((m.inv_freq for m in decoder.modules() if hasattr(m, "inv_freq")), None)
        num_heads = getattr(decoder.config, "num_attention_heads", None)
        for module in decoder.modules():
            rotation = rotary.rotation_in(module)
            if rotation is None or not isinstance(frequencies, Tensor) or not isinstance(num_heads, int):
                continue
            num_angles = len(frequencies) * (1 if rotation.half_width else 2)
            num_shared = num_heads // getattr(module, "num_key_value_groups", 1)
            for name, number in (("q_norm", num_heads), ("k_norm", num_shared)):
                norm = getattr(module, name, None)
                if norm is not None and forwards.runs(norm, norms.forward):
                    (_, found), (width,) = forwards.given(norm).args, norm.weight.shape
                    function = _Heads(rotation, num_angles, found.formula, norm.weight.dtype)
                    yield Call(function, ((1, 4, number, width),), model.dtype)


@dataclass(frozen=True)
class _Heads:
    rotation: Rotation
    num_angles: int
    formula: norms.Formula
    dtype: torch.dtype

    def __call__(self, x_BTHD: Tensor) -> Tensor:
        angles = x_BTHD.new_zeros(1, x_BTHD.shape[1], self.num_angles)
        weight_D = x_BTHD.new_zeros(x_BTHD.shape[-1], dtype=self.dtype)
        if why_not(x_BTHD, weight_D, angles, angles, self.rotation) is not None:
            return x_BTHD
        eps, offset, _ = self.formula
        return norm_and_rotate(x_BTHD, weight_D, eps, offset, angles, angles, self.rotation)[1]


def _norms(model: PreTrainedModel) -> Iterator[Call]:
    for module in model.modules():
        if forwards.runs(module, norms.forward):
            (_, found), (width,) = forwards.given(module).args, module.weight.shape
            formula = found.formula
            yield Call(_Norm(formula.eps, formula.offset, module.weight.dtype), ((4, width),), model.dtype)


@dataclass(frozen=True)
class _Norm:
    eps: float
    offset: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.new_zeros(x.shape[-1], dtype=self.dtype), self.eps, self.offset)


def _routers(model: PreTrainedModel) -> Iterator[Call]:
    for module in model.modules():
        if forwards.runs(module, router.forward):
            found, _ = forwards.given(module).args[1:]
            yield Call(_Router(found.formula.rule, router.has_bias(module)), ((4, len(module.weight)),), model.dtype)


@dataclass(frozen=True)
class _Router:
    rule: RoutingRule
    has_bias: bool

    def __call__(self, logits_TE: Tensor) -> Tensor:
        bias_E = logits_TE.new_zeros(logits_TE.shape[1], dtype=torch.float32) if self.has_bias else None
        return route(logits_TE, bias_E, self.rule)[0]


def _mlps(model: PreTrainedModel) -> Iterator[Call]:
    for module in model.modules():
        if forwards.runs(module, mlps.forward):
            found, _ = forwards.given(module).args[1:]
            yield Call(_Mlp(found.formula, len(module.gate_proj.weight)), ((4, _MLP_WIDTH),), model.dtype)


@dataclass(frozen=True)
class _Mlp:
    """The kernels of its gate; its products are torch's own."""

    gate: Gate
    inner: int

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = (Linear(x.new_zeros(self.inner, _MLP_WIDTH)) for _ in range(2))
        return gated_mlp(x, self.gate, (gate, up, Linear(x.new_zeros(_MLP_WIDTH, self.inner))))


def _log_probs(weight_VD: Tensor, device: torch.device) -> None:
    hidden_ND = torch.zeros(4, weight_VD.shape[1], dtype=weight_VD.dtype, device=device, requires_grad=True)
    label_log_probs(hidden_ND, torch.zeros(4, dtype=torch.int64, device=device), Head(weight_VD))


def _optimizer_step(device: torch.device) -> None:
    """Of adapters in float32, which are PEFT's default."""
    factor = torch.nn.Parameter(torch.zeros(16, 256, device=device))
    factor.grad = torch.zeros_like(factor)
    AdamW8bit([factor]).step()
