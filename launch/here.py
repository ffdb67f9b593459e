"""Local job, without Slurm: the same command in each of its tasks on this machine."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.job import STOPPED, STOPS, Relay, exit_status
from ssl_vit.common.waiting import choose, usable_cores

# Seconds that the other tasks have to exit by themselves after one has failed.
_LAST_WORDS = 5.0


def run_here(commands: Sequence[Sequence[str]], tasks: int) -> int:
    """Local job: each command in ``tasks`` processes, one command after the other; the exit status.

    The status is that of the first task that failed, whose end ends the others; else ``STOPPED`` if
    a signal stopped them, else 0. No command starts after one that did not finish, or after a
    signal. Ctrl-C, SIGTERM, SIGUSR2 and SIGHUP are passed to the tasks, which save.
    """
    # A terminal sends Ctrl-C to the tasks too; passing it on as well would end them at once.
    passed = {number: number for number in STOPS} | {signal.SIGINT: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else by nohup
        passed[signal.SIGHUP] = signal.SIGHUP
    status = 0
    with Relay(passed, late=True) as relay:
        for command in commands:
            # A signal may have arrived in the last step of the previous run, which then finished.
            status = status or (STOPPED if relay.came else 0)
            if status:
                break
            if len(commands) > 1:
                print(shown(command), flush=True)
            status = _wait([relay.start(command, env) for env in _environments(tasks)])
    if status == STOPPED:
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print("stopped and saved; run the same command again to resume", file=sys.stderr)
    return exit_status(status)


def shown(command: Sequence[str]) -> str:
    """Command as a user would type it."""
    return shlex.join(["python", *command[1:]])


def _environments(tasks: int) -> list[dict[str, str]]:
    """Environment of each task, with torch.distributed's variables if there is more than one."""
    env = dict(os.environ)
    if tasks > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(usable_cores()) // tasks)))
    # By the launcher, while it waits: tasks that start together would see each other at work.
    choose(env, tasks)
    if tasks == 1:
        return [env]
    world = {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(tasks)]
    return [env | world | address | rank for rank in ranks]


def free_port() -> int:
    """Unused port, below those that Linux gives to outgoing connections (from 32768)."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _wait(tasks: list[subprocess.Popen[bytes]]) -> int:
    """Exit status of the first task that failed, else ``STOPPED`` if one has it, else 0."""
    failed, deadline = 0, 0.0
    while True:
        statuses = [task.poll() for task in tasks]
        bad = [status for status in statuses if status not in (None, 0, STOPPED)]
        if bad and not failed:
            failed, deadline = int(bad[0] or 0), time.monotonic() + _LAST_WORDS
        if None not in statuses:
            return failed or max(status or 0 for status in statuses)
        if failed and time.monotonic() > deadline:
            for task in tasks:
                task.kill()
        time.sleep(0.05)
