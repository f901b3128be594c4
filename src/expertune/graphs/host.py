"""What recording asks of the host whose modules are recorded."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Host(Protocol):
    """Whose modules they are."""

    ignored: frozenset[str]
    """Keywords that no module reads."""

    def is_checkpointed(self) -> bool:
        """Whether the layer that runs now will run again in backward."""
        ...

    def context(self, module: nn.Module, kwargs: dict[str, Any]) -> Hashable | None:
        """What else a call depends on; None if it must not be recorded."""
        ...

    def is_observer(self, hook: Callable[..., Any]) -> bool:
        """Whether a hook on a module changes nothing, and hears of what `caught` and `deliver` pass on, if of anything.

        Any other hook wants to be called, so its module is not recorded.
        """
        ...

    def recording(self, context: Any) -> AbstractContextManager[Any]:
        """Around a forward that is recorded: gives what observers would have taken, filled once it has run.

        Args:
            context: of the call.
        """
        ...

    def rest(self, device: torch.device) -> float:
        """The bytes that a step takes on a device beside what its layers keep; 0 where nobody has measured them.

        Infinite in a step that is to have all there are.
        """
        ...

    def deliver(self, caught: Any) -> None:
        """Hand to the observers what was caught, or what a replay put in its place."""
        ...
