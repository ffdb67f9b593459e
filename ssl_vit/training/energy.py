"""What a training costs in energy, where the devices count it themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ssl_vit.training.launched import launched

_POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]


class Energy:
    """Joules of this process' share of a machine since the last reading.

    A process counts its own GPU; the first one of each machine counts the processors too, by the
    running average power limit (RAPL) of their packages, memory and cooling not included.

    Args:
        device: the process' own.
        powercap: the folder in which Linux shows RAPL counters.
    """

    def __init__(self, device: torch.device, powercap: Path = _POWERCAP) -> None:
        self.counters = _gpu(device)
        first = launched().local_rank == 0
        if first:
            self.counters += packages(powercap)
        # What another process of this machine counts is none of this one's.
        self.tells = bool(self.counters) or (device.type == "cpu" and not first)
        self.last = self._read()

    def take(self) -> float:
        """Joules since the last call, or since the start; NaN where no device tells, and from then
        on where one no longer does."""
        before, self.last = self.last, self._read()
        if not self.tells:
            return math.nan
        return math.fsum(new - old for new, old in zip(self.last, before, strict=True))

    def _read(self) -> list[float]:
        try:
            return [read() for read in self.counters] if self.tells else []
        except Exception:  # a driver's, of which there are many; it must not end a training
            self.tells = False
            return []


def _gpu(device: torch.device) -> list[Counter]:
    """The counter of an NVIDIA GPU (from Volta on), by NVML; none where that does not tell."""
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
    except Exception:  # no library, no driver, no such counter: each has an error of its own
        return []
    return [read]


def packages(powercap: Path) -> list[Counter]:
    """The counters of a machine's processors; none where they cannot be read (many need root)."""
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
    """One counter of microjoules, which begins anew at a limit of its own."""

    def __init__(self, zone: Path) -> None:
        self.file = zone / "energy_uj"
        self.limit = int((zone / "max_energy_range_uj").read_text())
        self.rounds, self.last = 0, int(self.file.read_text())

    def read(self) -> float:
        """Joules since some moment."""
        now = int(self.file.read_text())
        self.rounds += now < self.last
        self.last = now
        return (now + self.rounds * self.limit) / 1e6
