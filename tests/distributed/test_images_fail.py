"""Images that one of two processes cannot load: both end together, and nothing is lost."""

import functools
import os
import re
import signal
import time

import pytest

from tests.distributed.lives import Life, Lives
from tests.integration.conftest import TINY

MAE = ("mae", "--config", "mae.yaml", "--data.val", "", "--data.holdout", "0")
LATE = 5  # the step whose images do not come


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> Lives:
    folder = tmp_path_factory.mktemp("images")
    (folder / "mae.yaml").write_text(TINY)
    return Lives(folder)


def late(call) -> None:
    """From that step on, a batch is what ``call`` does."""
    from ssl_vit.data import loader

    real, count = loader.TrainImages.__getitems__, iter(range(1, 100))

    def getitems(self, wanted):
        # One image alone is read before the first step, for its size.
        return call() if len(wanted) > 1 and next(count) > LATE else real(self, wanted)

    loader.TrainImages.__getitems__ = getitems


def never() -> None:
    time.sleep(600)


def full() -> None:
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(lives: Lives, out: str, calls: dict[int, object], *options: str) -> Life:
    prepare = {rank: functools.partial(late, call) for rank, call in calls.items()}
    given = (*MAE, "--run.out", out, "--run.save-every", "100st", "--data.workers", "1")
    return lives.start(*given, *options, world=2, prepare=prepare)


def saved(lives: Lives, out: str) -> list[str]:
    return [p.name for p in (lives.folder / out / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("out", "calls", "line"),
    [
        ("killed", {1: killed}, "stopped: process 1: a data worker (process "),
        ("full", {0: full, 1: full}, "stopped: a batch does not fit into /dev/shm ("),
    ],
)
def test_both_end_with_one_line(lives, out, calls, line):
    life = start(lives, out, calls)
    assert life.wait(60) == [1, 1]
    lines = (life.said(0) + life.said(1)).splitlines()
    (said,) = [text for text in lines if "stopped" in text]
    assert said.startswith(line)
    assert "Traceback" not in life.said(0) + life.said(1)
    step = int(re.search(r"\(step (\d+) is saved\)$", said)[1])
    assert saved(lives, out) == [f"step-{step:08d}"]
    # With a worker its batches go, also those that were ready.
    assert step == LATE if out == "full" else 0 < step <= LATE


def test_a_stop_reaches_one_that_waits_for_images(lives):
    """Its own never come; the other has its images. Both save the step that both have done."""
    life = start(lives, "waits", {1: never})
    metrics = lives.folder / "waits" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {LATE}' in metrics.read_text():
            break
        time.sleep(0.05)
    time.sleep(0.5)
    life.signal(signal.SIGTERM, 0, 1)
    assert life.wait(15) == [75, 75]
    assert f"stopped at step {LATE}, saved" in life.said(0)
    assert saved(lives, "waits") == [f"step-{LATE:08d}"]


def test_a_second_run_is_refused_by_all(lives):
    first = start(lives, "shared", {}, "--run.length", "4000st")
    metrics = lives.folder / "shared" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not metrics.is_file():
        time.sleep(0.05)
    second = start(lives, "shared", {}, "--run.length", "4000st")
    assert second.wait(60) == [2, 2]
    lines = (second.said(0) + second.said(1)).splitlines()
    (said,) = [text for text in lines if "error" in text]
    assert said.startswith("error: shared is in use by another run: process ")
    assert first.running()
    first.signal(signal.SIGTERM, 0, 1)
    assert first.wait(30) == [75, 75]
