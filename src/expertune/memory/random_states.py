"""The states of torch's generators of random numbers, on the CPU and on the devices of some inputs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomStates(NamedTuple):
    """As they were, in memory of the host."""

    of_cpu: Tensor
    devices: list[int]
    of_devices: list[Tensor]

    @classmethod
    def now(cls, inputs: Iterable[Any]) -> "RandomStates":
        """Of the CPU and of the devices on which tensors among these lie."""
        return cls(torch.get_rng_state(), *get_device_states(*inputs))

    def are_as(self, others: "RandomStates") -> bool:
        """Whether the same comes next, on the same devices."""
        return all(map(torch.equal, [self.of_cpu, *self.of_devices], [others.of_cpu, *others.of_devices]))

    def restore(self) -> None:
        """What is drawn next is what would have been then."""
        torch.set_rng_state(self.of_cpu)
        set_device_states(self.devices, self.of_devices)
