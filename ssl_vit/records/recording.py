"""Recording of a run: its status, written when it starts and when it ends."""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

import ssl_vit
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.processes import boot, process_space, process_start
from ssl_vit.records.status import STATUS_FILE, State, Status, read_status, write_status
from ssl_vit.training.failures import failure_line
from ssl_vit.training.run_lock import LockLost

if TYPE_CHECKING:  # the types of tests' stand-ins are not checked
    from ssl_vit.training.session import Session

log = logging.getLogger("ssl_vit")


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
