"""Transformers: which modules are experts, how they lie, and our forward in its experts registry.

Transformers 5 marks each experts class with `use_experts_implementation`: its instances state `is_transposed`,
`has_bias` and (later than 5.2) `has_gate`, and dispatch `forward` by `config._experts_implementation`. We read the
flags, register one function, and set that name on the config of the one model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from expertune import compiled
from expertune.activations import Gate
from expertune.backends import choose
from expertune.backends.protocol import Backend
from expertune.experts import experts
from expertune.hosts import forwards, llama4
from expertune.hosts.current import recording
from expertune.hosts.formulas import Settings
from expertune.hosts.gates import gate_of
from expertune.memory import token_tiles
from expertune.memory.replay import RoutingReplay
from expertune.memory.token_tiles import TokenTiles
from expertune.shapes import ALIGNMENT, ExpertsLayout, LoraFactors, Problem
from expertune.walk import ExpertsStep, Projection, packed_is_small

IMPLEMENTATION = "expertune"
_LEAST_BYTES = 2  # of a number that is not quantized

_Adapters = tuple[tuple[LoraFactors, ...], tuple[LoraFactors, ...]]


@dataclass(kw_only=True)
class ExpertsPlan:
    """What `optimize` decided for one experts module. Lies on the module as `_expertune`.

    Args:
        name: the module's path in its model.
        layout: how its weights lie.
        shape: of the first projection's weight, by which that is its layout.
        gate: its gate function.
        settings: with which that is its gate.
        requested: the backend asked for, or "auto".
        host_config: the config that the module had before; None where it has none.
        replay: the routing replay of its model.
        tiles: into which long batches are cut in every pass; None: where a tape says so.
    """

    name: str
    layout: ExpertsLayout
    shape: torch.Size
    gate: Gate
    settings: Settings
    requested: str
    host_config: Any
    replay: RoutingReplay
    tiles: TokenTiles | None = None
    _steps: dict[tuple[Any, ...], tuple[ExpertsStep, list[str]]] = field(default_factory=dict)

    def read_again(self, module: nn.Module, first: Tensor) -> None:
        """Take in what has changed in the module since: as many experts as others were added or cut, or another gate.

        Args:
            module: the experts.
            first: the weight of its first projection.
        """
        if first.shape != self.shape:
            self.layout, self.shape = layout_of(module), first.shape
            self._steps.clear()
        if not self.settings.are_those_of(module):
            self.gate, self.settings = gate_of(module), Settings.of(module)
            self._steps.clear()

    def step(self, first: Tensor, second: Tensor) -> tuple[ExpertsStep, list[str]]:
        """The step for the weights of both projections, and why better backends were passed over.

        Raises:
            ValueError: they differ in dtype, or the backend asked for cannot run them.
        """
        key = (first.device, first.dtype, second.dtype, first.is_contiguous(), second.is_contiguous())
        if key not in self._steps:
            backend, passed_over = self._choose(first, second)
            step = _shared_step(self.layout, self.gate, backend)
            self._steps[key] = (step, passed_over)
        return self._steps[key]

    def _choose(self, first: Tensor, second: Tensor) -> tuple[Backend, list[str]]:
        if first.dtype != second.dtype:
            raise ValueError(
                f"the two weights of {self.name} have different dtypes, {first.dtype} and {second.dtype} (down_proj). "
                "Cast the model to one dtype, for instance with model.to(torch.bfloat16)."
            )
        is_dense = all(w.is_contiguous() and w.data_ptr() % ALIGNMENT == 0 for w in (first, second))
        return choose(Problem.of(self.layout, first.dtype, first.device, is_dense=is_dense), self.requested)


@lru_cache
def _shared_step(layout: ExpertsLayout, gate: Gate, backend: Backend) -> ExpertsStep:
    """One step for all layers that are alike."""
    return ExpertsStep(layout=layout, gate=gate, backend=backend)


def first_name(module: nn.Module) -> str:
    """The name of the parameter of the first projection."""
    # has_gate came after transformers 5.2; before it every such class had a gate
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def has_norm(module: nn.Module) -> bool:
    """Whether the host norms what each expert yields, before the router's weights."""
    return bool(getattr(module, "has_post_expert_norm", False))


