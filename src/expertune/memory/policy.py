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


def policy_of(memory: str) -> Policy:
    """The parts for a setting, new ones.

    Args:
        memory: "lean" checkpoints every layer, moves long inputs of layers to the host and walks long batches in
            tiles; "auto" checkpoints those layers that the card has no room for; "fast" none.
    """
    if memory == "lean":
        return Policy(name=memory, offload=Offload(), tiles=TokenTiles())
    return Policy(name=memory, planner=Planner() if memory == "auto" else None)
