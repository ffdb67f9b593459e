"""Side: one implementation of a training step in a comparison, with its time, memory and FLOPs."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssl_vit.benchmarks.speed import wait
from ssl_vit.common.config import EncoderConfig, OptimConfig
from ssl_vit.data.augment import ViewSpec
from ssl_vit.training.footprint import flop_counter
from ssl_vit.training.parallel import exact_kernels

S = TypeVar("S", bound="Side")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Workload:
    """Workload that all sides share: network sizes, crop sizes, batch size, device, precision.

    ``method``: the options of the method (a ``MAEConfig`` ...). ``statistics``: mean and standard
    deviation of each channel.
    """

    encoder: EncoderConfig
    channels: int
    method: Any
    optim: OptimConfig
    spec: ViewSpec
    batch_size: int
    seed: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    device: torch.device
    precision: torch.dtype


class PeakMemory:
    """Peak memory of this process in bytes, above the memory in use when this object was made.

    On CUDA: memory of the allocator. Elsewhere: resident memory, known on Linux only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._read("VmRSS", torch.cuda.memory_allocated)

    def begin(self) -> None:
        """Reset of the peak; see proc_pid_clear_refs(5)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")

    def most(self) -> int | None:
        """Peak in bytes since ``begin``; None: unknown on this system."""
        peak = self._read("VmHWM", torch.cuda.max_memory_allocated)
        return None if peak is None or self.before is None else peak - self.before

    def _read(self, field: str, of_cuda: Any) -> int | None:
        if self.device.type == "cuda":
            return int(of_cuda(self.device))
        known = self.device.type == "cpu" and _STATUS.exists() and _CLEAR.exists()
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.M) if known else None
        return int(found[1]) * 1024 if found else None


class Side:
    """Side: one implementation of a training step, in the current process."""

    memory: PeakMemory

    def __init__(self, work: Workload) -> None:
        self.work = work

    @staticmethod
    def load() -> None:
        """Import of the libraries that this side needs.

        Raises:
            UserError: one is not installed.
        """

    @classmethod
    def build(cls: type[S], work: Workload, *more: Any) -> S:
        """Side for a workload; its memory is counted from here, without imported libraries.

        Raises:
            UserError: the side does not support these sizes.
        """
        cls.load()
        if work.device.type == "cuda":  # libraries may put things on the device that is set
            torch.cuda.set_device(work.device)
            exact_kernels(work.device)
        random.seed(work.seed)
        torch.manual_seed(work.seed)
        memory = PeakMemory(work.device)
        side = cls(work, *more)
        side.memory = memory
        return side

    def step(self) -> Tensor:
        """One whole optimizer step; returns the loss, on the device."""
        raise NotImplementedError

    def parameters(self) -> int:
        """Number of parameters of all networks, trained or not."""
        raise NotImplementedError

    def precision(self) -> torch.dtype:
        """Precision of the computation."""
        return self.work.precision

    def timed(self, steps: int) -> tuple[float, float, float]:
        """Seconds of consecutive steps, seconds of them spent waiting for images (0), last loss."""
        wait(self.work.device)
        started = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        wait(self.work.device)
        return time.perf_counter() - started, 0.0, float(loss)

    def flops(self) -> float:
        """FLOPs of a step: matrix products, convolutions and attention.

        A multiplication and an addition are two.
        """
        with flop_counter() as counter:
            self.step()
        return float(counter.get_total_flops())

    def watch_memory(self) -> None:
        """Start of the peak memory measurement."""
        self.memory.begin()

    def peak_memory(self) -> int | None:
        """Peak memory in bytes since ``watch_memory``, above that before there were networks."""
        return self.memory.most()
