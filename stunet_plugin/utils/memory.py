"""Memory of this machine that is free."""

from __future__ import annotations

from pathlib import Path

GIGABYTE = 1024**3


def free_memory() -> float | None:
    """Return the bytes that this process may still take; None where that is not known."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(free.split()[1]) * 1024.0)
        most, used = (
            Path("/sys/fs/cgroup", name).read_text(encoding="utf-8")
            for name in ("memory.max", "memory.current")
        )
        limits.append(float(most) - float(used))  # "max" is no number
    except (OSError, StopIteration, ValueError):
        pass
    return min(limits, default=None)
