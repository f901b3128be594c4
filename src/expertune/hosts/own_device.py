"""Which CUDA device a process takes: its own where a launcher has started one a device.

`torchrun` and `accelerate launch` number the processes of a machine in `LOCAL_RANK`. A trainer moves each to the device
of that number, but only once it is made: a model that is loaded before would lie on the first device, once a process.
"""

import os

import torch


def take_own_device() -> int:
    """Make the device of this process the current one, and give its number; one that was chosen before stays."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.current_device() == 0 and 0 < rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)
    return torch.cuda.current_device()
