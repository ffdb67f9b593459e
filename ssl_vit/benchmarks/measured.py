"""Benchmark record: throughput, crops, hardware, versions and date of a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ssl_vit import __version__
from ssl_vit.common.waiting import usable_cores
from ssl_vit.data.augment import ViewSpec

_PACKAGES = ("torch", "torchvision", "timm", "pillow", "lightly", "transformers")


@dataclass
class Speed:
    """Speed: seconds of each repeat; every repeat processes the same number of images."""

    images: int
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images per second in the median repeat."""
        return self.images / median(self.seconds)

    def card(self) -> dict[str, Any]:
        """JSON entries: the median and every repeat."""
        rates = [round(self.images / s, 3) for s in self.seconds]
        return {
            "images_per_second": round(self.rate, 3),
            "images_per_second_of_repeats": rates,
            "seconds_of_repeats": [round(s, 6) for s in self.seconds],
        }


def describe(spec: ViewSpec) -> list[dict[str, Any]]:
    """Number and size (height, width) of each kind of crop."""
    return [{"count": crop.count, "size": list(crop.size)} for crop in spec.crops]


def machine_card(device: torch.device, threads: int) -> dict[str, Any]:
    """Machine card: date, hardware, versions and commit of a measurement; None: unknown to the
    system."""
    versions = {"ssl_vit": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # an optional package
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_model(),
            "cores": len(usable_cores()),
            "cores_of_machine": os.cpu_count(),
            "threads": threads,
            "memory_bytes": _memory(),
            "device": str(device),
            **_gpu(device),
        },
        "versions": versions,
        "commit": _commit(Path(__file__).parents[2]),
    }


def machine(hardware: dict[str, Any]) -> str:
    """Machine in a line, from the hardware of a machine card."""
    return str(hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads")


def _commit(root: Path) -> str | None:
    """Commit of the source, with -dirty where it was changed; None outside of a repository."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return found.stdout.strip() or None


def _gpu(device: torch.device) -> dict[str, Any]:
    """GPU entries of the machine card; None for other devices."""
    if device.type != "cuda":
        return dict.fromkeys(("gpu", "gpu_memory_bytes", "cuda", "driver"))
    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.is_file() else None
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": found[0] if found else None,
    }


def _memory() -> int | None:
    """Main memory of the machine in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """Processor name, from Linux's cpuinfo or else from Python's platform module."""
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
