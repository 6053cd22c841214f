"""How much of this machine's memory a program may still take."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

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
    return min(_available(), *_left_in_container())


def _available() -> float:
    told = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    # Other systems than Linux tell no more than what there is in all.
    return int(told[1]) * 1024.0 if told else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _left_in_container() -> Iterator[float]:
    yield float("inf")
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
