"""Step times: the time each process takes for its own part, and detection of slow processes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from ssl_vit.common.distributed import gather_rows, gather_texts
from ssl_vit.training.health import Alarm
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.shared_cores import SharedCores

# A process that takes this many times the median is reported.
_SLOW = 1.5


class StepTimes:
    """Step times: times what a process does alone, waiting for images and the forward pass.

    The backward pass synchronizes all processes, so whole steps take equally long everywhere. (If
    sharded, so does the forward pass, and only the wait for images differs.) A context manager
    around the forward pass; on CUDA its time is taken by events, read in :meth:`take`.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.waited = self.computed = 0.0
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.all: list[float] = []
        self.hosts: list[str] = []
        self.alarm = Alarm(after=0)
        self.cores = SharedCores(parallel.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager around the wait for images."""
        # Not with the lines of progress: where spinning is worst those are minutes apart.
        if self.parallel.main:  # the only one that logs; it sees the cores of its own machine
            self.cores.look()
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def __enter__(self) -> None:
        if self.parallel.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            event[0].record()
            self.marks.append(event)
        self.started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.marks and self.parallel.device.type == "cuda":
            self.marks[-1][1].record()
        else:
            self.computed += time.perf_counter() - self.started

    def take(self, steps: int) -> tuple[float, list[float]]:
        """Seconds this process waited for images since the last call; seconds per step by process.

        All processes must call it.
        """
        for first, last in self.marks:
            last.synchronize()
            self.computed += first.elapsed_time(last) / 1000
        waited, own = self.waited, (self.waited + self.computed) / steps
        self.waited, self.computed, self.marks = 0.0, 0.0, []
        self.all = gather_rows(torch.tensor([own])).tolist()
        return waited, self.all

    def news(self, step: int) -> list[str]:
        """Warnings on cores shared, and processes slower than the others, for a while."""
        shared = self.cores.news(step)
        if self.parallel.world == 1:
            return shared
        self.hosts = self.hosts or gather_texts(platform.node())
        usual = statistics.median_low(self.all)
        slow = {
            f"process {rank} ({self.hosts[rank]}) is slow": f"process {rank} ({self.hosts[rank]}) "
            f"takes {seconds:.3g} s for its part of a step, without waiting for others; the median "
            f"is {usual:.3g} s: all wait for it"
            for rank, seconds in enumerate(self.all)
            if seconds > _SLOW * usual
        }
        return [*shared, *self.alarm.news(step, slow)]
