"""Shared cores: work of others on the cores that a run computes on, as far as Linux counts it.

A look compares what the cores did, as the kernel counts it, with what this run's own processes did.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ssl_vit.common.waiting import chosen, cpu_ticks, quota, slack, usable_cores, waits_sleep
from ssl_vit.training.launched import launched
from ssl_vit.training.parallel import by_slurm

SHARED = "cores shared with other work"
# A look reads a line of every process there is: some milliseconds.
_EVERY = 5.0
# It has lasted after so many looks in a row; that the cores are free again, after a minute.
_LASTS, _FREE = 3, 12


class SharedCores:
    """Looks, every few seconds, at how many of the cores have been busy with work of others.

    Args:
        device: of the run; where it is not the CPU, nothing is looked at.
        used: seconds of processor time since some moment, of all processes on these cores and of
            this run's own; None: unknown.

    Attributes:
        shared: whether others had cores that this run's threads want, when last looked at.
    """

    def __init__(
        self, device: torch.device, used: Callable[[], tuple[float, float] | None] | None = None
    ) -> None:
        self.on_cpu, self.used = device.type == "cpu", used or processor_time
        self.others, self.shared = math.nan, False
        self.before: tuple[float, float, float] | None = None
        self.shared_for = self.free_for = 0
        self.warned: set[str] = set()

    def look(self, now: float | None = None, least: float = _EVERY) -> None:
        """See what has been done since the last look, if that was ``least`` seconds ago."""
        now = time.monotonic() if now is None else now
        if not self.on_cpu or (self.before and now - self.before[0] < least):
            return
        found = self.used()
        if found is None:
            return
        if self.before:
            then, all_then, own_then = self.before
            self.others = max(0.0, found[0] - all_then - found[1] + own_then) / (now - then)
            self.shared = self.others > room()
            self.shared_for = self.shared_for + 1 if self.shared else 0
            self.free_for = 0 if self.shared else self.free_for + 1
        self.before = now, *found

    @property
    def described(self) -> str:
        """Cores taken by others, and how many there are."""
        return f"{self.others:.1f} of {len(usable_cores())} cores"

    @property
    def spinning(self) -> bool:
        """True if threads of this process wait for each other, and spin meanwhile."""
        return torch.get_num_threads() > 1 and not waits_sleep()

    def news(self, step: int) -> list[str]:
        """Warnings, each once: waits that do not suit the cores, and the remedy."""
        lines, again = [], "stop with Ctrl-C and give the same command again: the run goes on where"
        if self.shared_for >= _LASTS and self.spinning and "shared" not in self.warned:
            self.warned.add("shared")
            own = "set OMP_WAIT_POLICY=PASSIVE, and give the same command again"
            remedy = f"{again} it was, with waits chosen for busy cores" if chosen() else own
            lines.append(
                f"step {step}: other work takes {self.described}, and "
                f"threads that wait for others spin, which slows the run several times: {remedy}"
            )
        if self.free_for >= _FREE and chosen() == "sleep" and "free" not in self.warned:
            self.warned.add("free")
            lines.append(
                f"step {step}: the cores were busy when the run began, and are free now; threads "
                f"that wait for others still sleep, which a small model is slower by: {again} it "
                "was, at full speed"
            )
        return lines


def room() -> float:
    """Number of cores that others may have before this run's threads lack one.

    A quota limits what the threads can use, not which cores others may be on.
    """
    cores = len(usable_cores())
    wanted = min(torch.get_num_threads() * launched().local_world, cores, quota())
    return cores - wanted + slack(math.ceil(wanted))


def processor_time() -> tuple[float, float] | None:
    """Seconds that all processes had of this one's cores, and that this run's processes had, of
    any; None where that is not known.

    The run's are this process and what it started; with several on the machine, all that the
    launcher started. Tasks of Slurm have no such parent: there it is known only of one that is
    alone on its cores.
    """
    local = launched().local_world
    if local > 1 and by_slurm():
        if len(usable_cores()) > int(os.environ.get("SLURM_CPUS_PER_TASK", 0)):
            return None
        local = 1
    root = os.getppid() if local > 1 else os.getpid()
    busy, own = cpu_ticks(usable_cores())[0], ticks_of(root)
    if not busy:
        return None
    second = os.sysconf("SC_CLK_TCK")
    return busy / second, own / second


def ticks_of(root: int) -> int:
    """Ticks of the kernel's clock that a process has had, with all that came of it."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            fields = re.sub(r".*\) ", "", file.read_text(errors="replace"), flags=re.DOTALL).split()
        except OSError:  # it has ended
            continue
        number = int(file.parent.name)
        # user, system, and those of children that have ended and were waited for.
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    own, total = {root}, 0
    while own:
        total += sum(ticks.get(number, 0) for number in own)
        own = {child for child, parent in parents.items() if parent in own}
    return total
