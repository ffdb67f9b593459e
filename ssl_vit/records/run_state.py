"""Whether a run runs, has finished or has ended otherwise, judged by what it left on the disk."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import Literal

from ssl_vit.records.status import Status, process_space, process_start

RunState = Literal["running", "finished", "stopped", "failed", "killed", "silent", "unknown"]
# A run elsewhere may be silent for so many times its usual pause, and at least so long; before its
# first line and after its last step, when nothing is usual, for longer. In seconds.
_TIMES, _AT_LEAST, _UNUSUAL = 10, 600.0, 3600.0


@dataclass(frozen=True)
class Traces:
    """What is in a run's folder beside its own word.

    Attributes:
        step: the last that it has logged or said.
        total: steps of the whole run, where that is known.
        checkpoint: the step of the newest whole checkpoint.
        exported: the step of the file that the run is for.
        results: whether there are its closing scores.
        written: when it last wrote; Unix time in seconds.
        gap: the longest usual time between two lines of its metrics, in seconds; None: too few.
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
        """In words: from where it would go on."""
        if self.checkpoint is None:
            return "no checkpoint yet: it would begin anew"
        return f"its newest checkpoint is of step {self.checkpoint}"

    def patience(self) -> float:
        """How long it may write nothing, in seconds."""
        if self.gap is None or (self.total is not None and self.step >= self.total):
            return _UNUSUAL
        return max(_AT_LEAST, _TIMES * self.gap)


def run_state_of(status: Status | None, traces: Traces) -> tuple[RunState, str]:
    """A run's state, and what to say of it in a line."""
    quiet = max(0.0, time.time() - traces.written)
    if status is None:
        return _without_word(traces, quiet)
    if status.state == "finished":
        return "finished", ""
    if status.state != "running":
        at = f"at step {status.step}" + (f" of {status.total}" if status.total else "")
        return status.state, f"{at}: {status.reason or 'it does not say why'}; {traces.saved}"
    late = f"nothing written since {moment(traces.written)}, {span(quiet)} ago"
    if status.host == platform.node() and status.processes_of in (0, process_space()):
        if gone(status):
            why = "killed, out of memory, or the machine went down"
            return "killed", f"process {status.pid} is gone without a word ({why}); {traces.saved}"
        return "running", late if quiet > traces.patience() else ""
    if quiet > traces.patience():
        where = status.host or "a machine without a name"
        job = f", job {status.job}" if status.job else ""
        return "silent", f"{late}, on {where}{job}; make sure that it has ended; {traces.saved}"
    return "running", ""


def gone(status: Status) -> bool:
    """Whether the process of a run on this machine has ended; its number may be another's now."""
    if status.process_started is not None:
        return process_start(status.pid) != status.process_started
    try:
        os.kill(status.pid, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except OSError:
        return False  # somebody else's
    return False


def moment(when: float) -> str:
    """A Unix time in words, where people compare it with logs: ``2026-01-31 12:00 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))


def span(seconds: float) -> str:
    """A time that has passed, roughly: ``40 s``, ``12 min``, ``5 h``, ``3 days``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _without_word(traces: Traces, quiet: float) -> tuple[RunState, str]:
    """A run without status.json, as those of older versions are."""
    last = max(traces.checkpoint or 0, traces.exported or 0)
    if traces.results or (traces.total is not None and last >= traces.total):
        return "finished", ""
    if traces.written and quiet <= traces.patience():
        wrote = f"it last wrote {span(quiet)} ago, and may still run"
        return "unknown", f"it does not say how it is; {wrote}; {traces.saved}"
    if traces.checkpoint is not None:
        return "stopped", f"it does not say why; {traces.saved}"
    return "unknown", f"it does not say how it ended; {traces.saved}"
