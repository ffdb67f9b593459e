"""What a run folder belongs to: one run at a time, and the images it was begun with."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forks import Fork
from tests.integration.test_resume import wait_for


def steps(folder: Path) -> bool:
    """Whether a run has logged a step."""
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def pictures(folder: Path, seed: int = 0, count: int = 30) -> str:
    """Pictures of one size, uncompressed."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / f"{i}.bmp")
    return f"flat:{folder.name}"


# --- one run at a time --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def living(shared_door):
    """A run that goes on until it is killed; what its folder holds is compared at the end."""
    process = shared_door.start("--run.out", "living", "--run.length", "100000st")
    folder = shared_door.folder / "living"
    wait_for(lambda: steps(folder))
    yield process
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_run_is_refused(shared_door, living, resume):
    """Also one that would begin anew; the first goes on."""
    folder = shared_door.folder / "living"
    config = (folder / "config.yaml").stat()
    size = "--run.length", "100000st"
    second = shared_door.pretrain("--run.out", "living", *size, "--run.resume", resume)
    assert second.returncode == 2, second.stderr
    last = second.stderr.splitlines()[-1]
    assert last.startswith("error: living is in use by another run: process ")
    assert f"process {living.process.pid} on " in last
    assert (folder / "config.yaml").stat() == config
    assert living.returncode is None
    assert not (shared_door.folder / "living-before-1").exists()
    rows = (folder / "metrics.jsonl").stat().st_size
    wait_for(lambda: (folder / "metrics.jsonl").stat().st_size > rows)


def test_it_is_read_all_the_same(shared_door, living):
    """By the table of runs and by the report."""
    table = shared_door("-m", "ssl_vit.runs", "living", "--json")
    assert json.loads(table.stdout)["state"] == "running", table.stderr
    report = shared_door("-m", "ssl_vit.report", "living")
    assert report.returncode == 0, report.stderr
    assert "run.lock" not in table.stdout + (shared_door.folder / "living/report.html").read_text()


def test_killed_it_goes_on_at_once(shared_door, living):
    living.send_signal(signal.SIGKILL)
    wait_for(lambda: living.returncode is not None)
    started, folder = time.monotonic(), shared_door.folder / "living"
    rows = (folder / "metrics.jsonl").stat().st_ino
    again = shared_door.start("--run.out", "living", "--run.length", "100000st")
    wait_for(lambda: (folder / "run.lock-2").is_file())
    assert time.monotonic() - started < 30
    # A run that goes on begins by writing the rows anew that count.
    wait_for(lambda: (folder / "metrics.jsonl").stat().st_ino != rows and steps(folder))
    time.sleep(0.5)
    again.send_signal(signal.SIGTERM)
    wait_for(lambda: again.returncode is not None)
    assert not list(folder.glob("run.lock-*"))


# --- images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(shared_door):
    """Options of a run on pictures, stopped on its way, and its folder."""
    train, val = pictures(shared_door.folder / "one"), pictures(shared_door.folder / "val", 1, 9)
    options = ("--data.train", train, "--data.val", val, "--optim.batch-size", "9")
    done = shared_door.pretrain(*options, "--run.out", "begun", "--run.length", "8st")
    assert done.returncode == 0, done.stderr
    return options, shared_door.folder / "begun"


@pytest.fixture
def run(begun, shared_door, tmp_path):
    """Goes on with a copy of the run, with changed options."""
    copy = tmp_path / "copy"
    shutil.copytree(begun[1], copy)

    def again(*changes: str) -> subprocess.CompletedProcess[str]:
        given = (*begun[0], "--run.out", str(copy), "--run.length", "8st", *changes)
        return shared_door.pretrain(*given)

    again.folder = copy
    return again


def test_the_same_images_in_another_place_go_on(run, shared_door):
    for name in ("one", "val"):
        shutil.copytree(shared_door.folder / name, shared_door.folder / f"{name}-2")
    done = run("--data.train", "flat:one-2", "--data.val", "flat:val-2")
    assert done.returncode == 0, done.stderr
    assert "--data.train is 'flat:one-2', and was 'flat:one': the same by content" in done.stderr
    assert "--data.val is 'flat:val-2', and was 'flat:val': the same by content" in done.stderr
    assert "step 8 of 8" in done.stderr


