"""Ways to checkpoint a function that has no parameters of its own."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from expertune.memory.checkpoint import LayerCheckpoint

checkpoint_layer = LayerCheckpoint(nn.Module())
CHECKPOINTS = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "ours": checkpoint_layer,
}
