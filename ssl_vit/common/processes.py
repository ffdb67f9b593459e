"""Processes: whether one that was noted earlier still runs, and where it can be seen."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int | None:
    """Start time of a live process on this machine, in clock ticks since boot; None where there is
    none (zombies included), or the system does not provide it."""
    try:
        # The second field is the program's name in brackets, with any characters.
        parts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if parts[0] in ("Z", "X") else int(parts[19])  # fields 3 and 22
    except (OSError, ValueError, IndexError):
        return None


def process_space() -> int:
    """PID namespace of this process; 0 where the system does not provide it."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def boot() -> str:
    """Identifier of this start of the kernel, the same in all its containers; empty: unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
