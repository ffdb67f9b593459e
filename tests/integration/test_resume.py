"""Stopped in any way and started again, a run ends with the weights of one never stopped."""

import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.forks import Fork
from tests.integration.conftest import KILLER, outcome

# A quarter of the images, and as many steps an epoch; for runs that nobody has to hit in time.
FEW = ("--data.train", "digits:val", "--optim.batch-size", "30")


@pytest.fixture(scope="module")
def unbroken_few(shared_door):
    """The same of a run on few images."""
    result = shared_door.pretrain("--run.out", "unbroken-few", *FEW)
    assert result.returncode == 0, result.stderr
    return outcome(shared_door.folder / "unbroken-few")


@pytest.fixture(scope="module")
def unbroken(shared_door):
    """The weights of the run that nobody stopped."""
    result = shared_door.pretrain("--run.out", "unbroken")
    assert result.returncode == 0, result.stderr
    return outcome(shared_door.folder / "unbroken")


@pytest.mark.parametrize(
    ("moment", "resumes_at"),
    [("mid-epoch", 8), ("mid-checkpoint", 8), ("before-encoder", 8), ("before-its-name", 8)],
)
def test_killed(shared_door, unbroken_few, moment, resumes_at):
    (shared_door.folder / "killer.py").write_text(KILLER)
    options = ("mae", "--config", "tiny.yaml", "--run.out", moment, *FEW)
    killed = shared_door("killer.py", moment, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = shared_door.folder / moment
    assert not (folder / "checkpoints" / "step-00000024").exists()
    again = shared_door.pretrain("--run.out", moment, *FEW)
    assert again.returncode == 0, again.stderr
    assert f"step {resumes_at} of 24" in again.stderr
    assert ("incomplete checkpoint; removed" in again.stderr) == (moment != "mid-epoch")
    assert outcome(folder) == unbroken_few
    steps = [line.split(",")[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [s for s in steps if s]
    # The last has a probe, and the seconds that it and saving took.
    assert len(trained) == len(set(trained)) + 2, "a step is logged twice"


def wait_for(condition):
    """Until it holds, at most two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signalled(shared_door, unbroken, number):
    """Saved at the step it was stopped at, with the command that goes on; then the same weights."""
    out = f"signal-{int(number)}"
    process = shared_door.start("--run.out", out, "--data.workers", "1")
    metrics = shared_door.folder / out / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 75), said
    stopped = int(said.split("stopped at step ")[1].split(",")[0])
    assert 0 < stopped < 24
    command = said.split("resume with: ")[1].split("\n")[0].split()
    assert command[0] == "python"
    again = shared_door(*command[1:])
    assert again.returncode == 0, again.stderr
    assert f"step {stopped} of 24" in again.stderr
    assert outcome(shared_door.folder / out)[:2] == unbroken[:2]


def test_started_anew_keeps_the_old_run(door):
    """And going on with the new one does not start anew again."""
    for _ in range(2):
        result = door.pretrain("--run.out", "run", "--run.length", "2st", "--run.resume", "never")
        assert result.returncode == 0, result.stderr
    assert (door.folder / "run-before-1" / "encoder.safetensors").is_file()
    assert (door.folder / "run" / "encoder.safetensors").is_file()
    again = door("-m", "ssl_vit.pretrain", "mae", "--config", "run/config.yaml")
    assert "step 2 of 2" in again.stderr
    assert not (door.folder / "run-before-2").exists()


def test_only_a_run_is_moved_aside(door):
    (door.folder / "data").mkdir()
    (door.folder / "data" / "precious.txt").write_text("mine")
    result = door.pretrain("--run.out", "data", "--run.resume", "never")
    assert result.returncode == 2
    assert "holds files but no run" in result.stderr
    assert (door.folder / "data" / "precious.txt").is_file()


def test_changed_images_are_noticed(door):
    """Going on with other images would be neither the old run nor a new one."""
    rng = np.random.default_rng(0)
    folder = door.folder / "images"
    folder.mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)).save(folder / f"{i}.png")
    options = ("--data.train", "flat:images", "--data.val", "", "--run.out", "run")
    options += ("--optim.batch-size", "9", "--run.length", "8st")
    first = door.pretrain(*options)
    assert first.returncode == 0, first.stderr
    (folder / "7.png").unlink()
    (folder / "8.png").unlink()
    again = door.pretrain(*options)
    assert again.returncode == 2
    assert "the images have changed" in again.stderr.splitlines()[-1]


def test_probes_do_not_delay_a_stop(shared_door, unbroken):
    """A stopped run saves and leaves; its pictures wait for the end."""
    process = shared_door.start("--run.out", "quick", "--data.workers", "1")
    metrics = shared_door.folder / "quick" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert not (shared_door.folder / "quick" / "reconstruction.png").exists()


LONG_PROBE = """
import time
from pathlib import Path
from ssl_vit.commands import cli, pretraining as session
from ssl_vit import pretrain

def probe(self, whole, step, log):
    Path("probing").touch()
    time.sleep(100)

session.Pretraining.probe = probe
cli.run_door(pretrain.main)
"""


def test_a_probe_is_interrupted_by_a_stop(shared_door, unbroken_few):
    """What was saved before it counts already; the run saves and leaves, and ends as any other."""
    (shared_door.folder / "long_probe.py").write_text(LONG_PROBE)
    options = ("mae", "--config", "tiny.yaml", "--run.out", "long", *FEW)
    script = ("long_probe.py", *options, "--run.probe-every", "8st")
    process = Fork(script, shared_door.folder, shared_door.env)
    wait_for((shared_door.folder / "probing").exists)
    assert (shared_door.folder / "long/checkpoints/step-00000008/state.json").is_file()
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=50)
    assert process.returncode == 75, said
    assert "the probe of the encoder is interrupted" in said
    assert "stopped at step 8, saved" in said
    again = shared_door.pretrain("--run.out", "long", *FEW)
    assert again.returncode == 0, again.stderr
    assert "step 8 of 24" in again.stderr
    assert outcome(shared_door.folder / "long") == unbroken_few


def test_from_another_runs_checkpoint(shared_door, unbroken_few):
    """--run.resume PATH starts where that checkpoint ends, in a folder of its own."""
    path = "unbroken-few/checkpoints/step-00000016"
    result = shared_door.pretrain("--run.out", "branch", *FEW, "--run.resume", path)
    assert result.returncode == 0, result.stderr
    assert outcome(shared_door.folder / "branch") == unbroken_few


FULL_DISK = """
import resource, sys
from ssl_vit.commands import cli
from ssl_vit import pretrain

# Files may not grow beyond this: what a full disk does to a write, for one process.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
cli.run_door(pretrain.main)
"""


def test_full_disk(shared_door, unbroken_few):
    """One line, status 1, the checkpoint before it whole; with room again, the same weights."""
    (shared_door.folder / "full.py").write_text(FULL_DISK)
    options = ("mae", "--config", "tiny.yaml", "--run.out", "full", *FEW)
    folder = shared_door.folder / "full"
    shutil.copytree(shared_door.folder / "unbroken-few", folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    result = shared_door("full.py", "60000", *options)
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("stopped: checkpoint")
    assert "Traceback" not in result.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000016"]
    assert shared_door.pretrain("--run.out", "full", *FEW).returncode == 0
    assert outcome(folder) == unbroken_few
