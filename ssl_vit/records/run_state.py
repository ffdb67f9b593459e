"""Run state: running, finished, stopped, failed, killed, silent or unknown, from its files."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.processes import boot, process_space, process_start
from ssl_vit.records.status import Status

RunState = Literal["running", "finished", "stopped", "failed", "killed", "silent", "unknown"]
# A run on another machine may write nothing for this many times its usual pause, and at least this
# long; before its first row and after its last step, for longer. In seconds.
_TIMES, _AT_LEAST, _UNUSUAL = 10, 600.0, 3600.0


@dataclass(frozen=True)
class Traces:
    """Traces of a run in its folder, besides its status file.

    Attributes:
        step: last step in its metrics or status.
        total: steps of the whole run, where known.
        checkpoint: step of the newest complete checkpoint.
        exported: step of the exported weights.
        results: whether there are final scores.
        written: time of the last write; Unix time in seconds.
        gap: longest usual time between two metrics rows, in seconds; None: too few rows.
    """

    step: int = 0
    total: int | None = None
    checkpoint: int | None = None
    exported: int | None = None
    results: bool = False
    written: float = 0.0
    gap: float | None = None

    @property
    def saved(self) -> str:
        """Checkpoint from which the run would resume, in words."""
        if self.checkpoint is None:
            return "no checkpoint yet: it would start anew"
        return f"its newest checkpoint is at step {self.checkpoint}"

    def patience(self) -> float:
        """Patience: how long the run may write nothing, in seconds."""
        if self.gap is None or (self.total is not None and self.step >= self.total):
            return _UNUSUAL
        return max(_AT_LEAST, _TIMES * self.gap)


def run_state_of(status: Status | None, traces: Traces) -> tuple[RunState, str]:
    """State of a run, and a message in a line."""
    quiet = max(0.0, time.time() - traces.written)
    if status is None:
        return _without_status(traces, quiet)
    if status.state == "finished":
        return "finished", ""
    if status.state != "running":
        at = f"at step {status.step}" + (f" of {status.total}" if status.total else "")
        return status.state, f"{at}: {status.reason or 'reason unknown'}; {traces.saved}"
    late = f"nothing written since {moment(traces.written)}, {span(quiet)} ago"
    if _seen_from_here(status):
        if gone(status):
            why = "killed, out of memory, or the machine went down"
            return "killed", f"process {status.pid} ended unexpectedly ({why}); {traces.saved}"
        return "running", late if quiet > traces.patience() else ""
    if quiet > traces.patience():
        where = status.host or "an unknown machine"
        job = f", job {status.job}" if status.job else ""
        return "silent", f"{late}, on {where}{job}; check that it has ended; {traces.saved}"
    return "running", ""


def _seen_from_here(status: Status) -> bool:
    """True if the run's PID means something here: the same start of the same kernel, and the same
    PID namespace. Containers of one machine may have other names, and two machines the same."""
    here = status.boot == boot() if status.boot else status.host == platform.node()
    return here and status.processes_of in (0, process_space())


def gone(status: Status) -> bool:
    """True if the process of a run on this machine has ended; its PID may have been reused."""
    if status.process_started is not None:
        return process_start(status.pid) != status.process_started
    try:
        os.kill(status.pid, 0)  # sends no signal
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's process
    return False


def moment(when: float) -> str:
    """Unix time as text, to compare with logs: ``2026-01-31 12:00 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))


def span(seconds: float) -> str:
    """Time span in words, rounded: ``40 s``, ``12 min``, ``5 h``, ``3 days``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _without_status(traces: Traces, quiet: float) -> tuple[RunState, str]:
    """State of a run without status.json, as of older versions."""
    last = max(traces.checkpoint or 0, traces.exported or 0)
    if traces.results or (traces.total is not None and last >= traces.total):
        return "finished", ""
    if traces.written and quiet <= traces.patience():
        wrote = f"it last wrote {span(quiet)} ago, and may still run"
        return "unknown", f"no status recorded; {wrote}; {traces.saved}"
    if traces.checkpoint is not None:
        return "stopped", f"reason unknown; {traces.saved}"
    return "unknown", f"it is unknown how it ended; {traces.saved}"
