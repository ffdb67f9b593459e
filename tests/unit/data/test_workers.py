"""Data workers that fail, die or have no room: one line for each, and none stays behind."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.data import shared_memory, workers
from ssl_vit.data.base import Source
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.shared_memory import affordable, pinnable, shm_size
from ssl_vit.data.workers import load
from tests.conftest import ROOT

MIB = 1 << 20


class Noise(Source):
    """Images of noise, read slowly, all but the first at this pace; the last one has an error."""

    spec = "noise"

    def __init__(self, n: int, error: Exception | None = None, seconds: float = 0.01) -> None:
        self.n, self.error, self.seconds = n, error, seconds

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> tuple[np.ndarray, None]:
        time.sleep(self.seconds if i >= 4 else 0)
        if self.error and i == self.n - 1:
            raise self.error
        return np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8), None

    def name(self, i: int) -> str:
        return f"noise-{i}"


def batches(source: Source, count: int = 2):
    return eval_batches(EvalImages(source, (8, 8), 1.0, 3), 4, count, pin=False)


# --- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "workers", "ahead"),
    [(616, 16, 1), (128, 16, 4), (256, 16, 4), (257, 16, 3), (9999, 16, 1), (9, 0, 4), (0, 2, 4)],
)
def test_pinned_memory_is_bounded_by_bytes(batch, workers, ahead):
    """An eighth of 128 GiB; one batch of each worker at least."""
    assert pinnable(batch * MIB, workers, 4, memory=128 << 30) == ahead


def test_pinned_memory_is_the_containers(monkeypatch):
    monkeypatch.setattr(shared_memory, "memory_here", lambda: 8 << 30)
    assert pinnable(256 * MIB, 2, 4) == 2


def test_each_tensor_is_rounded_up_to_a_power_of_two(monkeypatch):
    """Of 3 images of 8 x 8 x 3 the pixels: 576 bytes. Their sum alone would be rounded less."""
    asked = []
    monkeypatch.setattr(
        workers, "pinnable", lambda size, count, prefetch: asked.append(size) or prefetch
    )
    images = EvalImages(Noise(8), (8, 8), 1.0, 3)
    list(load(images, [[0, 1, 2]], 1, pin=True))
    views = images.__getitems__([0, 1, 2]).views
    sizes = [tensor.nbytes for tensor in views.tensors()]
    assert views.crops[0].nbytes == 576
    assert asked == [sum(2 ** math.ceil(math.log2(size)) for size in sizes if size)]
    assert asked[0] > 2 ** math.ceil(math.log2(sum(sizes)))


@pytest.mark.parametrize(("pin", "ahead"), [(True, 1), (False, 4)])
def test_batches_that_are_pinned_are_fewer(pin, ahead, monkeypatch):
    asked = []

    def no_room(size: int, count: int, prefetch: int, held: int) -> int:
        asked.append(prefetch)
        raise RunFailed("no room")

    monkeypatch.setattr(workers, "affordable", no_room)
    monkeypatch.setattr(workers, "pinnable", lambda size, count, prefetch: 1)
    images = EvalImages(Noise(8), (8, 8), 1.0, 3)
    with pytest.raises(RunFailed, match="no room"):
        next(load(images, [[0, 1], [2, 3]], 2, pin, prefetch=4))
    assert asked == [ahead]


def with_room(monkeypatch, free: int, total: int = 64 * MIB) -> None:
    monkeypatch.setattr(shared_memory, "room", lambda: (free, total))


@pytest.mark.parametrize(
    ("free", "processes", "ahead"),
    [(100, 1, 4), (99, 1, 3), (40, 1, 1), (31, 1, 1), (400, 4, 4), (399, 4, 3)],
)
def test_as_many_batches_are_prepared_as_there_is_room_for(monkeypatch, free, processes, ahead):
    """Of 10 MiB, two workers and two batches held: 4 each take 100 MiB, in each process."""
    with_room(monkeypatch, free * MIB, 1000 * MIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert affordable(10 * MIB, workers=2, prefetch=4) == ahead


def test_fewer_are_said(monkeypatch, caplog):
    with_room(monkeypatch, 64 * MIB)
    assert affordable(10 * MIB, workers=2, prefetch=4) == 2
    assert "/dev/shm holds few batches of 10 MiB (64 MiB free of 64 MiB)" in caplog.text
    assert "each of 2 data workers prepares 2 ahead, not 4" in caplog.text
    caplog.clear()
    with_room(monkeypatch, 640 * MIB)
    affordable(10 * MIB, workers=2, prefetch=4)
    assert not caplog.text


def test_without_room_for_one_of_each_worker_the_first_batch_is_an_error(monkeypatch):
    """In one line, with the remedy; no worker is started."""
    with_room(monkeypatch, 0)
    found = batches(Noise(8))
    assert not multiprocessing.active_children()
    with pytest.raises(RunFailed, match=r"^/dev/shm is too small") as told:
        next(found)
    for part in ("0.0 MiB free of 64 MiB", "--shm-size=1g", "--ipc=host", "--data.workers 0"):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_unknown_sizes_are_no_reason(monkeypatch):
    with_room(monkeypatch, 0)
    assert affordable(0, workers=2, prefetch=4) == 4
    with_room(monkeypatch, 0, 0)
    assert affordable(10 * MIB, workers=2, prefetch=4) == 4

    def none() -> tuple[int, int]:
        raise FileNotFoundError

    monkeypatch.setattr(shared_memory, "room", none)
    assert affordable(10 * MIB, workers=2, prefetch=4) == 4


def test_sizes_for_docker():
    assert [shm_size(n * MIB) for n in (1, 400, 600, 5000)] == ["1g", "1g", "2g", "16g"]


# Shared memory of its own, of 1 MiB; the size of a batch is not known before.
FULL = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)
from ssl_vit.common.errors import RunFailed
from ssl_vit.data import workers
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.sources import open_source
workers._batch_bytes = lambda *_: (0, 0)
images = EvalImages(open_source("digits"), (224, 224), 1.0, 3)
try:
    print(len(list(eval_batches(images, 10, 1, False))))
except RunFailed as error:
    print(error)
"""


