"""Slurm task: run the command, pass signals on, requeue the job.

It imports the standard library only, so that a task handles signals from its first moment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

# Exit status of a command that a signal stopped and that has saved: the same command resumes it.
STOPPED = os.EX_TEMPFAIL
# Slurm sends the first before preemption, the second before the time limit.
STOPS = (signal.SIGTERM, signal.SIGUSR2)
# Seconds by which a signal may reach one task later than another.
_SPREAD = 1.0
# Seconds that this task has to exit by itself after another has failed.
_LAST_WORDS = 5.0


class Relay:
    """Signal relay: signals do not end this process; they are recorded and sent to its children.

    Signals have their usual effects in the children.

    Args:
        passed: for each signal, the signal to send to the children.
        late: whether to send signals that arrive while a child is running. Under Slurm, children
            get those from Slurm itself.
    """

    def __init__(self, passed: Mapping[signal.Signals, signal.Signals], late: bool) -> None:
        self.passed, self.late = passed, late
        self.came: list[signal.Signals] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Relay:
        self.before = {number: signal.signal(number, self._note) for number in self.passed}
        return self

    def start(
        self, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start of a child process; earlier signals are sent to it too."""
        child = subprocess.Popen(command, env=env)
        self.children.append(child)
        for number in self.came:
            child.send_signal(self.passed[number])
        return child

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        self.came.append(came)
        for child in self.children if self.late else ():
            child.send_signal(self.passed[came])  # no effect on a child that has ended

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Job:
    """Slurm task, called by submitit.

    submitit's own signal handlers act in the middle of a step and in the first task only. Here the
    command is a process of its own: all its processes agree on a step, save, and exit with
    ``STOPPED``.

    Args:
        command: the command and its arguments.
        folder: folder of the job's files, on a disk that all machines share.
    """

    command: list[str]
    folder: Path

    def __call__(self) -> None:
        """Run the command to its end.

        Raises:
            SystemExit: with the command's status if it failed, with 0 if the job is requeued.
        """
        with Relay({number: number for number in STOPS}, late=False) as relay:
            status = self._wait(relay)
            if status == 1 and not relay.came:
                # Another process may have been stopped, and the signal is still to arrive here.
                time.sleep(_SPREAD)
            killed = [number for number in STOPS if number == -status]
            if status == STOPPED or killed or (status == 1 and relay.came):
                self._requeue([*relay.came, *killed], saved=status == STOPPED)
        if status:
            how = f"failed with status {status}" if status > 0 else f"was ended by signal {-status}"
            self._failure.write_text(f"task {_rank()} {how}\n")
            _log(f"task {_rank()} {how}")
            raise SystemExit(exit_status(status))

    def _wait(self, relay: Relay) -> int:
        """Exit status of the command; it is killed soon after another task has failed."""
        door = relay.start(going_on(self.command) if _restarts() else self.command)
        while True:
            try:
                return door.wait(timeout=_LAST_WORDS)
            except subprocess.TimeoutExpired:
                # Slurm uses one signal both to end a task and to let it save.
                if relay.came and self._failure.exists():
                    door.kill()

    @property
    def _failure(self) -> Path:
        """Marker file: it exists if a task of this start of the job has failed."""
        return self.folder / f"{job_id()}_{_restarts()}_failed"

    def _requeue(self, came: list[signal.Signals], saved: bool) -> NoReturn:
        """Exit; the first task requeues the job."""
        if _rank() != 0:
            raise SystemExit(0)
        if self._failure.exists():
            _log(f"not requeued: {self._failure.read_text().strip()}")
            raise SystemExit(1)
        limited = signal.SIGUSR2 in came
        # Once only: the signal may have come before the command was ready, but one that never
        # saves would be requeued forever.
        if limited and not saved and _restarts():
            _log("not finished at the time limit, and nothing was saved: give a longer --time")
            raise SystemExit(1)
        # A cancelled job gets the same signal, and must not be requeued.
        if not limited and _state() in ("COMPLETING", "CANCELLED"):
            _log("stopped; Slurm ends the job itself (cancelled, or requeued by Slurm)")
            raise SystemExit(0)
        done = _ask("scontrol", "requeue", job_id())
        if done.returncode > 0:  # below 0: scontrol was ended with the job, which it requeued
            _log(f"stopped, but not requeued: {done.stderr.strip()}")
            raise SystemExit(STOPPED)
        _log("stopped; the job is requeued")
        raise SystemExit(0)


def going_on(command: Sequence[str]) -> list[str]:
    """Command for a later start of its job: ``--run.resume never`` applies to the first only."""
    asked = re.findall(r"--run\.resume[= ](\S+)", " ".join(command))
    return [*command, *(["--run.resume", "auto"] if asked[-1:] == ["never"] else [])]


def job_id() -> str:
    """Job id for Slurm's commands; in an array the plain number could mean the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def exit_status(status: int) -> int:
    """Exit status as in a shell: 128 plus the signal's number if a signal ended the process."""
    return status if status >= 0 else 128 - status


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID", "0"))


def _restarts() -> int:
    """Number of earlier starts of the job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _state() -> str:
    return _ask("squeue", "--noheader", "--jobs", job_id(), "--format", "%T").stdout.strip()


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:  # compute nodes need not have Slurm's commands
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
