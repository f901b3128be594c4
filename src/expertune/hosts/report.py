"""The report of `explain`: per layer backend, weights, adapters, and why better backends were passed over."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from expertune.hosts import attention, graphs, trl_head
from expertune.hosts.attached import Attached, attached
from expertune.hosts.blocks import blocks, decoders
from expertune.hosts.peft import experts_in, wrappers_of
from expertune.hosts.transformers import first_name, has_norm, plan_of

_HEAD = "loss: TRL's, from log-probabilities by expertune where the head is frozen"


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How the experts of one layer run.

    Args:
        name: path of the experts.
        backend: name of the backend.
        weights: shape, dtype and layout, in words.
        gate: name of the gate function.
        adapters: active adapters with rank, a line a projection.
        passed_over: why each better backend was not chosen.
    """

    name: str
    backend: str
    weights: str
    gate: str
    adapters: tuple[str, ...]
    passed_over: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found; `str()` gives it in words.

    Args:
        requested: the backend asked for; None for a model that is not optimized.
        layers: a report a layer.
        kernels: which configurations our kernels run with, where any layer runs on them.
        routers: how many of them are ours, where any can be.
        mlps: how many dense ones are ours, if any.
        attention: whose attention each decoder runs, and why not ours.
        graphs: which parts of layers are replayed as CUDA graphs, where any can be.
        head: whose log-probabilities a trainer's loss is made of, once it trains; None before.
        memory: what a step keeps, computes again and moves, where that was set.
    """

    requested: str | None
    layers: tuple[LayerReport, ...]
    kernels: str | None = None
    routers: str | None = None
    mlps: str | None = None
    attention: tuple[str, ...] = ()
    graphs: str | None = None
    head: str | None = None
    memory: str | None = None

    def __str__(self) -> str:
        if self.requested is None:
            return "not optimized: this model runs as stock Transformers. Call expertune.optimize(model)."
        memory = [f"memory {self.memory}"] if self.memory is not None else []
        if not self.layers:
            lines = ["no experts: what is not named here runs as stock Transformers.", *self.attention]
            return "\n".join([*lines, *filter(None, (self.mlps, self.graphs, self.head)), *memory])
        lines = [f"{len(self.layers)} layers with experts, backend asked for: {self.requested}"]
        for layer in self.layers:
            lines.append(f"{layer.name}: {layer.backend} · {layer.weights} · gate {layer.gate}")
            lines += [f"    adapter  {adapter}" for adapter in layer.adapters] or ["    adapter  none"]
            lines += [f"    passed over  {reason}" for reason in layer.passed_over]
        lines += [f"kernels: {self.kernels}"] if self.kernels is not None else []
        lines += [*filter(None, (self.routers, self.mlps)), *self.attention]
        return "\n".join([*lines, *filter(None, (self.graphs, self.head)), *memory])


def explain(model: PreTrainedModel) -> Explanation:
    """Report on a Transformers model, with or without adapters."""
    state = attached(model)
    if state is None:
        return Explanation(requested=None, layers=())
    children = (child for block in blocks(model) for child in block.children())
    layers = [_layer(child, experts) for child in children if (experts := experts_in(child)) is not None]
    kernels = _kernels(model) if any(layer.backend == "triton" for layer in layers) else None
    return Explanation(
        requested=state.requested,
        layers=tuple(layers),
        kernels=kernels,
        routers=_routers(state) if any(layer.backend == "triton" for layer in layers) else None,
        mlps=_mlps(state) if state.mlps else None,
        attention=tuple(_attention(decoder, model) for decoder in decoders(model)),
        graphs=graphs.status(state.recorder) if state.recorder is not None and state.recorder.pieces else None,
        head=_HEAD if trl_head.is_bound(model) else None,
        memory=_memory(state),
    )


def _routers(state: Attached) -> str:
    others = "" if len(state.routers) == len(state.blocks) else "; the others run the host's code"
    return f"routers: {len(state.routers)} of {len(state.blocks)} choose and score in one kernel{others}"


def _mlps(state: Attached) -> str:
    return (
        f"dense MLPs: {len(state.mlps)}, each as one step that keeps half as much for backward, unless it has hooks, "
        "dropout, trained weights or several adapters"
    )


def _attention(decoder: PreTrainedModel, model: PreTrainedModel) -> str:
    name, implementation = type(decoder).__name__, decoder.config._attn_implementation
    if attention.is_ours(decoder):
        whose = "expertune" if attention.forms_scores(decoder) else "the host's sdpa, and expertune for packed samples"
        return f"attention of {name}: {whose}, in memory linear in the length; {attention.kernels_of(decoder)}"
    return f"attention of {name}: the host's {implementation} ({attention.why_not(decoder, model)})"


def _memory(state: Attached) -> str | None:
    run_again = [layer for layer in state.layers if layer.gradient_checkpointing]
    if state.memory is None:
        elsewhere = (
            "of a step: every layer runs again in backward, by gradient checkpointing that was turned on elsewhere"
        )
        return elsewhere if run_again else None
    if not run_again and state.memory.name != "fast":
        return f"{state.memory.name}: no layer runs again in backward, because gradient checkpointing is off"
    return state.memory.in_words(has_experts=bool(state.blocks))


def _kernels(model: nn.Module) -> str:
    from expertune.kernels.tuning.lookup import TUNED  # imports Triton, which is optional

    return TUNED.status(next(model.parameters()).device)


def _layer(outermost: nn.Module, experts: nn.Module) -> LayerReport:
    nest, _ = wrappers_of(outermost)
    plan = plan_of(experts)
    weight = experts.get_parameter(first_name(experts))
    step, passed_over = plan.step(weight, experts.get_parameter("down_proj"))
    adapters = []
    for wrapper in reversed(nest):
        active = [f"{name} (r={wrapper.r[name]})" for name in wrapper.active_adapters if name in wrapper.lora_A]
        state = (
            "disabled"
            if wrapper.disable_adapters
            else "merged"
            if wrapper.merged
            else ", ".join(active) or "none active"
        )
        adapters.append(f"{wrapper.parameter_name}: {state}")
    layout = plan.layout
    rows = "(E, I, O)" if layout.is_transposed else "(E, O, I)"
    return LayerReport(
        name=plan.name,
        backend=step.backend.name,
        weights=f"{layout.num_experts} experts {layout.model_width}→{layout.expert_width}, {rows}, {weight.dtype}",
        gate=plan.gate.name + (", then down and the host's norm" if has_norm(experts) else ""),
        adapters=tuple(adapters),
        passed_over=tuple(passed_over),
    )
