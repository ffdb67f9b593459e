"""Cores that work of others takes are seen, said beside the progress, and warned of."""

import itertools
import math
import os
import platform
import subprocess
import sys
import time

import pytest
import torch

from ssl_vit.commands.preflight import on_cores, on_waits
from ssl_vit.common.waiting import CHOICE, USERS
from ssl_vit.training import shared_cores
from ssl_vit.training.energy import Energy
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.pace import StepTimes
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.shared_cores import SHARED, SharedCores, processor_time, ticks_of

CPU = torch.device("cpu")


class Machine:
    """Four cores; each look is 6 seconds after the one before."""

    def __init__(self) -> None:
        self.now, self.all, self.own = 0.0, 100.0, 50.0
        self.cores = SharedCores(CPU, lambda: (self.all, self.own))
        self.cores.look(self.now)

    def go_on(self, others: float, own: float = 1.0, looks: int = 1) -> list[str]:
        """What is said while others, and the run, have so many cores."""
        lines = []
        for _ in range(looks):
            self.now += 6
            self.all += 6 * (others + own)
            self.own += 6 * own
            self.cores.look(self.now)
            lines += self.cores.news(int(self.now))
        return lines


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.setattr(shared_cores, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(shared_cores, "quota", lambda: math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for name in (*USERS, CHOICE):
        monkeypatch.delenv(name, raising=False)


def choice(monkeypatch, waits: str) -> None:
    monkeypatch.setenv(CHOICE, f"{waits} {os.getpid()} {platform.node()}")
    if waits == "sleep":
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def test_own_work_is_not_that_of_others():
    machine = Machine()
    machine.go_on(others=0.2, own=3.8)
    assert machine.cores.others == pytest.approx(0.2)
    assert not machine.cores.shared
    machine.go_on(others=1.0, own=3.0)
    assert machine.cores.others == pytest.approx(1.0)
    assert machine.cores.shared


def test_cores_that_no_thread_wants_may_be_busy(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine = Machine()
    machine.go_on(others=2.0)
    assert not machine.cores.shared
    machine.go_on(others=3.0)
    assert machine.cores.shared


def test_idle_cores_beyond_a_quota_are_free_for_others(monkeypatch):
    """The kernel counts all cores, whatever share of their time a container has."""
    monkeypatch.setattr(shared_cores, "usable_cores", lambda: set(range(64)))
    monkeypatch.setattr(shared_cores, "quota", lambda: 4.0)
    for threads in (4, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        machine = Machine()
        machine.go_on(others=8.0, own=4.0)
        assert not machine.cores.shared, "52 cores are idle"
        machine.go_on(others=61.0, own=3.0)
        assert machine.cores.shared


def test_a_warning_comes_once_when_it_lasts(monkeypatch):
    choice(monkeypatch, "spin")
    machine = Machine()
    assert machine.go_on(1.0, looks=2) == []
    assert machine.go_on(0.0, looks=1) == []
    (line,) = machine.go_on(1.0, looks=50)
    assert "other work takes 1.0 of 4 cores" in line
    assert "Ctrl-C" in line
    assert "same command again" in line
    assert machine.go_on(0.0, looks=50) == []


def test_a_user_who_was_not_chosen_for_is_told_the_variable():
    """As where torch was imported first."""
    (line,) = Machine().go_on(1.0, looks=3)
    assert "OMP_WAIT_POLICY=PASSIVE" in line


def test_there_is_nothing_to_warn_of_where_nobody_spins(monkeypatch):
    choice(monkeypatch, "sleep")
    machine = Machine()
    assert machine.go_on(1.0, looks=50) == []
    assert machine.cores.shared
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Machine().go_on(4.0, looks=50) == []


def test_cores_that_are_free_again_are_told_once(monkeypatch):
    choice(monkeypatch, "sleep")
    machine = Machine()
    assert machine.go_on(1.0, looks=5) == []
    assert machine.go_on(0.0, looks=11) == []
    (line,) = machine.go_on(0.0, looks=50)
    assert "free now" in line
    assert "Ctrl-C" in line


def test_it_is_not_looked_at_often_nor_for_a_gpu():
    asked = []
    cores = SharedCores(CPU, lambda: asked.append(1))
    for now in (0.0, 1.0, 2.0):
        cores.look(now)
    assert len(asked) == 3, "unknown: nothing was kept"
    cores = SharedCores(CPU, lambda: (asked.append(1), (1.0, 1.0))[1])
    for now in range(20):
        cores.look(float(now))
    assert len(asked) == 3 + 4
    SharedCores(torch.device("cuda"), lambda: asked.append(1)).look(0.0)
    assert len(asked) == 3 + 4


def test_they_are_looked_at_between_lines_of_progress(monkeypatch):
    """Where spinning is worst, ten steps take minutes: the first line has the warning."""
    clock = itertools.count(step=6)
    monkeypatch.setattr(shared_cores.time, "monotonic", lambda: float(next(clock)))
    busy = itertools.count(step=12)  # two cores, of which the run has none
    pace = StepTimes(Parallel(0, 1, CPU))
    pace.cores = SharedCores(CPU, lambda: (float(next(busy)), 0.0))
    for _ in range(4):
        with pace.waiting():
            pass
    (line,) = pace.news(10)
    assert "OMP_WAIT_POLICY" in line


def test_the_line_of_progress_says_it(tmp_path, capsys):
    machine = Machine()
    pace = StepTimes(Parallel(0, 1, CPU))
    pace.cores = machine.cores
    with RunLog(tmp_path, 0, 2, 1, 8, main=True, energy=Energy(CPU)) as log:
        log.logged = -100.0
        log.add(1, {"loss": torch.tensor(1.0)}, 1e-3, pace)
        machine.go_on(others=1.0)
        log.add(2, {"loss": torch.tensor(1.0)}, 1e-3, pace)
    before, after = capsys.readouterr().err.splitlines()
    assert SHARED not in before
    assert SHARED in after


def test_the_preflight_says_it(monkeypatch):
    machine = Machine()
    assert [*on_cores(machine.cores), *on_waits(machine.cores)] == []
    machine.go_on(1.0)
    ((name, text),) = on_cores(machine.cores)
    assert name == "shared"
    assert "1.0 of 4 cores" in text
    (line,) = on_waits(machine.cores)
    assert "OMP_WAIT_POLICY=PASSIVE" in line
    choice(monkeypatch, "sleep")
    assert list(on_waits(machine.cores)) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells, others do not")
def test_what_a_process_and_its_children_did_is_counted(monkeypatch):
    """By the kernel's own numbers: a child, alive and ended, and nothing of a stranger."""
    monkeypatch.undo()
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    before = ticks_of(os.getpid())
    started = time.process_time()
    child = subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"done\n"
    alive = ticks_of(os.getpid()) - before
    assert ticks_of(child.pid) >= 25
    child.communicate(b"\n")
    ended = ticks_of(os.getpid()) - before
    own = 100 * (time.process_time() - started)
    for ticks in (alive, ended):
        assert 25 <= ticks <= 60 + own
    everything, ours = processor_time()
    assert 0 < ours < everything
