"""Run status: status.json, written by a run when it starts and when it ends."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import timm
import torch

import ssl_vit
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.processes import boot, process_space, process_start
from ssl_vit.training.failures import failure_line
from ssl_vit.training.run_lock import LockLost

if TYPE_CHECKING:  # reading a status needs no import of the session
    from ssl_vit.training.session import Session

log = logging.getLogger("ssl_vit")
STATUS_FILE = "status.json"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """Status: content of ``status.json``. No number of the training depends on it.

    Attributes:
        state: ``running`` since training started; ``finished`` after the final scores; ``stopped``
            by a signal; ``failed`` by an error. A run that was killed is still ``running`` here.
        name: the kind of run: a method (``mae``), or ``finetune``.
        command: that runs it, without options: ``python -m ssl_vit.pretrain mae``.
        step, total: optimizer steps done when this was written, and of the whole run.
        images_per_step: effective batch size.
        steps_per_epoch: optimizer steps per epoch.
        pooling: the feature that the task trains, ``cls`` or ``mean``; empty: not applicable.
        host, pid: of the main process.
        boot: start of the kernel that it runs on, by its identifier; empty: unknown.
        processes_of: PID namespace of the main process (a container has its own); 0: unknown.
        process_started: its start, in clock ticks since boot; distinguishes a process from a later
            one with the same PID. None: not available on this system.
        job: Slurm job ID, or empty.
        started: when the run was first started; Unix time in seconds.
        updated: when this was written; Unix time in seconds.
        device: a GPU by its name, or ``cpu``.
        processes: number of training processes.
        threads: CPU threads of each process.
        versions: of ``torch``, ``timm`` and ``ssl_vit``.
        reason: why it stopped or failed, in one line.
    """

    state: State
    name: str = ""
    command: str = ""
    step: int = 0
    total: int = 0
    images_per_step: int = 0
    steps_per_epoch: int = 0
    pooling: str = ""
    host: str = ""
    pid: int = 0
    boot: str = ""
    processes_of: int = 0
    process_started: int | None = None
    job: str = ""
    started: float = 0.0
    updated: float = 0.0
    device: str = ""
    processes: int = 1
    threads: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    reason: str = ""


# Types of all fields, to validate a file.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state", "name", "command", "pooling", "host", "boot"), (str,)),
    **dict.fromkeys(("job", "device", "reason"), (str,)),
    **dict.fromkeys(("step", "total", "images_per_step", "steps_per_epoch"), (int,)),
    **dict.fromkeys(("pid", "processes_of", "processes", "threads"), (int,)),
    **dict.fromkeys(("started", "updated"), (int, float)),
    "process_started": (int, type(None)),
    "versions": (dict,),
}


def write_status(folder: Path, status: Status) -> None:
    """Write ``status.json`` atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_text_atomically(folder / STATUS_FILE, json.dumps(asdict(status), indent=1) + "\n")


def read_status(folder: Path) -> Status | None:
    """Read the status of the run in ``folder``; None if there is none.

    Unknown keys are ignored; missing ones have defaults.

    Raises:
        UserError: ``status.json`` cannot be read, or is damaged.
    """
    path = folder / STATUS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        check(isinstance(found, dict), f"it holds {found!r:.60}")
        return Status(**_checked(found))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Known keys, with their values validated.

    Raises:
        UserError: a value of the wrong type, or no state.
    """
    known = {key: value for key, value in found.items() if key in _KINDS}
    for name, value in known.items():
        good = isinstance(value, _KINDS[name]) and not isinstance(value, bool)
        check(good, f"{name} is {value!r:.60}")
    state, allowed = known.get("state"), get_args(State)
    check(state in allowed, f"state is {state!r:.60}, not one of {', '.join(allowed)}")
    return known


class StatusWriter:
    """Status writer: records the state of a run, in the main process; elsewhere it does nothing.

    A run that has finished keeps its status, even if showing its results again fails.
    A failed write is logged and does not stop the run: it must not hide another error.

    Args:
        session: the run, at the step at which it starts or resumes.
        command: that runs it, without options.
    """

    def __init__(self, session: Session, command: str) -> None:
        self.session = session
        self.status = _described(session, command)
        self.writes = session.parallel.main
        if self.writes and session.trainer.step and (before := _before(session.out)):
            self.status = replace(self.status, started=before.started)
            self.writes = before.state != "finished" or before.step != self.status.total

    def __call__(self, state: State, reason: str = "") -> None:
        """Record the run's state and step, unless the folder is another run's by now."""
        if not self.writes:
            return
        try:
            self.session.guard()
        except LockLost:
            return
        step, now = self.session.trainer.step, time.time()
        self.status = replace(self.status, state=state, step=step, updated=now, reason=reason)
        try:
            write_status(self.session.out, self.status)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.session.out / STATUS_FILE, error)


@contextmanager
def recorded(session: Session, command: str) -> Iterator[StatusWriter]:
    """Context manager that records a run as ``running``; an error or interrupt that leaves the
    block is recorded as its end. The caller records any other end."""
    record = StatusWriter(session, command)
    record("running")
    try:
        yield record
    except KeyboardInterrupt:
        record("stopped", "interrupted at once, nothing saved")
        raise
    except BaseException as error:
        record("failed", _error_line(error))
        raise


def by_signal(number: int) -> str:
    """Reason of a run stopped by a signal: ``received SIGTERM``."""
    return f"received {signal.Signals(number).name}"


def _described(session: Session, command: str) -> Status:
    """Status of a run and this process at its start."""
    parallel, trainer, device = session.parallel, session.trainer, session.parallel.device
    now = time.time()
    return Status(
        state="running",
        name=session.name,
        command=command,
        step=trainer.step,
        total=trainer.schedule.total,
        images_per_step=session.order.batch_size,
        steps_per_epoch=session.order.steps_per_epoch,
        pooling=getattr(session.task, "pooling", ""),
        host=platform.node(),
        pid=os.getpid(),
        boot=boot(),
        processes_of=process_space(),
        process_started=process_start(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        started=now,
        updated=now,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processes=parallel.world,
        threads=torch.get_num_threads(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    packages: tuple[Any, ...] = (torch, timm, ssl_vit)
    return {package.__name__: str(package.__version__) for package in packages}


def _before(folder: Path) -> Status | None:
    """Status recorded by an earlier process; None if missing or damaged."""
    try:
        return read_status(folder)
    except UserError:
        return None


def _error_line(error: BaseException) -> str:
    """Message of an error, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Exception) and (line := failure_line(error)):
        return line
    plain = isinstance(error, (UserError, RunFailed, OSError))
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")
