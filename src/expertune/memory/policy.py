"""What the setting `memory` stands for: the parts that a model carries to spare memory."""

from dataclasses import dataclass

from expertune.memory.offload import Offload
from expertune.memory.planner import Planner
from expertune.memory.token_tiles import TokenTiles


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The parts of one model, kept from step to step.

    Args:
        name: the setting.
        planner: says in which way each layer runs; None for one way in every step.
        offload: moves the inputs of lean layers to the host; None leaves them.
        tiles: into which the experts of lean layers cut long batches; None for none.
    """

    name: str
    planner: Planner | None = None
    offload: Offload | None = None
    tiles: TokenTiles | None = None

    def in_words(self, *, has_experts: bool) -> str:
        """What it does in a model with experts or without."""
        if self.planner is not None:
            room = "layers that the card has no room for run again in backward; where it has none even so"
            return f"{self.name}: {room}, {self._lean_ways(has_experts=has_experts)}"
        if self.offload is None:
            return f"{self.name}: no layer runs again in backward"
        return f"{self.name}: every layer runs again in backward; {self._lean_ways(has_experts=has_experts)}"

    def _lean_ways(self, *, has_experts: bool) -> str:
        assert self.offload is not None
        assert self.tiles is not None
        inputs = f"inputs of layers move to the host from {self.offload.least_tokens:,} tokens on"
        if not has_experts:
            return inputs
        tokens, rows = 2 * self.tiles.least_tokens, 2 * self.tiles.least_rows
        return f"{inputs}, and experts walk tiles of tokens from {tokens:,} tokens and {rows:,} rows an expert on"


def policy_of(memory: str) -> Policy:
    """The parts for a setting, new ones.

    Args:
        memory: "lean" checkpoints every layer, moves long inputs of layers to the host and walks long batches in
            tiles; "auto" checkpoints those layers that the card has no room for, and does as "lean" in steps for which
            it is too small even so; "fast" checkpoints none.
    """
    if memory == "fast":
        return Policy(name=memory)
    offload = Offload()
    planner = Planner(lean_from=offload.least_tokens) if memory == "auto" else None
    return Policy(name=memory, planner=planner, offload=offload, tiles=TokenTiles())
