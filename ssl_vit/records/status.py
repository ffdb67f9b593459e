"""Run status: status.json, as it is written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.files import write_text_atomically

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
