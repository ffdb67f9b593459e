"""Killed, stopped, out of disk, not finite: two processes lose nothing and say what went wrong."""

import functools
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.training.run_files import read_rows
from tests.distributed.lives import Life, Lives
from tests.integration.conftest import TINY, TINY_DINO

# Ten lives that are killed make at most two checkpoints each: the eleventh has some left to make.
STEPS, EVERY = 72, 3
QUICK = ("--data.val", "", "--data.holdout", "0", "--run.probe-images", "20")
QUICK += ("--optim.batch-size", "24")
MAE = ("mae", "--config", "mae.yaml", *QUICK)
DINO = ("dino", "--config", "dino.yaml", *QUICK)
LONG = (*MAE, "--run.length", f"{STEPS}st", "--run.save-every", f"{EVERY}st")


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> Lives:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "mae.yaml").write_text(TINY)
    (folder / "dino.yaml").write_text(TINY_DINO)
    return Lives(folder)


@pytest.fixture(scope="module")
def unbroken(lives) -> dict[str, bytes]:
    """What the run that nothing happens to leaves."""
    life = lives.start(*LONG, "--run.out", "unbroken", world=2)
    assert life.wait() == [0, 0], life.said()
    return outcome(lives.folder / "unbroken")


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file of the last checkpoint, and the encoder."""
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    files = [*sorted(last.iterdir()), folder / "encoder.safetensors"]
    assert len(files) == 6
    return {f.name: f.read_bytes() for f in files}


def step_of(folder: Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    return max((row.get("step", 0) for row in read_rows(folder / "metrics.jsonl")), default=0)


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step-*.partial"))


def wait_until(life: Life, holds, seconds: float = 60.0) -> bool:
    """Until it holds; false if the run ended before."""
    deadline = time.monotonic() + seconds
    while not holds():
        if not life.running():
            return False
        assert time.monotonic() < deadline, life.said()
        time.sleep(0.001)
    return True


# --- killed -------------------------------------------------------------------------------------


# Each kind of moment for each of those that can be killed; in a save, whose moments differ most,
# twice. Without its peer a process that is only starting would wait for the launcher to end it.
RANKS = ((0,), (1,), (0, 1))
KILLS = [*((kind, ranks) for kind in ("saving", "saving", "training") for ranks in RANKS)]
KILLS += [("starting", (0, 1))]


def kill(
    lives: Lives, folder: Path, kind: str, ranks: tuple[int, ...], chance: random.Random
) -> tuple[Life, bool]:
    """Start a life, kill these of its processes at a moment of this kind; whether in a save."""
    metrics, whole = folder / "metrics.jsonl", newest(folder)
    before = metrics.stat().st_ino if metrics.is_file() else 0
    life = lives.start(*LONG, "--run.out", folder.name, world=2)
    if kind == "starting":
        moment, most = time.monotonic() + chance.uniform(0.0, 2.0), whole + EVERY
        while time.monotonic() < moment and step_of(folder) < most:
            time.sleep(0.01)
        life.signal(signal.SIGKILL, *ranks)
        return life, False
    # A life begins by clearing up what the one before has left: rows, and half a checkpoint.
    assert wait_until(life, lambda: metrics.is_file() and metrics.stat().st_ino != before)
    if chance.random() < 0.5:  # else steps are so quick that no life would leave a checkpoint
        assert wait_until(life, lambda: newest(folder) > whole), life.said()
    if kind == "saving":
        assert wait_until(life, lambda: saving(folder)), life.said()
        time.sleep(chance.uniform(0.0, 0.03))
    else:
        # Never so far that the run could end.
        target = min(newest(folder) + chance.randint(1, EVERY + 2), STEPS - 2)
        assert wait_until(life, lambda: step_of(folder) >= target), life.said()
        time.sleep(chance.uniform(0.0, 0.02))  # a step or two
    life.signal(signal.SIGKILL, *ranks)
    return life, saving(folder)


def newest(folder: Path) -> int:
    """The step of the last whole checkpoint."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    return int(found[-1].name.removeprefix("step-")) if found else 0