def test_full_shared_memory_is_an_error_not_a_wait():
    command = ["unshare", "-m", sys.executable, "-c", FULL]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here (by root only)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a batch does not fit into /dev/shm (1.0 MiB free of 1.0 MiB): ")
    assert "No space left on device" in done.stdout
    assert "docker run --shm-size" in done.stdout


# --- death --------------------------------------------------------------------------------------


def test_a_killed_worker_is_named_with_the_likely_cause():
    """Found by the wait for a batch, within seconds; the others end too."""
    before = signal.getsignal(signal.SIGCHLD)
    found = batches(Noise(4000))
    next(found)
    assert signal.getsignal(signal.SIGCHLD) == before, "the death would be an error anywhere"
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"killed by SIGKILL, most likely for want of memory") as e:
        list(found)
    assert f"process {victim.pid}" in str(e.value)
    assert "fewer --data.workers (there were 2)" in str(e.value)
    assert e.value.__suppress_context__
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (-signal.SIGBUS, ("SIGBUS", "/dev/shm is full", "--shm-size", "--data.workers 0")),
        (-signal.SIGSEGV, ("SIGSEGV", "decodes images", "--data.workers 0")),
        (3, ("ended by itself with status 3",)),
    ],
)
def test_other_deaths(status, parts):
    said = workers._of_death(123, status, 4)
    assert "\n" not in said
    assert all(part in said for part in ("process 123", *parts))


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lacks memory"),
        (MemoryError(), "lacks memory"),
    ],
)
def test_other_wants(error, part):
    assert part in workers._cause(error, [])
    assert workers._cause(RuntimeError("a mistake of ours"), []) == ""


# --- errors -------------------------------------------------------------------------------------


def test_a_users_mistake_comes_without_the_workers_traceback():
    with pytest.raises(UserError) as told:
        list(batches(Noise(8, UserError("no such thing"))))
    assert str(told.value) == "no such thing"
    assert not multiprocessing.active_children()


def test_a_mistake_of_ours_keeps_the_workers_traceback():
    with pytest.raises(ZeroDivisionError, match="in read"):
        list(batches(Noise(8, ZeroDivisionError("of ours"))))


def test_workers_end_when_nobody_wants_more():
    """At once, although they heed no SIGTERM and are at work."""
    found = batches(Noise(4000, seconds=60))
    next(found)
    assert len(multiprocessing.active_children()) == 2
    started = time.monotonic()
    del found
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 2


class Singles(Dataset):
    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((3,), i)


@pytest.mark.parametrize("count", [0, 2])
def test_single_images_are_collated(count):
    """As benchmarks do with the transforms of others."""
    found = load(Singles(), [[0, 1], [2, 3], [4]], count, pin=False, collate=torch.stack)
    assert [batch[:, 0].tolist() for batch in found] == [[0, 1], [2, 3], [4]]
