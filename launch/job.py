"""What each task of a job does: run the door, see signals through, have the job queued again.

Of the standard library alone, so that a task is ready for signals at once.
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

# A door's status after a signal: saved, and the same command goes on.
STOPPED = os.EX_TEMPFAIL
# Slurm sends the first before it takes the machines away, the second before the time limit.
STOPS = (signal.SIGTERM, signal.SIGUSR2)
# How long the signal to one task may come after what it did to another.
_SPREAD = 1.0
# What another task that failed leaves this one for its own last words.
_LAST_WORDS = 5.0


class Relay:
    """Signals to this process do not end it; they are remembered, and passed on to those it starts.

    A process that it starts has the signals' usual effects, whatever they are here.

    Args:
        passed: for each signal, which one is sent on.
        late: also those that come when a process is under way. Slurm signals that one itself.
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
        """Start a process; a signal that came before reaches it too."""
        child = subprocess.Popen(command, env=env)
        self.children.append(child)
        for number in self.came:
            child.send_signal(self.passed[number])
        return child

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        self.came.append(came)
        for child in self.children if self.late else ():
            child.send_signal(self.passed[came])  # to none that has ended

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
    """One task under Slurm, as submitit calls it.

    submitit's own handlers act in the middle of a step and on the first task alone. Here the door
    is a process of its own: its processes agree on a step, save, and leave with ``STOPPED``.

    Args:
        command: the door and its arguments.
        folder: where the job's files are, on a disk that all machines share.
    """

    command: list[str]
    folder: Path

    def __call__(self) -> None:
        """Run the door to its end.

        Raises:
            SystemExit: with the door's status if it failed, with 0 if it can go on in a new start.
        """
        with Relay({number: number for number in STOPS}, late=False) as relay:
            status = self._wait(relay)
            if status == 1 and not relay.came:
                # Its peer was stopped, perhaps, and it lost it before the signal came here.
                time.sleep(_SPREAD)
            killed = [number for number in STOPS if number == -status]
            if status == STOPPED or killed or (status == 1 and relay.came):
                self._again([*relay.came, *killed], saved=status == STOPPED)
        if status:
            how = f"failed with status {status}" if status > 0 else f"was ended by signal {-status}"
            self._failure.write_text(f"task {_rank()} {how}\n")
            _say(f"task {_rank()} {how}")
            raise SystemExit(exit_status(status))

    def _wait(self, relay: Relay) -> int:
        """The door's status. It is not waited for long once another task has failed."""
        door = relay.start(going_on(self.command) if _restarts() else self.command)
        while True:
            try:
                return door.wait(timeout=_LAST_WORDS)
            except subprocess.TimeoutExpired:
                # Slurm's own order to end comes as the same signal as that to save.
                if relay.came and self._failure.exists():
                    door.kill()

    @property
    def _failure(self) -> Path:
        """A file that is there when a task of this start of the job has failed."""
        return self.folder / f"{job_id()}_{_restarts()}_failed"

    def _again(self, came: list[signal.Signals], saved: bool) -> NoReturn:
        """Leave, and let the first task have the job queued again."""
        if _rank() != 0:
            raise SystemExit(0)
        if self._failure.exists():
            _say(f"not queued again: {self._failure.read_text().strip()}")
            raise SystemExit(1)
        limited = signal.SIGUSR2 in came
        # Once: it may have been told before it was ready. A door that never saves would come back
        # for ever.
        if limited and not saved and _restarts():
            _say("not done at the time limit, and nothing was saved: give a longer --time")
            raise SystemExit(1)
        # A job that was cancelled gets the same signal, and could be queued again.
        if not limited and _state() in ("COMPLETING", "CANCELLED"):
            _say("stopped; Slurm is ending the job itself (cancelled, or queued again by it)")
            raise SystemExit(0)
        done = _ask("scontrol", "requeue", job_id())
        if done.returncode > 0:  # below 0: ended together with the job, as it had asked for
            _say(f"stopped, but not queued again: {done.stderr.strip()}")
            raise SystemExit(STOPPED)
        _say("stopped; the job is queued again")
        raise SystemExit(0)


def going_on(command: Sequence[str]) -> list[str]:
    """A door's command for a later start of its job: ``--run.resume never`` was for the first."""
    asked = re.findall(r"--run\.resume[= ](\S+)", " ".join(command))
    return [*command, *(["--run.resume", "auto"] if asked[-1:] == ["never"] else [])]


def job_id() -> str:
    """The job as Slurm's commands name it. In an array the plain number may mean all of it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def exit_status(status: int) -> int:
    """A process's status as a shell would say it: 128 and the signal's number if one ended it."""
    return status if status >= 0 else 128 - status


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID", "0"))


def _restarts() -> int:
    """How many starts of the job there were before this one."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _state() -> str:
    return _ask("squeue", "--noheader", "--jobs", job_id(), "--format", "%T").stdout.strip()


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:  # Slurm's commands need not be there on the machines that compute
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