def test_killed_ten_times(lives, unbroken):
    """One process or all, at random moments, a third of them in a save; nothing is lost.

    Those that are left end by themselves, at once, with one line.
    """
    chance, folder = random.Random(5), lives.folder / "killed"
    during, waits, resumed = [], [], 0
    for kind, ranks in chance.sample(KILLS, len(KILLS)):
        life, in_a_save = kill(lives, folder, kind, ranks, chance)
        during.append(in_a_save)
        killed = time.monotonic()
        statuses = life.wait(30)
        waits.append(time.monotonic() - killed)
        resumed += "resuming from" in life.said()
        for rank in (0, 1):
            if rank in ranks:
                assert statuses[rank] == -signal.SIGKILL
            else:
                last = life.said(rank).splitlines()[-1]
                assert statuses[rank] == 1, life.said(rank)
                assert "stopped: another process has exited" in last
                assert "Traceback" not in life.said(rank)
    assert sum(during) >= len(KILLS) / 3, during
    assert max(waits) < 15, waits
    print(f"{sum(during)} of {len(KILLS)} in a save; peers gone after {max(waits):.1f} s")
    assert resumed >= len(KILLS) / 3
    assert EVERY <= newest(folder) < STEPS
    life = lives.start(*LONG, "--run.out", "killed", world=2)
    assert life.wait() == [0, 0], life.said()
    assert outcome(folder) == unbroken
    assert not saving(folder)


# --- not finite ---------------------------------------------------------------------------------

