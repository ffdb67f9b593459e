"""Launcher options: resources, time limit, sbatch options and sweeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_vit.common.errors import UserError, check

# Seconds by which Slurm may send its signals early (sbatch's --signal).
_EARLY = 60
# List options, which may be given more than once.
_LISTS = ("--slurm", "--setup", "--sweep")
# Options that --slurm may not set, and the launcher's option to use instead; empty: there is none.
_RESERVED = {
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "partition": "--partition",
    "time": "--time",
    "signal": "--grace",
    "array": "--sweep and --at-once",
    **dict.fromkeys(("output", "error", "open-mode", "requeue", "no-requeue", "ntasks"), ""),
}


@dataclass(frozen=True)
class LaunchConfig:
    """Launcher options. After ``--`` follow the command and its arguments."""

    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 0
    """GPUs on each machine."""
    tasks_per_node: int = 0
    """Processes on each machine. 0: one for each GPU, or one without GPUs."""
    cpus_per_task: int = 4
    """Cores of each process, shared with its loader workers."""
    partition: str = ""
    """Slurm partition. Empty: the cluster's default."""
    time: str = "60"
    """Time limit in Slurm's formats: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. A run
    that needs longer is saved before the limit, requeued and resumed."""
    grace: int = 120
    """Seconds before the time limit at which the run is signalled to save."""
    folder: str = "slurm"
    """Folder of logs and job files, on a disk that all machines share. Each launch creates a
    private folder inside it."""
    slurm: tuple[str, ...] = ()
    """Other options of sbatch: account=me qos=high exclusive ..."""
    setup: tuple[str, ...] = ()
    """Shell commands before the job, as 'module load cuda'."""
    sweep: tuple[str, ...] = ()
    """Sweep: one run for each value, as optim.lr=1e-4,3e-4; with several options, for each
    combination. Each writes to its own folder inside --run.out. Submitted as an array job."""
    at_once: int = 0
    """Maximum number of a sweep's runs at the same time. 0: all."""
    local: bool = False
    """Run the same job on this machine, without Slurm, and wait for it; Slurm's own options are
    ignored. The runs of a sweep follow one another."""
    dry_run: bool = False
    """Print the batch file and the commands; nothing is written or run, and no Slurm is needed."""

    def __post_init__(self) -> None:
        least = {"nodes": 1, "cpus_per_task": 1, "grace": 1}
        least |= dict.fromkeys(("gpus_per_node", "tasks_per_node", "at_once"), 0)
        for option, low in least.items():
            value = getattr(self, option)
            check(value >= low, f"--{option.replace('_', '-')} is {value}; at least {low}")
        limit = seconds(self.time)
        # A job that is signalled to save as it starts would be requeued forever.
        check(
            self.grace + _EARLY < limit,
            f"--grace is {self.grace} s, and Slurm may signal {_EARLY} s early; --time {self.time} "
            f"is only {limit} s",
        )
        check(not self.local or self.nodes == 1, f"--nodes is {self.nodes}; --local allows 1")
        slurm_options(self.slurm)

    @property
    def tasks(self) -> int:
        """Number of processes on each machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def seconds(time: str) -> int:
    """Seconds of a time in Slurm's formats: ``30`` (minutes), ``1:30:00``, ``2-12`` (days-hours).

    Raises:
        UserError: another format, or a time of zero.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::([0-5]\d?))?(?::([0-5]\d?))?", time, re.ASCII)
    total = 0
    if found:
        days, *parts = found.groups()
        given = [int(part) for part in parts if part is not None]
        # After days, the first number is hours; without days, one or two begin with minutes.
        hours = given if days is not None or len(given) == 3 else [0, *given]
        hours += [0] * (3 - len(hours))
        total = int(days or 0) * 86400 + hours[0] * 3600 + hours[1] * 60 + hours[2]
    check(
        total > 0,
        f"--time is {time!r}; allowed: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
    )
    return total


def slurm_options(given: Sequence[str]) -> dict[str, str | bool]:
    """sbatch options as a dictionary: ``account=me`` -> ``{"account": "me"}``; a switch is true.

    Raises:
        UserError: a malformed option, or one that the launcher has its own option for.
    """
    options: dict[str, str | bool] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.replace("_", "-")
        good = re.fullmatch(r"[a-z][a-z-]*", name) and bool(equals) == bool(value)
        check(
            bool(good) and "\n" not in text, f"--slurm is {text!r}; write name=value, or a switch"
        )
        if name in _RESERVED:
            hint = f"use {_RESERVED[name]}" if _RESERVED[name] else "the launcher sets it"
            raise UserError(f"--slurm is {text!r}; {hint}")
        # submitit's spelling, so that its own option of that name is replaced.
        options[name.replace("-", "_")] = value or True
    return options


def merge_lists(flags: Sequence[str]) -> list[str]:
    """Flags with repeated list options merged; the parser would keep the last one's values only.

    Raises:
        UserError: a list option without values.
    """
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    into = rest
    for flag in flags:
        name, equals, value = flag.partition("=")
        into = lists.setdefault(name, []) if name in _LISTS else rest if flag[:2] == "--" else into
        if name not in _LISTS:
            into.append(flag)
        elif equals:
            into.append(value)
    for name, values in lists.items():
        check(bool(values), f"{name} needs a value")
        rest += [name, *values]
    return rest
