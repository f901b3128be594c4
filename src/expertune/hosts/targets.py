"""Targets: the names a user trains, resolved to what stock PEFT must be told so that every part of the model hears it.

In a model with experts, PEFT (0.19 to 0.21) reads `gate_proj`, `up_proj`, `down_proj` and a few more names in
`target_modules` as the routed experts alone, and drops the shared experts and dense layers of the same name without a
word. A linear of such a name is therefore targeted by its weight, as a parameter: the same keys and shapes on disk.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from expertune.hosts.blocks import blocks, decoders
from expertune.hosts.transformers import below_layer, first_name, is_experts, named_experts

# Rewritten by PEFT's _convert_peft_config_moe (peft/utils/transformers_weight_conversion.py, 0.21.2).
_REWRITTEN_BY_PEFT = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
# Refused by PEFT in these models, whose fused kernels read their weights past an adapter.
_REFUSED_BY_PEFT, _WITH_MAMBA = frozenset({"out_proj", "conv1d"}), ("nemotron_h",)
# The halves of a fused first projection, by the names of Qwen and of Mixtral checkpoints.
_HALVES = ({"gate_proj", "up_proj"}, {"w1", "w3"})


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What to pass to `LoraConfig`, and the paths that it must then adapt.

    Args:
        modules: for `target_modules`.
        parameters: for `target_parameters`.
        paths: every linear and every experts parameter meant, by its full path.
        left: what lies beside the language model, such as a vision tower, in which nothing is meant.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    paths: frozenset[str]
    left: tuple[str, ...] = ()

    def reached_by(self, setting: str, patterns: Mapping[str, Any]) -> dict[str, Any]:
        """A `rank_pattern` or `alpha_pattern` for PEFT, with which each reaches all that it matches.

        PEFT matches a linear that is adapted by its weight as a parameter's path, whose last name is `weight`.

        Args:
            setting: its name.
            patterns: values by what ends a path, a name or a regular expression.

        Raises:
            ValueError: one matches nothing, which PEFT would not say.
        """
        of_weights = [name for name in self.parameters if name.endswith(".weight")]
        reaching = {}
        for pattern, value in patterns.items():
            try:
                expression = re.compile(rf"(.*\.)?({pattern})(\.weight)?$")
            except re.error as error:
                raise self._refused(setting, pattern, f"is no regular expression ({error.msg})") from error
            met = [path for path in self.paths if expression.match(f"{path}.weight")]
            if not met:
                raise self._refused(setting, pattern, "matches nothing that is adapted")
            has_weights = any(_ends(f"{path}.weight", name) for path in met for name in of_weights)
            reaching[rf"({pattern})(\.weight)?" if has_weights else pattern] = value
        return reaching

    def _refused(self, setting: str, pattern: str, why: str) -> ValueError:
        ends = ", ".join(sorted(set(map(below_layer, self.paths))))
        return ValueError(
            f"{setting} names {pattern!r}, which {why}. A pattern is a name, or the end of a path, of {ends}."
        )


def resolve(model: PreTrainedModel, requested: Sequence[str] | str, parameters: Iterable[str] = ()) -> Targets:
    """Find every linear, experts parameter and (only by its own name) router that the names mean.

    Args:
        model: a Transformers model without adapters.
        requested: names or dotted endings of paths, or "all-linear": every linear and all experts, without the router
            and other gates of a MoE block, without the output head, without what a model's own code makes of a
            linear (groups of them in DeepSeek-V4), whose shapes PEFT's factors do not fit, without indexers, which
            choose tokens and have no gradient, and without what PEFT refuses (Mamba's out_proj in Nemotron-H). A name
            without a dot, and "all-linear", leave alone what lies beside the language model of a composite one, such as
            a vision tower and its projector.
        parameters: names or dotted endings of parameters, meant beside them.

    Raises:
        ValueError: a name matches nothing, or half of a fused projection.
    """
    held = [path for path, _ in model.named_parameters()]
    parameters = tuple(parameters)
    if missing := [name for name in parameters if not any(_ends(path, name) for path in held)]:
        raise ValueError(f"target_parameters {missing} match nothing in this model.")
    meant = {path.removesuffix(".weight") for path in held for name in parameters if _ends(path, name)}
    towers = _beside(model)
    targets = _resolve_modules(model, requested, towers)
    paths = targets.paths | meant
    return Targets(
        modules=targets.modules,
        parameters=tuple(dict.fromkeys((*targets.parameters, *parameters))),
        paths=paths,
        left=tuple(tower for tower in towers if not any(_is_below(path, [tower]) for path in paths)),
    )


def _beside(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of what lies beside the decoders with experts in a model that also sees or hears: towers, projectors.

    Bare names leave it alone: nothing of it has a gradient where the data is text alone.
    """
    names = {id(module): path for path, module in model.named_modules()}
    inner = {names[id(decoder)]: any(is_experts(module) for module in decoder.modules()) for decoder in decoders(model)}
    language = [path for path, has_experts in inner.items() if has_experts]
    if not language or len(language) == len(inner):
        return ()
    around = {".".join(path.split(".")[:depth]) for path in language for depth in range(path.count(".") + 1)}
    found = []
    for path in sorted(around):
        for name, child in model.get_submodule(path).named_children():
            below = f"{path}.{name}".lstrip(".")
            is_head = not path and isinstance(child, nn.Linear)
            if below not in around and below not in language and not is_head and _has_linears(child):
                found.append(below)
    return tuple(found)


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Linear) for each in module.modules())


