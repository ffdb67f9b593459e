"""Memory of the machine: what a process may use, and what of it is free, by files of Linux."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def free_memory_here() -> float:
    """Bytes that are free on the machine and in the limits of this process's control group;
    infinite where the system does not say."""
    if not sys.platform.startswith("linux"):
        return float("inf")
    return min(_free_on_machine(), free_in_group(_own_group()))


def memory_here() -> int:
    """Bytes of the machine's memory, or of the narrowest limit of this process's control group."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    linux = sys.platform.startswith("linux")
    return int(min(machine, limit_of_group(_own_group()))) if linux else machine


def _free_on_machine() -> float:
    found = re.search(r"^MemAvailable: +(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return float(found[1]) * 1024 if found else float("inf")


def free_in_group(own: str, root: Path = Path("/sys/fs/cgroup")) -> float:
    """Free bytes in the limits of a Linux control group (``own``, below ``root``) and its parents.

    Version 2, see cgroup-v2.rst of the kernel: schedulers and containers set such limits. Inactive
    file cache counts as free, as the kernel reclaims it when needed.
    """
    free = float("inf")
    for place in _around(own, root):
        limit, used = _read(place / "memory.max").strip(), _read(place / "memory.current")
        files = re.search(r"^inactive_file (\d+)", _read(place / "memory.stat"), re.MULTILINE)
        if limit.isdigit() and used:
            free = min(free, float(limit) - float(used) + (float(files[1]) if files else 0.0))
    return free


def limit_of_group(own: str, root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a control group and its parents allow at most; infinite where none has a limit."""
    limits = [_read(place / "memory.max").strip() for place in _around(own, root)]
    return min((float(limit) for limit in limits if limit.isdigit()), default=float("inf"))


def _own_group() -> str:
    own = re.search(r"^0::/(.*)$", _read(Path("/proc/self/cgroup")), re.MULTILINE)
    return own[1] if own else ""


def _around(own: str, root: Path) -> list[Path]:
    """A control group and its parents, up to the root."""
    group = root / own
    return [group, *group.parents][: len(group.relative_to(root).parts) + 1]


def _read(file: Path) -> str:
    """Content of a small kernel file; empty where there is none."""
    try:
        return file.read_text()
    except OSError:
        return ""
