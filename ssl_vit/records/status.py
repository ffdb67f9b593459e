"""What a run says of itself when it begins and when it ends: status.json in its folder."""

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
from ssl_vit.common.config import RunFailed, UserError, check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.training.parallel import lost_process

if TYPE_CHECKING:  # to read what a run says of itself, its parts need not be imported
    from ssl_vit.training.session import Session

log = logging.getLogger("ssl_vit")
STATUS_FILE = "status.json"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """What ``status.json`` holds. It says nothing that a number of the training depends on.

    Attributes:
        state: ``running`` since training began; ``finished`` after the closing words; ``stopped``
            by a signal; ``failed`` by an error. A run that was killed still says ``running``.
        name: the kind of run: a method (``mae``), or ``finetune``.
        command: the door that runs it, without its options: ``python -m ssl_vit.pretrain mae``.
        step, total: optimizer steps done when this was written, and of the whole run.
        images_per_step: images of the effective batch.
        steps_per_epoch: optimizer steps of a pass over the training images.
        pooling: the feature that the task trains, ``cls`` or ``mean``; empty: it has no choice.
        host, pid: where the main process is, or was.
        processes_of: which processes its number is among (a container has its own); 0: unknown.
        process_started: its start, in clock ticks since the machine's; tells a process from a later
            one of the same number. None: this system does not say.
        job: Slurm's number of the job, or empty.
        started: when the run first began; Unix time in seconds.
        updated: when this was written; Unix time in seconds.
        device: a GPU by its name, or ``cpu``.
        processes: how many train together.
        threads: of each process, for arithmetic on the CPU.
        versions: of ``torch``, ``timm`` and ``ssl_vit``.
        reason: in one line, why it stopped or failed.
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


# Of every field, for a file that may hold anything.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state", "name", "command", "pooling", "host"), (str,)),
    **dict.fromkeys(("job", "device", "reason"), (str,)),
    **dict.fromkeys(("step", "total", "images_per_step", "steps_per_epoch"), (int,)),
    **dict.fromkeys(("pid", "processes_of", "processes", "threads"), (int,)),
    **dict.fromkeys(("started", "updated"), (int, float)),
    "process_started": (int, type(None)),
    "versions": (dict,),
}


def write_status(folder: Path, status: Status) -> None:
    """Write ``status.json``, whole or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    write_text_atomically(folder / STATUS_FILE, json.dumps(asdict(status), indent=1) + "\n")


def read_status(folder: Path) -> Status | None:
    """What the run in ``folder`` says of itself; None where it says nothing.

    Keys that this version does not know are passed over; those that are missing have defaults.

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
    """The keys that are known, each with a value of its kind.

    Raises:
        UserError: a value that cannot be, or no state.
    """
    known = {key: value for key, value in found.items() if key in _KINDS}
    for name, value in known.items():
        good = isinstance(value, _KINDS[name]) and not isinstance(value, bool)
        check(good, f"{name} is {value!r:.60}")
    state, allowed = known.get("state"), get_args(State)
    check(state in allowed, f"state is {state!r:.60}, not one of {', '.join(allowed)}")
    return known


class Notes:
    """Notes what becomes of a run, in the main process; the others' calls do nothing.

    A run that has finished before keeps what it says, whatever comes of showing its results again.
    A note that cannot be written is said and no reason to stop: it must not hide another error.

    Args:
        session: the run, at the step that it begins or goes on with.
        command: its door, without options.
    """

    def __init__(self, session: Session, command: str) -> None:
        self.session = session
        self.status = _described(session, command)
        self.writes = session.parallel.main
        if self.writes and session.trainer.step and (before := _before(session.out)):
            self.status = replace(self.status, started=before.started)
            self.writes = before.state != "finished" or before.step != self.status.total

    def __call__(self, state: State, reason: str = "") -> None:
        """Note the run's state, with the step it is at."""
        if not self.writes:
            return
        step, now = self.session.trainer.step, time.time()
        self.status = replace(self.status, state=state, step=step, updated=now, reason=reason)
        try:
            write_status(self.session.out, self.status)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.session.out / STATUS_FILE, error)


@contextmanager
def noted(session: Session, command: str) -> Iterator[Notes]:
    """Around a run, from its first step to its closing words: it is ``running``; an error or an
    interrupt that leaves the block is noted. Other ends are noted by who knows of them."""
    notes = Notes(session, command)
    notes("running")
    try:
        yield notes
    except KeyboardInterrupt:
        notes("stopped", "interrupted at once, nothing saved on the way out")
        raise
    except BaseException as error:
        notes("failed", _in_a_line(error))
        raise


def by_signal(number: int) -> str:
    """The reason of a run that a signal has stopped: ``SIGTERM came``."""
    return f"{signal.Signals(number).name} came"


def process_start(pid: int) -> int | None:
    """When a living process of this machine started, in clock ticks since the machine did; None
    where there is none, or the system does not say. One that has ended, and whose parent has not
    yet asked how, is none."""
    try:
        # The name of the program comes second, in brackets, and may hold anything.
        parts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if parts[0] in ("Z", "X") else int(parts[19])  # fields 3 and 22
    except (OSError, ValueError, IndexError):
        return None


def process_space() -> int:
    """A number for the processes that this one can see; 0 where the system does not say."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _described(session: Session, command: str) -> Status:
    """The run and this process, as it begins."""
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
    """What an earlier process said of the run; a damaged file is written anew."""
    try:
        return read_status(folder)
    except UserError:
        return None


def _in_a_line(error: BaseException) -> str:
    """What is said of an error where people read it."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Exception) and lost_process(error):
        return f"another process is gone, or has not answered in time: {text}"
    plain = isinstance(error, (UserError, RunFailed, OSError))
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")