def _chooses(module: nn.Module) -> bool:
    """Whether it does nothing but choose tokens to attend to, as the indexers of DeepSeek-V3.2 do: without gradient."""
    return type(module).__name__.endswith("Indexer")


def _resolve_modules(model: PreTrainedModel, requested: Sequence[str] | str, towers: Sequence[str]) -> Targets:
    modules = dict(model.named_modules())
    linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    routers = _routers(model)
    experts = _experts_parameters(model)
    present = [*modules, *experts]  # PEFT matches names with modules of any kind
    refused = _REFUSED_BY_PEFT if model.config.model_type in _WITH_MAMBA else frozenset()
    if requested == "all-linear":
        moe = set(blocks(model))
        choosing = [path for path, module in modules.items() if _chooses(module)]
        names_of_blocks = {path for path, module in modules.items() if module in moe}
        heads = (model.get_output_embeddings(), *model.children())  # a classifier's is a linear beside the decoder
        paths = [
            path
            for path, module in linears.items()
            if module not in heads
            and not _is_of_its_own(module)
            and path not in routers
            and path.rpartition(".")[0] not in names_of_blocks
            and path.rpartition(".")[2] not in refused
            and not _is_below(path, (*towers, *choosing))
        ]
        return _targets(paths, list(experts), present, rewritten=bool(experts))
    if isinstance(requested, str):
        raise ValueError(
            f"target_modules takes a list of names or 'all-linear', got the string {requested!r}. For a regular "
            "expression build a peft.LoraConfig, call peft.get_peft_model, then expertune.optimize(model)."
        )
    names = list(dict.fromkeys(requested))
    if not names:
        raise ValueError("target_modules is empty; name what to train, or say 'all-linear'.")
    _refuse_halves(names, experts)
    found: dict[str, list[str]] = {}
    for name in names:
        found[name] = [
            path for path in (*linears, *routers) if _ends(path, name) and ("." in name or not _is_below(path, towers))
        ]
        found[name] += [path for path, aliases in experts.items() if name in aliases or _ends(path, name)]
    if missing := [name for name in names if not found[name]]:
        leaves = sorted({path.rpartition(".")[2] for path in (*linears, *experts)})
        raise ValueError(f"target_modules {missing} match nothing in this model. It has {leaves}.")
    hits = list(dict.fromkeys(path for name in names for path in found[name]))
    plain = [path for path in hits if path not in experts]
    return _targets(
        plain,
        [path for path in hits if path in experts],
        present,
        rewritten=bool(experts),
        routers=routers,
    )


def _targets(
    plain: Sequence[str],
    experts: Sequence[str],
    present: Sequence[str],
    *,
    rewritten: bool,
    routers: frozenset[str] = frozenset(),
) -> Targets:
    """What PEFT must be told to adapt these paths and no other that is `present`."""
    paths = frozenset((*plain, *experts))
    modules, parameters = [], [_shortest(path, paths, present) for path in experts]
    for path in plain:
        name = _shortest(path, paths, present)
        if path in routers or (rewritten and path.rpartition(".")[2] in _REWRITTEN_BY_PEFT):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return Targets(modules=tuple(dict.fromkeys(modules)), parameters=tuple(dict.fromkeys(parameters)), paths=paths)


def _routers(model: PreTrainedModel) -> frozenset[str]:
    """Children of MoE blocks that hold one row of weights an expert."""
    found = set()
    names = {id(module): path for path, module in model.named_modules()}
    for block in blocks(model):
        num_experts = next(m.get_parameter(first_name(m)).shape[0] for m in block.children() if is_experts(m))
        for child in block.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == num_experts:
                found.add(names[id(child)])
    return frozenset(found)


def _experts_parameters(model: PreTrainedModel) -> dict[str, set[str]]:
    """The path of each experts weight, with the other names it goes by."""
    parameters: dict[str, set[str]] = {}
    for path, module in named_experts(model):
        first = first_name(module)
        parameters[f"{path}.{first}"] = set().union(*_HALVES) if first == "gate_up_proj" else set()
        parameters[f"{path}.down_proj"] = {"w2"}
    return parameters


def _refuse_halves(names: Sequence[str], experts: dict[str, set[str]]) -> None:
    if not any(path.endswith(".gate_up_proj") for path in experts):
        return
    for half in _HALVES:
        present = half & set(names)
        if len(present) == 1:
            missing = (half - present).pop()
            raise ValueError(
                f"target_modules names {present.pop()!r} without {missing!r}, but the experts of this model hold both "
                "as one fused gate_up_proj. Name both."
            )


def _is_of_its_own(linear: nn.Linear) -> bool:
    """Whether a model's code lets a linear compute something else."""
    kind = type(linear)
    return kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers.models.")


def _is_below(path: str, others: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _shortest(path: str, meant: frozenset[str], present: Sequence[str]) -> str:
    """The path below the numbered layer, the same in every layer; the full path where another layer is not meant."""
    short = below_layer(path)
    return short if all(other in meant for other in present if _ends(other, short)) else path
