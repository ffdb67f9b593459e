"""A job on this machine, without Slurm: the same command in each of its tasks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.job import STOPPED, STOPS, Relay, exit_status

# How long the other tasks of one that failed have to end by themselves, in seconds.
_LAST_WORDS = 5.0


def run_here(command: Sequence[str], tasks: int) -> int:
    """Run ``command`` in ``tasks`` processes and wait; the exit status.

    That of the first task that failed, whose end ends the others; else ``STOPPED`` where a signal
    stopped them, else 0. Ctrl-C, SIGTERM and SIGUSR2 reach the tasks, which save.
    """
    # A terminal has sent Ctrl-C to the tasks too, and a second one would end them at once.
    passed = {number: number for number in STOPS} | {signal.SIGINT: signal.SIGTERM}
    with Relay(passed, late=True) as relay:
        for env in _environments(tasks):
            relay.start(command, env)
        status = _wait(relay.children)
    if status == STOPPED:
        print("stopped, saved; start it again to go on", file=sys.stderr)
    return exit_status(status)


def _environments(tasks: int) -> list[dict[str, str]]:
    """What each task finds in its environment: torch.distributed's variables if there are more."""
    env = dict(os.environ)
    if tasks == 1:
        return [env]
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // tasks)))
    world = {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(tasks)]
    return [env | world | address | rank for rank in ranks]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(tasks: list[subprocess.Popen[bytes]]) -> int:
    """The status of the first that failed, else ``STOPPED`` if one has it, else 0."""
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
