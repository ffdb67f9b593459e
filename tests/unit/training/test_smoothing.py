"""The rate that people are shown is smooth; the metrics keep what was measured."""

import io
import itertools
import math

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_vit.records.run_folder import Run
from ssl_vit.records.status import Status
from ssl_vit.training import metrics
from ssl_vit.training.energy import Energy
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.pace import StepTimes
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.run_files import METRICS_FILE, read_rows
from ssl_vit.training.smoothing import SmoothedRate
from tests.unit.training.test_clipping import Launches

CPU = torch.device("cpu")


def shown(*intervals: float) -> list[float]:
    """Seconds a step after each interval of 10 steps."""
    rate, found = SmoothedRate(), []
    for seconds in intervals:
        rate.add(10, seconds)
        found.append(rate.seconds)
    return found


@pytest.mark.parametrize("usual", [0.1, 1.0, 100.0])
def test_a_busy_moment_does_not_change_it(usual):
    """However long intervals are."""
    values = shown(*[usual] * 10, 10 * usual, *[usual] * 10, 10 * usual, 10 * usual, usual)
    assert values == pytest.approx([usual / 10] * len(values))


@pytest.mark.parametrize(("usual", "within"), [(1.0, 31), (100.0, 5)])
def test_a_lasting_change_does(usual, within):
    """In half a minute, or in five intervals where those are long."""
    values = shown(*[usual] * 100, *[usual / 2] * 70)
    assert values[99] == pytest.approx(usual / 10)
    values = shown(*[usual] * 100, *[2 * usual] * within)
    assert values[-1] == pytest.approx(usual / 5)


def test_it_is_known_from_the_first_interval():
    assert shown(3.0) == [0.3]
    assert shown(30.0, 3.0) == [3.0, 0.3], "the first steps of a run are slow"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A run's log of 8 images a step, a line every step, and a clock that is set by hand."""
    clock = itertools.count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: log.now)
    log = RunLog.__new__(RunLog)
    log.now = float(next(clock))
    log.__init__(tmp_path, 0, 100, 1, 8, main=True, energy=Energy(CPU))
    return log


def take(log: RunLog, *intervals: float) -> None:
    """Steps that take so many seconds."""
    for seconds in intervals:
        log.now += seconds
        log.add(log.step + 1, {"loss": torch.tensor(1.0)}, 1e-3, StepTimes(Parallel(0, 1, CPU)))


def test_a_line_shows_the_usual_speed_and_the_metrics_what_was(log, capsys):
    take(log, *[11.0] * 9, 110.0)
    *_, before, after = capsys.readouterr().err.splitlines()
    assert ["  1 img/s" in line for line in (before, after)] == [True, True]
    assert "16:41 left" in before
    assert "16:30 left" in after
    rows = read_rows(log.folder / METRICS_FILE)
    assert [row["images_per_s"] for row in rows][-2:] == pytest.approx([8 / 11, 8 / 110])
    status = Status("running", step=10, total=100, images_per_step=8)
    reader = Run(log.folder, rows=rows, status=status, state="running")
    assert reader.images_per_second == pytest.approx(8 / log.smoothed.seconds)
    assert reader.seconds_left == pytest.approx(990)


def test_a_terminal_shows_the_same(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(metrics, "Console", lambda **_: terminal)
    with RunLog(tmp_path, 0, 100, 1, 8, main=True, energy=Energy(CPU)) as log:
        log.smoothed.add(1, 9.0)
        log.smoothed.add(1, 9.0)
        log._log_line(40, {"loss": 1.0, "lr": 1e-3, "images_per_s": 1000.0})
    assert "  1 img/s" in screen.getvalue()
    assert "9:00 left" in screen.getvalue()


def test_a_row_is_one_exchange_and_one_copy(log, monkeypatch):
    """Of all scalars, how often each was finite, joules, and how many steps in a row were skipped:
    a device is waited for once."""
    asked = []
    real = metrics.all_reduce_mean
    monkeypatch.setattr(metrics, "all_reduce_mean", lambda x: asked.append(x.shape) or real(x))
    log.energy.take = lambda: 7.5
    for value in (1.0, math.nan, 2.0):
        scalars = {"loss": torch.tensor(value), "kl": torch.tensor(4.0)}
        log.every, log.now = 3, log.now + 1.0
        streak = torch.tensor(value + 3)
        log.add(log.step + 1, scalars, 1e-3, StepTimes(Parallel(0, 1, CPU)), streak)
    assert asked == [(6,)]
    assert log.streak == 5
    row = read_rows(log.folder / METRICS_FILE)[-1]
    assert (row["loss"], row["kl"], row["energy_j"]) == (1.5, 4.0, 7.5)


def test_steps_may_differ_in_what_they_name(log):
    """A mean is over those that name it, and are finite."""
    log.every = 4
    for named in ({"loss": 1.0}, {"b": 8.0, "loss": 3.0}, {"b": math.inf}, {"loss": 5.0}):
        scalars = {name: torch.tensor(value) for name, value in named.items()}
        log.now += 1.0
        row = log.add(log.step + 1, scalars, 1e-3, StepTimes(Parallel(0, 1, CPU)))
    assert (row["loss"], row["b"]) == (3.0, 8.0)


def test_kernels_of_a_step_are_as_many_for_any_number_of_scalars(log):
    """On a GPU; tensors are fake."""
    log.every, counts = 1000, []
    with FakeTensorMode():
        for n in (1, 30):
            scalars = {f"{n} {i}": torch.empty((), device="cuda") for i in range(n)}
            for _ in range(2):
                with Launches() as seen:
                    log.add(log.step + 1, scalars, 1e-3, StepTimes(Parallel(0, 1, CPU)))
            counts.append(seen.count)
    log.sums = {}
    assert counts[0] == counts[1] <= 10
