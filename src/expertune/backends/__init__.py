"""Backends: the grouped products of the walk, each behind the same few functions.

To add one: write the file, add its name to `PREFERRED`, run the op tests (they loop over all backends).
"""

from expertune.backends import grouped_mm, native_torch, triton
from expertune.backends.protocol import Backend
from expertune.shapes import Problem

# Best first.
PREFERRED: tuple[Backend, ...] = (triton.BACKEND, grouped_mm.BACKEND, native_torch.BACKEND)


def refuse_unknown(requested: str, setting: str = "backend") -> None:
    """Refuse what names no backend.

    Args:
        requested: the name, or "auto".
        setting: where it was read.

    Raises:
        ValueError: says which there are.
    """
    known = ["auto", *(backend.name for backend in PREFERRED)]
    if requested not in known:
        raise ValueError(f"unknown {setting} {requested!r}; choose one of {', '.join(known)}.")


def choose(problem: Problem, requested: str = "auto") -> tuple[Backend, list[str]]:
    """The backend to use and, for the report, why better ones were passed over.

    Raises:
        ValueError: `requested` is unknown, or cannot run `problem`. What is asked for by name is never replaced.
    """
    if requested != "auto":
        refuse_unknown(requested)
        known = {backend.name: backend for backend in PREFERRED}
        if reason := known[requested].why_not(problem):
            raise ValueError(
                f"backend {requested!r} cannot run here: it {reason}. Choose another of {sorted(known)}, or 'auto'."
            )
        return known[requested], []
    passed_over: list[str] = []
    for backend in PREFERRED:
        if (reason := backend.why_not(problem) or backend.why_slow(problem)) is None:
            return backend, passed_over
        passed_over.append(f"{backend.name}: {reason}")
    raise RuntimeError("no backend can run this model:\n  " + "\n  ".join(passed_over))
