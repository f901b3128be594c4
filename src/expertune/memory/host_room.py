"""How much memory of the host is left: of the machine, and of the container that the process may lie in.

A process that takes more is killed without a word. A container's limit is that of its control group, which sees itself
at the root of the file system of groups (Linux: cgroup-v2.rst, cgroup-v1/memory.rst). Pages of files count as used
there, and are given up where memory is wanted.
"""

from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
# Per version: where the limit stands, the bytes in use, and the inactive pages of files in `memory.stat`.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def host_room(root: Path = _ROOT) -> int:
    """Bytes that a process can take before it is killed; what the machine has left, where there is no lower limit.

    Args:
        root: of the file system of control groups.
    """
    left = [psutil.virtual_memory().available]
    for limit, used, stat, inactive in _FILES:
        try:
            most = (root / limit).read_text().strip()
            if most != "max":
                files = dict(line.split() for line in (root / stat).read_text().splitlines())
                left.append(int(most) - int((root / used).read_text()) + int(files.get(inactive, 0)))
        except OSError:  # another version, or no groups
            continue
    return max(0, min(left))
