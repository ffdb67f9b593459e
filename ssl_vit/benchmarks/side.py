"""One side of a comparison: a training step that is taken again and again, and what it costs."""

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

S = TypeVar("S", bound="Side")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Work:
    """What every side does alike: networks of these sizes, on crops of noise of these sizes.

    ``method``: the options of the method (a ``MAEConfig`` ...). ``statistics``: mean and deviation
    of each channel.
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
    """Bytes that this process takes at most, above what it held when this was made.

    On CUDA of the allocator's memory; elsewhere resident ones, which Linux alone tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._read("VmRSS", torch.cuda.memory_allocated)

    def begin(self) -> None:
        """Forget the peak so far; see proc_pid_clear_refs(5)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")

    def most(self) -> int | None:
        """The peak since ``begin``; None where the system does not tell."""
        peak = self._read("VmHWM", torch.cuda.max_memory_allocated)
        return None if peak is None or self.before is None else peak - self.before

    def _read(self, field: str, of_cuda: Any) -> int | None:
        if self.device.type == "cuda":
            return int(of_cuda(self.device))
        known = self.device.type == "cpu" and _STATUS.exists() and _CLEAR.exists()
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.M) if known else None
        return int(found[1]) * 1024 if found else None


class Side:
    """A training step of somebody's, in the process where it is."""

    memory: PeakMemory

    def __init__(self, work: Work) -> None:
        self.work = work

    @staticmethod
    def load() -> None:
        """Import the libraries that it is made of.

        Raises:
            UserError: one is not installed.
        """

    @classmethod
    def build(cls: type[S], work: Work, *more: Any) -> S:
        """Made for ``work``, its memory being counted from here; libraries aside.

        Raises:
            UserError: it cannot be had in these sizes.
        """
        cls.load()
        random.seed(work.seed)
        torch.manual_seed(work.seed)
        memory = PeakMemory(work.device)
        side = cls(work, *more)
        side.memory = memory
        return side

    def step(self) -> Tensor:
        """One whole optimizer step; its loss, which stays on the device."""
        raise NotImplementedError

    def parameters(self) -> int:
        """Weights of all its networks, trained or not."""
        raise NotImplementedError

    def precision(self) -> torch.dtype:
        """What it computes in."""
        return self.work.precision

    def timed(self) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        wait(self.work.device)
        started = time.perf_counter()
        loss = self.step()
        wait(self.work.device)
        return time.perf_counter() - started, float(loss)

    def flops(self) -> float:
        """Floating-point operations of a step: matrix products, convolutions and attention.

        A multiplication and an addition are two.
        """
        with flop_counter() as counter:
            self.step()
        return float(counter.get_total_flops())

    def watch_memory(self) -> None:
        """Look at the peak of memory from here."""
        self.memory.begin()

    def peak_memory(self) -> int | None:
        """Bytes at most since ``watch_memory``, above those held before there was a network."""
        return self.memory.most()
