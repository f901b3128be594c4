"""What a step takes whose layers all run again: for batches that came, by what was measured; for longer ones, scaled.

Some of it grows with the tokens, some (gradients, say) does not. So a shorter batch takes no more than a longer one,
and a longer one no more than the shorter one scaled up.
"""

from typing import NamedTuple


class _Known(NamedTuple):
    """A batch of so many tokens takes so many bytes at most."""

    tokens: int
    num_bytes: float

    def of(self, tokens: int) -> float:
        """What follows for another batch."""
        return self.num_bytes * max(1.0, tokens / self.tokens)


class Need:
    """Bytes that a step takes beyond what lay on a device at its start, at most."""

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def of(self, tokens: int) -> float | None:
        """Of a batch of so many tokens; None before anything was learned."""
        return min((known.of(tokens) for known in self._known), default=None)

    def learn(self, tokens: int, least: float, most: float) -> None:
        """Take in a step of so many tokens, which took, or would have taken, at least and at most so many bytes."""
        before = self.of(tokens)
        if before is None:
            num_bytes = most
        elif any(known.tokens == tokens for known in self._known):
            num_bytes = max(least, before)  # with gradients there already a step takes less, and the next one may not
        else:
            num_bytes = max(least, min(most, before))
        new = _Known(tokens, num_bytes)
        self._known = [known for known in self._known if _adds_to(new, known)] + [new]


def _adds_to(new: _Known, known: _Known) -> bool:
    """Whether what was known is not refuted by what is new, and says more of shorter batches or of longer ones."""
    says_more = known.num_bytes < new.num_bytes or known.num_bytes / known.tokens < new.num_bytes / new.tokens
    return says_more and known.of(new.tokens) >= new.num_bytes
