"""Energy: joules used by training, where devices have a counter (NVML, RAPL)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ssl_vit.training.launched import launched

_POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]


class Energy:
    """Energy meter: joules used by this process' share of a machine since the last reading.

    A process counts its own GPU; the first one of each machine counts the processors too, by the
    running average power limit (RAPL) of their packages, memory and cooling not included.

    Args:
        device: of this process.
        powercap: the folder in which Linux shows RAPL counters.
    """

    def __init__(self, device: torch.device, powercap: Path = _POWERCAP) -> None:
        self.counters = _gpu(device)
        first = launched().local_rank == 0
        if first:
            self.counters += packages(powercap)
        # Another process of this machine counts the processors; this one has nothing to add.
        self.available = bool(self.counters) or (device.type == "cpu" and not first)
        self.last = self._read()

    def take(self) -> float:
        """Joules since the last call, or since the start; NaN where there is no counter, and from
        then on where one fails."""
        before, self.last = self.last, self._read()
        if not self.available:
            return math.nan
        return math.fsum(new - old for new, old in zip(self.last, before, strict=True))

    def _read(self) -> list[float]:
        try:
            return [read() for read in self.counters] if self.available else []
        except Exception:  # drivers raise errors of many kinds; none must end training
            self.available = False
            return []


def _gpu(device: torch.device) -> list[Counter]:
    """Energy counter of an NVIDIA GPU (Volta or newer), by NVML; empty where there is none."""
    if device.type != "cuda":
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)

        def read() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

        read()
    except Exception:  # no library, no driver, no such counter: each raises its own error
        return []
    return [read]


def packages(powercap: Path) -> list[Counter]:
    """RAPL counters of the machine's processors; empty where unreadable (often root only)."""
    found: list[Counter] = []
    # intel-rapl:0 is a package (AMD's too), intel-rapl:0:1 a part of it.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:
            try:
                found.append(_Package(zone).read)
            except (OSError, ValueError):
                continue
    return found


class _Package:
    """RAPL counter of one package, in microjoules; it wraps around at ``max_energy_range_uj``."""

    def __init__(self, zone: Path) -> None:
        self.file = zone / "energy_uj"
        self.limit = int((zone / "max_energy_range_uj").read_text())
        self.wraps, self.last = 0, int(self.file.read_text())

    def read(self) -> float:
        """Joules since an arbitrary start."""
        now = int(self.file.read_text())
        self.wraps += now < self.last
        self.last = now
        return (now + self.wraps * self.limit) / 1e6
