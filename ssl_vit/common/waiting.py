"""OpenMP's waits: whether threads that wait for others spin or sleep, chosen before torch loads.

By default they spin, which is fastest on cores of one's own. Where another process has one of them,
the thread that is behind gets no core while those that wait for it hold theirs: a training falls to
less than a third, where one with threads that sleep keeps three quarters (docs/measured.md). No
spin count between the two does for both, so the cores are measured. The choice changes no number
that is computed.

Of the standard library alone: OpenMP reads its environment when torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# A user who sets one of them has chosen.
USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# What was chosen, on which machine and by which process: those that it starts do not look again,
# for they would see its own work. Slurm carries the environment to other machines.
CHOICE = "SSL_VIT_WAITS"
# Two looks of so many seconds, five ticks of the kernel's clock each. Both must find the cores
# busy: what lasts less, as the start of a program, is no reason. Asleep in them, we do not count.
_LOOK, _LOOKS = 0.05, 2
# So much of the cores that are wanted may be busy, or so large a share of many. Half a core lies
# between a tenth or two, for a desktop at rest, and the whole one of a process that computes.
_SLACK, _SLACK_OF_ALL = 0.5, 1 / 32
_PROC, _SYS, _CGROUP = Path("/proc"), Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")


def set_waits() -> None:
    """Choose for this process and those that it starts, in its environment; once torch is imported
    it is too late."""
    if "torch" not in sys.modules and sys.platform.startswith("linux"):
        choose(os.environ)


def choose(env: MutableMapping[str, str], processes: int = 0) -> None:
    """Let waits sleep in ``env`` if the cores are busy, by what they do in a tenth of a second.

    Nothing is changed where the user has chosen, where a process that this one comes from has, or
    where there is a single thread, which waits for none.

    Args:
        processes: how many will be started with this environment; what was chosen for others does
            not count then. 0: it is for this process, one of those that the environment lists.
    """
    if not processes and _holds(env.get(CHOICE, "")):
        return
    forget(env)
    if any(env.get(name) for name in USERS):
        return
    together = processes or local_processes(env)
    each = threads(env)
    if each == 1:
        return
    # Processes that were started together are busy starting, and will be ours.
    ours = 0 if processes else together - 1
    waits = "sleep" if crowded(each * together, ours) else "spin"
    if waits == "sleep":
        env["OMP_WAIT_POLICY"] = "PASSIVE"
    env[CHOICE] = f"{waits} {os.getpid()} {platform.node()}"


def forget(env: MutableMapping[str, str]) -> None:
    """Undo what was chosen in ``env``, not what the user did."""
    chosen = env.pop(CHOICE, "")
    if chosen.startswith("sleep") and env.get("OMP_WAIT_POLICY") == "PASSIVE":
        del env["OMP_WAIT_POLICY"]


def chosen() -> str:
    """Choice for this process: ``spin`` or ``sleep``; empty: nothing, or by the user."""
    return os.environ.get(CHOICE, "").partition(" ")[0]


def waits_sleep() -> bool:
    """True if this process's environment lets waits sleep, whoever chose it."""
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or "0" in (
        os.environ.get("GOMP_SPINCOUNT"),
        os.environ.get("KMP_BLOCKTIME"),
    )


def crowded(wanted: int, ours: int = 0) -> bool:
    """True if fewer cores are idle, now and a moment later, than so many threads want.

    ``ours``: cores that may be busy all the same, for they will be free.
    """
    cpus = usable_cores()
    if wanted > min(len(cpus), quota()):
        return True
    return all(idle(cpus, _LOOK) < wanted - ours - slack(wanted) for _ in range(_LOOKS))


def slack(wanted: int) -> float:
    """Cores, of so many, that may be busy with other work before it counts."""
    return max(_SLACK, _SLACK_OF_ALL * wanted)


def _holds(choice: str) -> bool:
    """True if a choice was made on this machine by a process that is still there."""
    _, _, maker = choice.partition(" ")
    number, _, node = maker.partition(" ")
    return node == platform.node() and number.isdigit() and (_PROC / number).exists()


def threads(env: Mapping[str, str]) -> int:
    """Threads that torch will compute with: as set in the environment, else one for each core.

    Its arithmetic library counts cores, not the two halves of one.
    """
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        first = env.get(name, "").partition(",")[0].strip()
        if first.isdigit() and int(first):
            return int(first)
    pairs = set()
    for cpu in usable_cores():
        try:
            pairs.add((_SYS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            pairs.add(str(cpu))
    return max(1, len(pairs))


def local_processes(env: Mapping[str, str]) -> int:
    """Processes of this machine that were started with this one and share its cores."""
    local = env.get("LOCAL_WORLD_SIZE", "")
    if not local and "SLURM_PROCID" in env:
        tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        # Each may have been bound to cores of its own.
        own = env.get("SLURM_CPUS_PER_TASK", "")
        bound = own.isdigit() and len(usable_cores()) <= int(own)
        local = tasks[0] if tasks and not bound else ""
    return max(1, int(local)) if local.isdigit() else 1


def usable_cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota() -> float:
    """Cores' worth of time that this process's control groups leave it; infinite: all there is."""
    least = float("inf")
    for line in _lines(_PROC / "self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        root = _CGROUP / kinds if kinds else _CGROUP
        place = Path(path.lstrip("/"))
        for group in (place, *place.parents):
            least = min(least, _quota_of(root / group))
    return least


def _quota_of(group: Path) -> float:
    """The quota of one control group, of either version."""
    files = (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
    for names in files:
        words = [word for name in names for line in _lines(group / name) for word in line.split()]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            return int(words[0]) / int(words[1])
    return float("inf")


def idle(cpus: set[int], seconds: float) -> float:
    """Number of these cores that are idle, on average over so many seconds from now.

    All of them, where the kernel does not report it.
    """
    busy, all_time = cpu_ticks(cpus)
    time.sleep(seconds)
    busy_then, all_then = cpu_ticks(cpus)
    passed = all_then - all_time
    return len(cpus) * (1 - (busy_then - busy) / passed) if passed > 0 else float(len(cpus))


def cpu_ticks(cpus: set[int]) -> tuple[int, int]:
    """Ticks of the kernel's clock that these cores were busy, and all that they had, since boot.

    Time that a virtual machine's host gave to others counts as busy.
    """
    busy = total = 0
    for line in _lines(_PROC / "stat"):
        found = re.match(r"cpu(\d+) ((?:\d+ ?)+)", line)
        if found and int(found[1]) in cpus:
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user and nice.
            ticks = [int(word) for word in found[2].split()[:8]]
            total += sum(ticks)
            busy += sum(ticks) - sum(ticks[3:5])
    return busy, total


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []
