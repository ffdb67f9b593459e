"""Options of the proof on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.common.checks import check_positive
from ssl_vit.common.errors import check
from ssl_vit.common.layers import COMMAND_LINE, parse

_PROG = "python -m ssl_vit.benchmark device"


@dataclass(frozen=True)
class DeviceConfig:
    """Proof on a GPU: numbers against the CPU, waits of the host, NaN, memory, attention kernels,
    the steps of published recipes, eager and compiled, beside peers; kill and resume. One line a
    part, numbers before speed; parts without time left are reported. No network is needed, but
    a checkout with its tests."""

    minutes: float = 10.0
    """No part is begun without the time it may need, and none goes on beyond this."""
    device: str = "auto"
    """cuda, or cuda:N. auto: cuda. cpu: a rehearsal on small networks, which proves nothing."""
    out: str = "device"
    """Folder for the report (device.json) and the table for a page (device.md)."""

    def __post_init__(self) -> None:
        check_positive(self, "minutes")
        check(
            self.device == "auto" or self.device.split(":")[0] in ("cuda", "cpu"),
            f"--device is {self.device!r}; allowed: auto, cuda, cuda:N, and cpu for a rehearsal",
        )
        check(
            not Path(self.out).expanduser().is_file(),
            f"--out is {self.out!r}, a file; give a folder",
        )


def parse_options(argv: Sequence[str]) -> DeviceConfig:
    """Options of the command.

    Raises:
        UserError: an option that is unknown or not allowed.
    """
    return parse(DeviceConfig(), list(argv), COMMAND_LINE, _PROG, DeviceConfig.__doc__ or "")