@pytest.mark.parametrize("option", ["data.train", "data.val"])
def test_other_images_are_refused(run, shared_door, option):
    """Of the same number, names and sizes: in the same place, and in another."""
    count, name = (30, "one") if option == "data.train" else (9, "val")
    other = pictures(shared_door.folder / f"other-{name}", 5, count)
    done = run(f"--{option}", other)
    assert done.returncode == 2, done.stderr
    started = f"--{option} is '{other}', but the run in {run.folder} was started with 'flat:{name}'"
    assert f"{started}, with other content" in done.stderr.splitlines()[-1]
    kept = shared_door.folder / f"kept-{name}"
    (shared_door.folder / name).rename(kept)
    shutil.copytree(shared_door.folder / f"other-{name}", shared_door.folder / name)
    try:
        done = run()
    finally:
        shutil.rmtree(shared_door.folder / name)
        kept.rename(shared_door.folder / name)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "the images have changed since" in last
    assert f"--{option} has others, by name, size or content" in last


def test_older_checkpoints_are_compared_by_what_they_have(run, shared_door):
    """Number and statistics; the options then by their words."""
    (path,) = run.folder.glob("checkpoints/step-*/state.json")
    state = json.loads(path.read_text())
    for group in ("content", "weights"):
        del state["images"][group]
    path.write_text(json.dumps(state))
    assert run().returncode == 0
    shutil.copytree(shared_door.folder / "one", shared_door.folder / "one-3")
    moved = run("--data.train", "flat:one-3")
    assert moved.returncode == 2
    assert "--data.train is 'flat:one-3', but" in moved.stderr
    state["images"]["count"] = 31
    path.write_text(json.dumps(state))
    assert "31 then, 30 now (count)" in run().stderr


# --- a run outlives its terminal ----------------------------------------------------------------

# The process leads a session on a terminal of its own, as in a window or under ssh.
OWN_TERMINAL = """
import os, sys
from ssl_vit import pretrain
from ssl_vit.commands import cli

os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for stream in range(3):
    os.dup2(terminal, stream)
cli.run_door(pretrain.main)
"""


def test_a_closed_terminal_saves_and_stops(door):
    ours, theirs = os.openpty()
    options = ("mae", "--config", "tiny.yaml", "--run.out", "run", "--run.length", "100000st")
    (door.folder / "own.py").write_text(OWN_TERMINAL)
    script = ("own.py", os.ttyname(theirs), *options, "--data.workers", "1")
    process = Fork(script, door.folder, door.env)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not steps(door.folder / "run"):
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)  # the kernel now sends SIGHUP, and writing to the terminal is an error
    process.communicate(timeout=60)
    assert process.returncode == 75
    status = json.loads((door.folder / "run/status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "received SIGHUP")
    (saved,) = (door.folder / "run/checkpoints").glob("step-*")
    assert saved.name == f"step-{status['step']:08d}"
    assert not list((door.folder / "run").glob("run.lock-*"))


# --- images that never come ---------------------------------------------------------------------

STUCK = """
import time
from ssl_vit import pretrain
from ssl_vit.commands import cli
from ssl_vit.data import loader

real = loader.TrainImages.__getitems__

def getitems(self, wanted):
    if wanted[0][0] > 0:  # the second epoch
        time.sleep(600)
    return real(self, wanted)

loader.TrainImages.__getitems__ = getitems
cli.run_door(pretrain.main)
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_stop_does_not_wait_for_images(shared_door, workers):
    """The step is saved, although it was not due; the images of the next never come."""
    (shared_door.folder / "stuck.py").write_text(STUCK)
    out = f"stuck-{workers}"
    options = ("mae", "--config", "tiny.yaml", "--run.out", out, "--data.workers", workers)
    script = ("stuck.py", *options, "--run.save-every", "100st")
    process = Fork(script, shared_door.folder, shared_door.env)
    metrics = shared_door.folder / out / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"step": 11' in metrics.read_text())
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 75, said
    assert "stopped at step 11, saved" in said
    names = [p.name for p in (shared_door.folder / out / "checkpoints").iterdir()]
    assert names == ["step-00000011"]
    assert "Traceback" not in said
