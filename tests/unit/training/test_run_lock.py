"""One run in a folder: who is refused, whose lock is taken over, and who must write no more."""

import dataclasses
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_vit.common.errors import UserError
from ssl_vit.common.processes import process_start
from ssl_vit.training import run_lock
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.energy import Energy
from ssl_vit.training.lock_owner import Owner, has_ended, this_process
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.run_files import METRICS_FILE
from ssl_vit.training.run_lock import LockLost, RunLock, is_lock, locked

FIRST = "run.lock-1"
FAR = {"host": "far", "boot": "other"}


def left_by(folder: Path, name: str = FIRST, **changes) -> Path:
    """Lock of an owner that is like this process but for ``changes``."""
    owner = dataclasses.replace(this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(dataclasses.asdict(owner)))
    return folder / name


def old(path: Path) -> Path:
    """Not touched for two minutes."""
    then = time.time() - 120
    os.utime(path, (then, then))
    return path


@pytest.fixture
def lock(tmp_path):
    """A lock that is given back."""
    taken = RunLock(tmp_path / "run")
    yield taken
    taken.release()


# --- held ---------------------------------------------------------------------------------------


def test_the_second_is_refused_with_what_to_do(lock, tmp_path):
    content = lock.path.read_text()
    with pytest.raises(UserError) as told:
        RunLock(tmp_path / "run")
    said = str(told.value)
    for part in ("in use by another run", f"process {os.getpid()} on ", "started 20", "UTC"):
        assert part in said
    assert "another --run.out, or wait until that run has ended, or stop it (kill" in said
    assert "\n" not in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FIRST]
    assert lock.path.read_text() == content
    lock.check()


def test_given_back_it_can_be_taken_again(tmp_path):
    for _ in range(2):
        RunLock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists(), "nothing was written into it"
    (tmp_path / "mine").mkdir()
    RunLock(tmp_path / "mine").release()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_disk_without_hard_links_or_locks_is_enough(tmp_path, monkeypatch):
    """And without renaming: only exclusive creation is used."""
    import fcntl

    for module, name in ((os, "link"), (os, "rename"), (os, "replace"), (fcntl, "flock")):
        monkeypatch.delattr(module, name)
    monkeypatch.delattr(fcntl, "lockf")
    left_by(tmp_path / "run", pid=2**22 + 1)
    RunLock(tmp_path / "run").release()


def test_it_is_renewed_by_the_clock_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT", 0.05)
    lock = RunLock(tmp_path)
    before = old(lock.path).stat().st_mtime
    time.sleep(0.5)
    assert lock.path.stat().st_mtime > before + 100
    assert 0 <= run_lock._age(lock.path, run_lock._look(lock.path)) < 10
    lock.release()


def test_all_processes_are_refused_together(lock, tmp_path):
    with pytest.raises(UserError) as told, locked(tmp_path / "run", main=True):
        raise AssertionError
    assert told.value.everywhere
    with locked(tmp_path / "run", main=False) as none:
        assert none is None


