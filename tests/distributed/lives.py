"""Training processes that start at once and can be killed: forks of one that has imported it all.

A fresh interpreter needs seconds to import the package. Here a server (multiprocessing's own) does
so once; each process of a run is a fork of it, with its own rank, files and fate.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from launch.here import free_port
from tests.conftest import ROOT
from tests.forks import FORKS, end_with_server

# Of whatever launched the tests, which must not reach a run within them.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_", "TORCHELASTIC_")
Prepare = Callable[[], object]


class Life:
    """The processes of one run, from their start to their end."""

    def __init__(self, folder: Path, processes: list[ForkServerProcess], said: list[Path]) -> None:
        self.processes, self._said, self.folder = processes, said, folder

    def said(self, rank: int = 0) -> str:
        """What a process wrote so far, standard error and output together."""
        return self._said[rank].read_text()

    def running(self) -> bool:
        """Whether any of them is there."""
        return any(p.is_alive() for p in self.processes)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these processes, where they still are."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid or 0, number)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Their exit statuses, minus the signal for those that were killed by one.

        Those that are there after so many seconds are killed, and the test fails.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        self.signal(signal.SIGKILL, *late)
        words = "\n".join(self.said(rank) for rank in late)
        assert not late, f"processes {late} were still there after {seconds:.0f} s:\n{words}"
        return [p.exitcode if p.exitcode is not None else -1 for p in self.processes]


class Lives:
    """Starts doors in ``folder``; every process writes what it says to a file there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.said = Path(tempfile.mkdtemp(prefix="said-", dir=folder))

    def start(
        self,
        *arguments: str,
        world: int = 1,
        door: str = "pretrain",
        prepare: Mapping[int, Prepare] | None = None,
    ) -> Life:
        """``python -m ssl_vit.DOOR ARGUMENTS`` as ``world`` processes.

        ``prepare``: for a rank, what its process calls first (a function of a test module).
        """
        self.count += 1
        port, processes, said = free_port(), [], []
        for rank in range(world):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            places |= {"LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
            env = {k: str(v) for k, v in places.items()} if world > 1 else {}
            env["MASTER_ADDR"] = "127.0.0.1"
            env |= {"SSL_VIT_CACHE": str(self.folder / "cache"), "COLUMNS": "80"}
            said.append(self.said / f"{self.count:03d}-{rank}.txt")
            first = (prepare or {}).get(rank)
            given = (self.folder, said[-1], env, f"ssl_vit.{door}", arguments, first)
            processes.append(FORKS.Process(target=_live, args=given))
        _start(processes)
        return Life(self.folder, processes, said)


def _start(processes: list[ForkServerProcess]) -> None:
    # The first start brings up the server, which finds the package by this.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        for process in processes:
            process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _live(
    folder: Path,
    said: Path,
    env: dict[str, str],
    door: str,
    arguments: tuple[str, ...],
    prepare: Prepare | None,
) -> None:
    """The life of one process: what its door does, and its exit status."""
    end_with_server()
    multiprocessing.set_start_method("fork", force=True)  # as for a process started by a user
    os.chdir(folder)
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [n for n in os.environ if n.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update(env)
    sys.argv = [door, *arguments]
    status = 1
    try:
        if prepare:
            prepare()
        if env.get("RANK", "0") != "0":
            _wait_for_port(int(env["MASTER_PORT"]))
        cli = importlib.import_module("ssl_vit.commands.cli")
        cli.run_door(importlib.import_module(door).main)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_for_port(port: int) -> None:
    """Until process 0 listens: a client that comes too early tries again only after seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.01)