POISONED = 5


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments, as they are."""
    names = {p: n for n, p in trainer.task.named_parameters()}
    state = {k: v.detach().clone() for k, v in trainer.task.state_dict().items()}
    for parameter, own in trainer.optimizer.state.items():
        state |= {f"{names[parameter]}::{k}": v.detach().clone() for k, v in own.items()}
    return {k: v.contiguous() for k, v in state.items()}


def watch_and_poison(out: str, rank: int, gradients: bool) -> None:
    """Write the state around one step; on process 1 its loss is not a number.

    With ``gradients`` neither are they, which then reach process 0 as well; without, nothing but
    what the processes say to each other can tell process 0.
    """
    from ssl_vit.training.loop import Trainer

    real = Trainer.update

    def update(self, parts):
        step = self.step
        if step == POISONED:
            save_file(state_of(self), f"{out}-{rank}-before")
            if rank == 1:
                forward = type(self.task).forward
                type(self.task).forward = lambda *given: poisoned(forward(*given), gradients)
        scalars = real(self, parts)
        if step == POISONED:
            save_file(state_of(self), f"{out}-{rank}-after")
            if rank == 1:
                type(self.task).forward = forward
        if step == POISONED + 1:
            save_file(state_of(self), f"{out}-{rank}-next")
        return scalars

    Trainer.update = update


def poisoned(scalars, gradients: bool):
    nan, loss = float("nan"), scalars["loss"]
    return {**scalars, "loss": loss * nan if gradients else loss + nan}


@pytest.fixture(scope="module")
def poisoned_runs(lives) -> dict[str, Life]:
    runs = {}
    for name, options, gradients in (("mae-nan", MAE, True), ("dino-nan", DINO, False)):
        prepare = {r: functools.partial(watch_and_poison, name, r, gradients) for r in (0, 1)}
        length = ("--run.length", "10st", "--run.out", name)
        runs[name] = lives.start(*options, *length, world=2, prepare=prepare)
        assert runs[name].wait() == [0, 0], runs[name].said()
    return runs


@pytest.mark.parametrize("name", ["mae-nan", "dino-nan"])
def test_nan_in_one_process(lives, poisoned_runs, name):
    """Both skip the step: neither weights nor moments, teacher nor centre move, in either."""
    states = {
        (rank, when): load_file(lives.folder / f"{name}-{rank}-{when}")
        for rank in (0, 1)
        for when in ("before", "after", "next")
    }
    first = states[0, "before"]
    kinds = ["::exp_avg", "::step", *(["center", "teacher"] if "dino" in name else [])]
    for kind in kinds:
        assert any(kind in key for key in first), kind
    for key, value in first.items():
        assert torch.equal(states[1, "before"][key], value), key
        for rank in (0, 1):
            assert torch.equal(states[rank, "after"][key], value), key
        assert torch.equal(states[1, "next"][key], states[0, "next"][key]), key
    for kind in kinds:
        moved = [k for k in first if kind in k and not torch.equal(states[0, "next"][k], first[k])]
        assert moved, f"no {kind} moves in the next step either"
    rows = [r for r in read_rows(lives.folder / name / "metrics.jsonl") if "skipped" in r]
    assert [r["skipped"] for r in rows] == [float(r["step"] == POISONED + 1) for r in rows]
    assert len(rows) == 10


# --- hanging ------------------------------------------------------------------------------------


def hang_at(step: int) -> None:
    from ssl_vit.training.loop import Trainer

    real = Trainer._next

    def stuck_on_a_disk():
        time.sleep(600)

    def next_(self, *given):
        if self.step == step:
            stuck_on_a_disk()
        return real(self, *given)

    Trainer._next = next_


TIMEOUT = 0.15  # minutes


@pytest.fixture(scope="module")
def hung(lives) -> dict[str, tuple[Life, float, int]]:
    """A run whose process 1 is stopped, and one where it hangs: how long the other lasted."""
    options = (*MAE, "--run.length", "4000st", "--run.timeout", str(TIMEOUT))
    lifes = {
        "stopped": lives.start(*options, "--run.out", "stopped", world=2),
        "hangs": lives.start(
            *(*options, "--run.out", "hangs"),
            world=2,
            prepare={1: functools.partial(hang_at, 6)},
        ),
    }
    started = {}
    for name, life in lifes.items():
        assert wait_until(life, lambda name=name: step_of(lives.folder / name) >= 5)
        if name == "stopped":
            life.signal(signal.SIGSTOP, 1)
        started[name] = time.monotonic()
    found = {}
    for name, life in lifes.items():
        life.processes[0].join(60)
        found[name] = life, time.monotonic() - started[name], life.processes[0].exitcode
        life.signal(signal.SIGKILL, 0, 1)
        life.wait()
    return found


def test_a_stopped_process_is_named(hung):
    """By the other, which then leaves: the name comes before the end."""
    life, seconds, status = hung["stopped"]
    assert status == 1, life.said()
    assert seconds < 60 * TIMEOUT + 10
    lines = life.said().splitlines()
    named = [i for i, line in enumerate(lines) if "has not responded since step" in line]
    assert len(named) == 1, life.said()
    assert lines[named[0]].startswith("process 1 (")
    assert "stopped: another process has exited or did not respond in time" in lines[-1]
    assert named[0] < len(lines) - 1


def test_a_process_that_hangs_says_where(hung):
    """With its stack; the other names it, and leaves."""
    life, _, status = hung["hangs"]
    assert status == 1, life.said()
    assert "hangs at step 6, waiting for images" in life.said(1)
    assert "in stuck_on_a_disk\n" in life.said(1)
    assert ", for process 1 (" in life.said(0)
    assert "stopped: another process has exited" in life.said(0).splitlines()[-1]


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def disk(lives):
    """A file system of its own, of 64 MB; ``mount`` changes its size."""
    path = lives.folder / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here (by root only)")
    yield path
    subprocess.run(["umount", path], check=True)


def resize(disk: Path, size: int) -> None:
    options = f"remount,size={size}"
    subprocess.run(["mount", "-o", options, disk], check=True, capture_output=True)


def used(folder: Path) -> int:
    """Bytes of the pages that a folder takes, or a file."""
    files = [folder] if folder.is_file() else [f for f in folder.rglob("*") if f.is_file()]
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in files)


def test_a_full_disk(lives, unbroken, disk):
    """The second checkpoint does not fit: one line, the first is whole; with room it goes on."""
    like = lives.folder / "unbroken"
    checkpoint = used(like / "checkpoints") // 2
    # Before the last step nothing is looked at: of the rest there is the encoder and little more.
    rest = used(like / "encoder.safetensors") + (32 << 10)
    resize(disk, rest + int(1.6 * checkpoint))
    options = (*LONG, "--run.out", "disk/run")
    life = lives.start(*options, world=2)
    assert life.wait() == [1, 1], life.said()
    lines = life.said().splitlines() + life.said(1).splitlines()
    said = [line for line in lines if "cannot be written" in line]
    assert len(said) == 1, lines
    assert "stopped: " in said[0]
    assert "step-00000006" in said[0]
    assert "No space left" in said[0]
    assert "Traceback" not in "".join(lines)
    assert os.listdir(disk / "run" / "checkpoints") == ["step-00000003"]
    resize(disk, 64 << 20)
    again = lives.start(*options, world=2)
    assert again.wait() == [0, 0], again.said()
    assert f"step 3 of {STEPS}" in again.said()
    assert outcome(disk / "run") == unbroken
