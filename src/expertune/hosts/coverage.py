"""Coverage: what is trained, by part of the model, as a table to read before the run."""

from dataclasses import dataclass

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from rich.console import Console
from rich.table import Table
from torch import nn

from expertune.hosts.blocks import blocks
from expertune.hosts.transformers import below_layer, clean, named_experts

# the last names of linears in layers whose parts are all called mixer
_OF_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_OF_DENSE_LAYERS = frozenset({"gate_proj", "up_proj", "down_proj"})
KINDS = ("routed experts", "shared experts", "dense layers", "attention", "router", "other")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trained weight in every layer where it is trained.

    Args:
        kind: one of `KINDS`.
        name: path below the layer.
        ranks: the LoRA ranks, empty where the weight itself is trained.
        num_layers: in how many layers.
        num_parameters: trained parameters in all of them.
    """

    kind: str
    name: str
    ranks: tuple[int, ...]
    num_layers: int
    num_parameters: int


@dataclass(frozen=True)
class Coverage:
    """All that a model trains; `str()` gives the table.

    Args:
        rows: a row a weight, in the order of `KINDS`.
        num_all: parameters of the model, trained or not.
        adapted: the full path of every weight that has a trained adapter.
    """

    rows: tuple[Row, ...]
    num_all: int
    adapted: frozenset[str]

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return sum(row.num_parameters for row in self.rows)

    def kinds(self) -> dict[str, int]:
        """Trained parameters of each kind, also where there are none."""
        return {kind: sum(row.num_parameters for row in self.rows if row.kind == kind) for kind in KINDS}

    def __rich__(self) -> Table:
        share = 100 * self.num_trained / max(self.num_all, 1)
        table = Table(title=f"Trained: {self.num_trained:,} of {self.num_all:,} parameters ({share:.2f} %)")
        for column, justify in (("part", "left"), ("weight", "left"), ("rank", "right"), ("layers", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("parameters", justify="right")
        for kind in KINDS:
            rows = [row for row in self.rows if row.kind == kind]
            for row in rows:
                rank = ", ".join(map(str, row.ranks)) or "full"
                table.add_row(kind, row.name, rank, str(row.num_layers), f"{row.num_parameters:,}")
            if not rows and kind != "other":
                table.add_row(kind, "not trained", "", "", "0", style="dim")
        return table

    def __str__(self) -> str:
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def coverage(model: nn.Module) -> Coverage:
    """What requires a gradient in this model, adapters and base weights alike."""
    paths = _Paths(model)
    totals: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    seen: set[int] = set()
    adapted: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        factors = [
            p for key, p in module.named_parameters() if _is_factor(key) and p.requires_grad and id(p) not in seen
        ]
        seen.update(map(id, factors))
        if factors:
            name = adapted_name(path, module)
            adapted.add(name)
            ranks = tuple(module.r[adapter] for adapter in module.active_adapters if adapter in module.r)
            totals.setdefault((*paths.place(name), ranks), []).append(sum(p.numel() for p in factors))
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            totals.setdefault((*paths.place(path.removesuffix(".weight")), ()), []).append(parameter.numel())
    rows = [
        Row(kind=kind, name=name, ranks=ranks, num_layers=len(sizes), num_parameters=sum(sizes))
        for (kind, name, ranks), sizes in totals.items()
    ]
    num_all = sum(parameter.numel() for parameter in model.parameters())
    return Coverage(tuple(sorted(rows, key=lambda row: (KINDS.index(row.kind), row.name))), num_all, frozenset(adapted))


def adapted_name(path: str, layer: LoraLayer) -> str:
    """The path of what a LoRA layer adapts in the model without it: a linear, or a parameter of experts.

    Args:
        path: of the layer.
        layer: PEFT's.
    """
    name = f"{path}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path
    return clean(name.removesuffix(".weight"))


def _is_factor(key: str) -> bool:
    """A LoRA factor of the layer itself, not of one nested in it."""
    return key.startswith("lora_")


class _Paths:
    """Places a path in the model by its structure: which modules are MoE blocks, which are experts."""

    def __init__(self, model: nn.Module) -> None:
        names = {id(module): clean(path) for path, module in model.named_modules()}
        self._blocks = [names[id(block)] for block in blocks(model)]
        self._experts = {path for path, _ in named_experts(model)}

    def place(self, path: str) -> tuple[str, str]:
        """The kind of a path, and the path below its layer."""
        path = clean(path)
        name = below_layer(path)
        return self._kind(path, name.split(".")), name

    def _kind(self, path: str, parts: list[str]) -> str:
        if any(path.startswith(f"{experts}.") for experts in self._experts):
            return "routed experts"
        for block in self._blocks:
            if path.startswith(f"{block}."):
                child = path[len(block) + 1 :].split(".")[0]
                if "shared" in child and "gate" not in child:
                    return "shared experts"
                # where a whole layer holds the experts, its attention and dense part lie beside the router
                if "router" in child or "gate" in child or not block.rpartition(".")[2].isdigit():
                    return "router"
        if any("norm" in part for part in parts):
            return "other"
        if any("attn" in part or "attention" in part for part in parts) or parts[-1] in _OF_ATTENTION:
            return "attention"
        if any(part in ("mlp", "feed_forward", "ffn") for part in parts) or parts[-1] in _OF_DENSE_LAYERS:
            return "dense layers"
        return "other"
