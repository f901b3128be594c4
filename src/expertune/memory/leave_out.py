"""The experts' output is left out of a recomputed layer whose backward never reads it.

A checkpointed layer is run again for what its backward saved. The last thing that most MoE layers do is to add the
experts' output to the residual, and an addition saves nothing: so down and combine, a sixth of the experts' work under
checkpointing, need not be done again. Nothing is assumed about a host: whoever saves a tensor after the experts is
caught at it, the layer is run once more in full, and from then on always.

Only under the reentrant checkpoint. The other stops by itself once all that was saved is there, and counts what is.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class _OutputNeededError(Exception):
    """A tensor was saved after the experts' output had been left out."""


class LeaveOut:
    """What one layer has shown so far. One object a layer, kept from step to step."""

    def __init__(self) -> None:
        self._is_right = True
        self._guard: ExitStack | None = None

    def rerun(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer again, without its experts' output as long as that is right."""
        if self._is_right:
            cpu_state, device_states = torch.get_rng_state(), get_device_states(*args)
            try:
                with ExitStack() as self._guard:
                    return function(*args, **kwargs)
            except _OutputNeededError:
                self._is_right = False
                torch.set_rng_state(cpu_state)
                set_device_states(*device_states)
            finally:
                self._guard = None
        return function(*args, **kwargs)

    @property
    def is_on(self) -> bool:
        """Whether the experts of this run shall yield zeros."""
        return self._guard is not None

    def begin(self) -> None:
        """The experts have yielded zeros: from here to the end of the layer, nothing may be saved."""
        if self._guard is not None:
            self._guard.enter_context(torch.autograd.graph.saved_tensors_hooks(_refuse, _refuse))


def _refuse(_saved: Tensor) -> Tensor:
    raise _OutputNeededError
