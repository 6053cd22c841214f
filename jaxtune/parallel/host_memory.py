"""How much memory this machine, or this container's share of it, has left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

# psutil tells of the machine only.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def host_free_bytes() -> float:
    """Bytes of this machine's memory, or of this container's share of it, that can be had without swapping."""
    return min([float(psutil.virtual_memory().available), *_left_in_container()])


def _left_in_container() -> Iterator[float]:
    for limit, used, statistics in _LIMITS:
        most, now = _read(limit).strip(), _read(used).strip()
        if most.isdigit() and now.isdigit():
            # Files that were read and can be dropped count as used.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(statistics), re.MULTILINE)
            yield float(max(0, int(most) - int(now) + (int(cached[1]) if cached else 0)))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