# --- left behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"process_started": 1}])
def test_an_owner_that_ended_here_is_followed_at_once(tmp_path, caplog, changes):
    """Its process is gone, or its number another's."""
    left_by(tmp_path / "run", **changes)
    lock = RunLock(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock-2"]
    assert "has ended, or gives no sign; its run is taken over" in caplog.text
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_can_be_seen_of_an_owner():
    own = this_process()
    assert own.process_started == process_start(os.getpid())
    see = dataclasses.replace
    assert has_ended(own, own) is False
    assert has_ended(see(own, pid=2**22 + 1), own) is True
    for other in ({"host": "far"}, {"boot": "other"}, {"processes_of": 1}):
        assert has_ended(see(own, pid=2**22 + 1, **other), own) is None
    assert has_ended(see(own, process_started=None), own) is None
    assert has_ended(Owner(), own) is None


@pytest.mark.parametrize(
    ("job", "restarts", "ended"),
    [("7", "1", True), ("7", "0", None), ("8", "1", None), ("", "", None)],
)
def test_a_job_that_slurm_starts_again_goes_on(monkeypatch, job, restarts, ended):
    """On whatever machine; another job, or another step of the same start, does not."""
    first = Owner(token="a", host="far", boot="other", pid=5, job="7")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert has_ended(first, this_process()) is ended


def test_a_far_owner_that_is_silent_for_long_is_followed_at_once(tmp_path):
    old(left_by(tmp_path, **FAR))
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started < 5


def test_a_far_owner_that_gives_a_sign_is_not(tmp_path, monkeypatch, caplog):
    """The wait is said once; nothing of the owner's is changed."""
    monkeypatch.setattr(run_lock, "_LOOK", 0.02)
    path = left_by(tmp_path, **FAR)
    content = path.read_text()
    beat = threading.Timer(0.3, lambda: os.utime(path))
    beat.start()
    with pytest.raises(UserError, match=r"in use by another run: process \d+ on far"):
        RunLock(tmp_path)
    beat.join()
    assert caplog.text.count("waiting for a sign of it") == 1
    assert [p.name for p in tmp_path.iterdir()] == [FIRST]
    assert path.read_text() == content


def test_a_far_owner_that_gives_none_is_followed_in_the_end(tmp_path, monkeypatch):
    """Also if its clock, or the disk's, has gone wrong."""
    monkeypatch.setattr(run_lock, "_STALE", 0.5)
    monkeypatch.setattr(run_lock, "_LOOK", 0.02)
    path = left_by(tmp_path, **FAR)
    os.utime(path, (time.time() + 1e6,) * 2)
    lock = RunLock(tmp_path)
    assert not path.exists()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unknown": 1}', "\0" * 100])
def test_a_damaged_lock_is_judged_by_its_age(tmp_path, content):
    left_by(tmp_path).write_text(content)
    old(tmp_path / FIRST)
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_ends_while_it_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_LOOK", 0.02)
    path = left_by(tmp_path, **FAR)
    end = threading.Timer(0.3, path.unlink)
    end.start()
    lock = RunLock(tmp_path)
    end.join()
    assert lock.path.name == FIRST, "it looked again"
    lock.release()


# --- at once ------------------------------------------------------------------------------------


def contend(folder: Path, barrier, found) -> None:
    """Take a lock; all have looked at the folder before any of them makes its file."""
    real, waits = run_lock._create, iter([barrier.wait])

    def create(*given) -> bool:
        next(waits, lambda: None)()
        return real(*given)

    run_lock._create = create
    try:
        lock = RunLock(folder)
    except UserError:
        lock = None
    found.put(lock is not None)
    barrier.wait()  # nobody gives it back before all have tried
    if lock:
        lock.check()
        lock.release()


@pytest.mark.parametrize("before", ["nothing", "a run that was killed", "two that were"])
def test_of_several_at_once_one_wins(tmp_path, before):
    fork, count = multiprocessing.get_context("fork"), 6
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        if before != "nothing":
            left_by(folder, pid=2**22 + 1)
        if before.startswith("two"):
            left_by(folder, "run.lock-2", pid=2**22 + 2)
        barrier, found = fork.Barrier(count), fork.Queue()
        given = (folder, barrier, found)
        processes = [fork.Process(target=contend, args=given) for _ in range(count)]
        for process in processes:
            process.start()
        assert sum(found.get(timeout=30) for _ in processes) == 1
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        assert not folder.exists() or not list(folder.iterdir())


def test_a_lock_that_changes_while_it_is_followed_is_looked_at_again(tmp_path, monkeypatch):
    """The owner was suspended and touches it in the last moment: it keeps the folder."""
    path = old(left_by(tmp_path, **FAR))
    real = run_lock._create

    def late(*given) -> bool:
        os.utime(path)
        return real(*given)

    monkeypatch.setattr(run_lock, "_create", late)
    monkeypatch.setattr(run_lock, "_LOOK", 0.02)
    threading.Timer(1.0, lambda: os.utime(path)).start()
    with pytest.raises(UserError, match="in use by another run"):
        RunLock(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FIRST]


# --- lost ---------------------------------------------------------------------------------------


def suspended(lock: RunLock) -> None:
    """As after a long suspension, in which another run took the folder."""
    lock.renewed -= 120
    lock.path.unlink()
    left_by(lock.path.parent, "run.lock-2", **FAR)


def test_who_was_suspended_notices_before_it_writes(lock):
    lock.check()
    suspended(lock)
    for _ in range(2):
        with pytest.raises(LockLost, match=r"run\.lock-1 is no longer this run's") as told:
            lock.check()
    assert "\n" not in str(told.value)
    lock.release()
    assert [p.name for p in lock.path.parent.iterdir()] == ["run.lock-2"]


def test_a_short_suspension_loses_nothing(lock):
    lock.renewed -= 120
    lock.check()
    assert run_lock._now() - lock.renewed < 5


def test_a_disk_that_is_away_for_a_while_loses_nothing(lock, monkeypatch):
    lock.renewed -= 120
    here = lock.path
    lock.path = Path("/proc/self/mem")  # which can be opened, and not be read
    lock.check()
    lock.path = here
    lock.check()
    assert run_lock._now() - lock.renewed < 5


def test_nothing_is_written_without_the_lock(lock, tmp_path):
    """No checkpoint, no row, no picture."""
    out, alone = tmp_path / "run", Parallel(0, 1, torch.device("cpu"))
    task = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(task.parameters())
    checkpoints = Checkpoints(out / "checkpoints", 2, 0, alone, lock.check)
    energy = Energy(torch.device("cpu"))
    log = RunLog(out, 0, 10, 1, 8, True, energy, guard=lock.check)
    log.pause("saving_s", 1.0)
    log.write(1, {"loss": 1.0}, "train")
    rows = (out / METRICS_FILE).read_text()
    suspended(lock)
    checkpoints.save(1, task, optimizer, {})
    for write in (
        lambda: log.write(2, {"loss": 1.0}, "train"),
        lambda: log.warn(2, "warning"),
        lambda: log.picture(2, "pca", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()),
        lambda: checkpoints.go_on(False, False),
        lambda: checkpoints.go_on(True, False),
        checkpoints.finish,
    ):
        with pytest.raises(LockLost):
            write()
    log.__exit__(LockLost, LockLost("lost"), None)
    assert (out / METRICS_FILE).read_text() == rows
    assert sorted(p.name for p in out.iterdir()) == ["metrics.jsonl", "run.lock-2", "tensorboard"]


# --- moved aside --------------------------------------------------------------------------------


def test_the_lock_follows_into_the_new_folder(lock, tmp_path):
    out, aside = tmp_path / "run", tmp_path / "run-before-1"
    (out / "config.yaml").touch()
    lock.follow(lambda: out.rename(aside))
    assert [p.name for p in aside.iterdir()] == ["config.yaml"]
    assert [p.name for p in out.iterdir()] == [FIRST]
    lock.renewed -= 120
    lock.check()
    with pytest.raises(UserError, match="in use"):
        RunLock(out)


def test_a_folder_with_a_living_run_inside_is_not_moved(lock, tmp_path):
    """Fine-tuning has its folder inside the encoder's run."""
    inside = RunLock(tmp_path / "run" / "finetune")
    with pytest.raises(UserError, match=r"run/finetune is in use by another run"):
        lock.follow(lambda: pytest.fail("it was moved"))
    inside.release()
    lock.check()


def test_names(tmp_path):
    assert is_lock(tmp_path / FIRST)
    assert not is_lock(tmp_path / "config.yaml")
