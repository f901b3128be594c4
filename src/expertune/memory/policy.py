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
        planner: says which layers are checkpointed; None for all.
        offload: moves the inputs of checkpointed layers to the host; None leaves them.
        tiles: into which the experts cut long batches; None for none.
    """

    name: str
    planner: Planner | None = None
    offload: Offload | None = None
    tiles: TokenTiles | None = None

    def __str__(self) -> str:
        """What it does, in words."""
        if self.planner is not None:
            return f"{self.name}: layers that the card has no room for run again in backward"
        if self.offload is None or self.tiles is None:
            return f"{self.name}: no layer runs again in backward"
        return f"{self.name}: every layer runs again in backward; {self._lean_ways()}"

    def _lean_ways(self) -> str:
        assert self.offload is not None
        assert self.tiles is not None
        return (
            f"inputs of layers move to the host from {self.offload.least_tokens:,} tokens on, and experts walk tiles "
            f"of tokens from {2 * self.tiles.least_tokens:,} tokens and {2 * self.tiles.least_rows:,} rows an expert on"
        )


def policy_of(memory: str) -> Policy:
    """The parts for a setting, new ones.

    Args:
        memory: "lean" checkpoints every layer, moves long inputs of layers to the host and walks long batches in
            tiles; "auto" checkpoints those layers that the card has no room for; "fast" none.
    """
    if memory == "lean":
        return Policy(name=memory, offload=Offload(), tiles=TokenTiles())
    return Policy(name=memory, planner=Planner() if memory == "auto" else None)