def is_transposed(module: Any) -> bool:
    """Whether the weights of an experts module lie as `(E, I, O)`."""
    return llama4.is_experts(module) or bool(module.is_transposed)


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers' own decorator marked this module as experts, or it is Llama 4's."""
    # not hasattr: PEFT's wrapper of a module that is saved whole answers for what it holds
    is_marked = {"is_transposed", "has_bias"} <= vars(module).keys() and hasattr(type(module), "_apply_gate")
    return is_marked or llama4.is_experts(module)


def plan_of(module: nn.Module) -> ExpertsPlan:
    """The plan that `optimize` left on an experts module.

    Raises:
        RuntimeError: there is none, because the model was told of the walk by another way than `optimize`.
    """
    plan = getattr(module, "_expertune", None)
    if not isinstance(plan, ExpertsPlan):
        raise RuntimeError(
            "this model's config says experts_implementation='expertune', but expertune.optimize(model) was not called "
            "on it. Load it without that setting, and optimize it."
        )
    return plan


def make_plan(name: str, module: nn.Module, model_type: str, requested: str, replay: RoutingReplay) -> ExpertsPlan:
    """Read an experts module's flags and weights.

    Raises:
        ValueError: the module does something that the walk does not, or the backend asked for cannot run it.
    """
    _refuse_unreadable(name, module, model_type)
    first = first_name(module)
    earlier = getattr(module, "_expertune", None)
    plan = ExpertsPlan(
        name=name,
        layout=layout_of(module),
        shape=module.get_parameter(first).shape,
        gate=gate_of(module),
        settings=Settings.of(module),
        requested=requested,
        host_config=earlier.host_config if isinstance(earlier, ExpertsPlan) else getattr(module, "config", None),
        replay=replay,
        tiles=earlier.tiles if isinstance(earlier, ExpertsPlan) else None,
    )
    # refuses now what was asked for by name and cannot run
    plan.step(module.get_parameter(first), module.get_parameter("down_proj"))
    return plan


def _refuse_unreadable(name: str, module: nn.Module, model_type: str) -> None:
    who = f"{name} ({type(module).__name__})"
    refused = {
        "parametrized weights": hasattr(module, "parametrizations"),
        "expert parallelism": getattr(module, "_is_expert_parallel", False),
        "a forward of its own, past Transformers' experts interface": not _is_dispatched(module)
        or (llama4.is_experts(module) and forwards.is_somebody_elses(module)),
    }
    if reasons := [reason for reason, present in refused.items() if present]:
        raise ValueError(f"{who} uses {' and '.join(reasons)}, which is not supported yet.")
    first = first_name(module)
    known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    held = {
        key for key, _ in module.named_parameters() if not (has_norm(module) and key.startswith("post_expert_norm."))
    }
    if unknown := sorted(held - known):
        raise ValueError(
            f"{who} holds the parameters {unknown}, which the walk would not use. It knows {sorted(known)}. "
            f"Please report the model type ({model_type})."
        )
    for key in (first, "down_proj"):
        weight = module.get_parameter(key)
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < _LEAST_BYTES or _is_packed(weight.data):
            raise ValueError(
                f"{who} holds {key} as {type(weight.data).__name__} of {weight.dtype}, quantized in a way that the "
                "walk cannot read. Load the model without quantization, or dequantized."
            )


def _is_packed(weight: Any) -> bool:
    """Whether a tensor is made of others, as quantizers make it; one that is sharded is not meant."""
    if not is_traceable_wrapper_subclass(weight):
        return False
    from torch.distributed.tensor import DTensor  # not there in every build of torch

    return not isinstance(weight, DTensor)


def _is_dispatched(module: nn.Module) -> bool:
    """Whether calling this module leads to the walk, once its config or instance says so."""
    made_by = getattr(type(module).forward, "__globals__", {}).get("__name__")
    return llama4.is_experts(module) or made_by == use_experts_implementation.__module__


def layout_of(module: Any) -> ExpertsLayout:
    """How the weights of an experts module lie, by its own flags and their shapes."""
    first = first_name(module)
    num_experts, *shape = module.get_parameter(first).shape
    model_width, first_width = shape if is_transposed(module) else reversed(shape)
    has_gate = first == "gate_up_proj"
    return ExpertsLayout(
        num_experts=num_experts,
        model_width=model_width,
        expert_width=first_width // 2 if has_gate else first_width,
        has_gate=has_gate,
        is_transposed=is_transposed(module),
        has_bias=bool(getattr(module, "has_bias", False)),
    )


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: _Adapters = ((), ()),
) -> Tensor:
    """Our forward of an experts module, as Transformers calls it; `adapters` is added by the PEFT host.

    Args:
        self: the experts module.
        hidden_states: `(T, D)`.
        top_k_index: `(T, K)`, expert ids.
        top_k_weights: `(T, K)`.
        adapters: the active LoRA factors of the first projection and of down.
    """
    if hasattr(self, "parametrizations"):
        raise RuntimeError(
            f"the weights of {plan_of(self).name} are parametrized: by an adapter that did not reach the walk, or by "
            "torch.nn.utils.parametrize. Call expertune.optimize(model) after adapters were attached; experts that "
            "somebody else parametrizes run as stock Transformers' only, after expertune.restore(model)."
        )
    plan = plan_of(self)
    first = first_name(self)
    # in a recording of the module, not parameters
    weights = getattr(self, first), cast(Tensor, self.down_proj)
    if not torch.compiler.is_compiling():
        plan.read_again(self, weights[0])
    step, _ = plan.step(*weights)
    biases = (f"{first}_bias", "down_proj_bias")
    projections = tuple(
        Projection(weight=w, bias=getattr(self, b) if step.layout.has_bias else None, adapters=a)
        for w, b, a in zip(weights, biases, adapters, strict=True)
    )
    pair = (projections[0], projections[1])
    if has_norm(self):
        return _normed(self, plan, hidden_states, top_k_index, top_k_weights, pair, step)
    return _walk(plan, hidden_states, top_k_index, top_k_weights, pair, step, is_last=True)


def _normed(
    module: nn.Module,
    plan: ExpertsPlan,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    pair: tuple[Projection, Projection],
    step: ExpertsStep,
) -> Tensor:
    """The experts of a host that norms each row before it is weighted: every choice walks as a token of its own.

    Right for whatever a host does to a row, at the price of a copy of the tokens for each choice, kept for backward.
    """
    x_ND = x_TD.repeat_interleave(expert_TK.shape[1], dim=0)
    expert_N1 = expert_TK.reshape(-1, 1)
    rows_ND = _walk(plan, x_ND, expert_N1, x_TD.new_ones(expert_N1.shape), pair, step, is_last=False)
    rows_TKD: Tensor = module.get_submodule("post_expert_norm")(rows_ND).view(*expert_TK.shape, -1)
    return (rows_TKD * weight_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)


def _walk(
    plan: ExpertsPlan,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    pair: tuple[Projection, Projection],
    step: ExpertsStep,
    *,
    is_last: bool,
) -> Tensor:
    """The experts' output, as plain, checkpointed and compiled models get it.

    Args:
        plan: of the experts module.
        x_TD, expert_TK, weight_TK: tokens, chosen experts and their weights.
        pair: both projections.
        step: layout, gate and backend.
        is_last: whether nothing of the experts follows, which would read their output: then a recomputed layer may
            leave it out, and a long batch is walked in tiles.
    """
    if torch.compiler.is_compiling():
        return compiled.experts(x_TD, expert_TK, weight_TK, pair, step)
    plan.replay.leave_block()  # the router has chosen; what follows need not pass through Python operation by operation
    choose_rows, tape = partial(step.dispatch, expert_TK), plan.replay.tape
    leaves_out = is_last and tape is not None and tape.leave_out.is_on
    tiles = plan.tiles if tape is None else tape.tiles or plan.tiles
    if is_last and tiles is not None and tiles.cuts(expert_TK, step.layout):
        # sorted again in a second run: of a long batch the rows of all layers are much to keep
        routings = tiles.dispatch(expert_TK, step)
        out_TD = token_tiles.experts(x_TD, routings, weight_TK, pair, step, leaves_out=leaves_out)
    else:
        rows = choose_rows() if tape is None else tape.once(choose_rows)
        # of a checkpointed layer no longer than its second run, and a recording is made where there is room
        is_cheap = tape is not None or recording.value
        keeps_packed = is_cheap or packed_is_small(pair, rows.shape, step.layout)
        out_TD = experts(x_TD, rows, weight_TK, pair, step, leaves_out=leaves_out, keeps_packed=keeps_packed)
    if is_last and tape is not None:
        tape.leave_out.begin(out_TD)
    return out_TD


def register() -> None:
    """Add our forward to Transformers' experts registry. Changes no model."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def refuse_unknown_experts(model: nn.Module) -> None:
    """Refuse a model with experts of a form which the walk does not know.

    Raises:
        ValueError: names the first of them. As a layer without experts it would train as slowly as before, and nobody
            would say so.
    """
    readable = {id(module) for module in model.modules() if is_experts(module)}
    for name, module in model.named_modules():
        # where others can be read, a block or shared experts may have any name
        is_named_so = name.rpartition(".")[2] == "experts" or (
            not readable and (name.endswith("experts") or type(module).__name__.endswith(("MoE", "MoeBlock")))
        )
        if is_named_so and readable.isdisjoint(map(id, module.modules())):
            raise ValueError(
                f"{clean(name)} ({type(module).__name__}) holds experts in a form that Transformers does not mark with "
                "use_experts_implementation, so the walk cannot read them. Train it as stock Transformers does, and "
                f"please report the model type ({getattr(model.config, 'model_type', 'unknown')})."
            )


def named_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each experts module with its path, as the path is without PEFT's wrappers."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield clean(name), module


def num_positions(config: Any) -> int | None:
    """The most tokens that a sequence of this model may have; None where its config does not say."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def clean(path: str) -> str:
    """A path as it is without PEFT's wrappers."""
    path = path.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
    return re.sub(r"\.modules_to_save\.[^.]+", "", path)


def below_layer(path: str) -> str:
    """A path below the last number in it, which is that of a layer; the whole path if there is none."""
    return re.sub(r"^(.*\.)?\d+\.", "", path)
