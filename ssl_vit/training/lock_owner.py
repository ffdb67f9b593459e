"""Owner of a run's lock: a process, and whether it has ended as far as another can see."""

from __future__ import annotations

import os
import platform
import time
import uuid
from dataclasses import dataclass

from ssl_vit.common.processes import boot, process_space, process_start


@dataclass(frozen=True)
class Owner:
    """Owner of a lock: a process, as far as others can recognise it.

    Attributes:
        token: of this lock alone.
        boot, processes_of: of its kernel and PID namespace: where its PID means something.
        pid, process_started: as in ``status.json``.
        job, restarts: Slurm's number of the job, and of its earlier starts.
        since: Unix time in seconds.
    """

    token: str = ""
    host: str = ""
    boot: str = ""
    processes_of: int = 0
    pid: int = 0
    process_started: int | None = None
    job: str = ""
    restarts: int = 0
    since: float = 0.0

    def __str__(self) -> str:
        if not self.token:
            return "an unknown process"
        job = f" (Slurm job {self.job})" if self.job else ""
        started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host}{job}, started {started}"


def has_ended(owner: Owner, own: Owner) -> bool | None:
    """True if an owner has ended, as far as ``own`` can see; None: it cannot be seen from there."""
    places = [(o.host, o.boot, o.processes_of) for o in (owner, own)]
    if places[0] == places[1] and own.boot and owner.process_started is not None:
        return process_start(owner.pid) != owner.process_started
    if owner.job and owner.job == own.job and owner.restarts < own.restarts:
        return True  # Slurm starts a job again only when it has ended
    return None


def this_process() -> Owner:
    """Owner of a lock that this process takes now."""
    return Owner(
        token=uuid.uuid4().hex,
        host=platform.node(),
        boot=boot(),
        processes_of=process_space(),
        pid=os.getpid(),
        process_started=process_start(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.time(),
    )
