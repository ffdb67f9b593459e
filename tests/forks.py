"""Doors that start at once: forks of a process that has imported the package.

A fresh interpreter needs seconds to import it. Here a server (multiprocessing's own) does so once
for a process of tests; each start of a door is a fork of it, with its own folder, environment,
output and fate.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NoReturn

from tests.conftest import ROOT

DOORS = ("pretrain", "evaluate", "export", "visualize", "benchmark", "runs", "report", "embed")
FORKS = multiprocessing.get_context("forkserver")
# The package comes before the tests, which would have its shapes checked.
FORKS.set_forkserver_preload(["tests.warm", __name__])
# In the place of multiprocessing, for a module that would spawn a process.
SPAWNS = SimpleNamespace(get_context=lambda _: FORKS, get_start_method=lambda: "fork")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _end(owner: int) -> None:
    """Kill the forks that a test which failed has left, if this is the process of the tests."""
    for process in multiprocessing.active_children() if os.getpid() == owner else ():
        process.kill()


# Registered later than multiprocessing's own hook, which waits for them: it runs before that one.
atexit.register(_end, os.getpid())


def end_with_server() -> None:
    """This fork does not outlive the server, and that not the tests, however they end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Fork:
    """A door that runs, as much like ``subprocess.Popen`` as tests need."""

    def __init__(self, arguments: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.args = list(arguments)
        self._said = TemporaryDirectory(prefix="fork-")
        given = (self.args, str(folder), dict(env), self._said.name)
        self.process = FORKS.Process(target=_live, args=given)
        # The first start brings up the server, which finds the package by this.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal's number if one ended it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it, if the process is still there."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; what it wrote to standard output and to standard error. To be called once."""
        self.process.join(timeout)
        late = self.process.is_alive()
        self.process.kill()  # if it is there
        self.process.join()
        with self._said as folder:
            out, errors = (_text(Path(folder, name)) for name in ("out", "err"))
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, out, errors)
        return out, errors

    def done(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait; all of it together."""
        out, errors = self.communicate(timeout)
        return subprocess.CompletedProcess(self.args, self.returncode or 0, out, errors)


def _text(file: Path) -> str:
    """What a file holds; nothing if its process ended before it made it."""
    return file.read_text() if file.exists() else ""


def can_fork(arguments: Sequence[str]) -> bool:
    """Whether these are ``-m ssl_vit.DOOR ...`` or ``SCRIPT.py ...``."""
    if arguments[0] == "-m":
        return arguments[1] in [f"ssl_vit.{door}" for door in DOORS]
    return arguments[0].endswith(".py")


class Branch:
    """A fork of a fork, in the place of ``subprocess.Popen`` where that would start a door.

    It writes to where the one that starts it does.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            for number in {*signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP}:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _do(list(command[1:]), env)

    def poll(self) -> int | None:
        """The exit status, as that of a fork."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def send_signal(self, number: int) -> None:
        """Send it, if the process is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _live(arguments: list[str], folder: str, env: dict[str, str], said: str) -> None:
    """The life of one process, in its folder, with files for what it says."""
    multiprocessing.set_start_method("fork", force=True)  # as for a process started by a user
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", write_through=True)
    _do(arguments, env)


def _do(arguments: list[str], env: Mapping[str, str]) -> NoReturn:
    """What its door does, and its exit status."""
    end_with_server()
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    status: object = 1
    try:
        if arguments[0] == "-m":
            cli, door = (
                importlib.import_module(name) for name in ("ssl_vit.commands.cli", arguments[1])
            )
            cli.run_door(door.main)
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    os._exit(status if isinstance(status, int) else 1)
