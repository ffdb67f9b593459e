"""Image cache in memory: shared by processes, bounded, and gone with the last one of them."""

import fcntl
import itertools
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig
from ssl_vit.data import cache as caches
from ssl_vit.data import passing_folder
from ssl_vit.data.cache import ImageCache, RamCache, open_cache
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.order import Order
from ssl_vit.data.sources import open_source
from tests.unit.data.test_cache import FORK, SPEC, assert_same, batches, folder, opened, stored

IMAGE = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)


@pytest.fixture
def shm(tmp_path, monkeypatch) -> Path:
    """What stands for the machine's file system in memory: nobody else is in it."""
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(caches, "SHARED_MEMORY", str(place))
    return place


def ram(reserve: float = 0.0) -> RamCache:
    return RamCache("ram", reserve)


def never() -> torch.Tensor:
    raise AssertionError("was decoded again")


def joined() -> RamCache:
    made = ram()
    made.prepare()
    return made


def child(job):
    """A forked process that does a job, and then only what it is told to."""
    process = FORK.Process(target=job, daemon=True)
    process.start()
    return process


def test_processes_share_it_and_the_last_one_removes_it(shm):
    seen, go = FORK.Event(), FORK.Event()
    own = joined()
    assert torch.equal(own.image(b"0", "", lambda: IMAGE), IMAGE)

    def other() -> None:
        mine = joined()
        assert torch.equal(mine.image(b"0", "", never), IMAGE)
        seen.set()
        go.wait(20)
        mine.release()

    process = child(other)
    assert seen.wait(20)
    own.release()
    own.release()
    assert torch.equal(own.image(b"0", "", never), IMAGE), "the other one still uses it"
    go.set()
    process.join(20)
    assert process.exitcode == 0
    assert list(shm.iterdir()) == []


def test_a_process_that_was_forked_takes_nothing_from_its_parent(shm):
    own = joined()
    own.image(b"0", "", lambda: IMAGE)
    process = child(own.release)
    process.join(20)
    assert torch.equal(own.image(b"0", "", never), IMAGE)
    own.release()
    assert list(shm.iterdir()) == []


def test_a_forked_process_does_not_keep_it_when_its_parent_leaves(shm):
    """As a data worker, which may end later than its parent and another process that uses it."""
    seen, go, end = FORK.Event(), FORK.Event(), FORK.Event()

    def other() -> None:
        mine = joined()
        seen.set()
        go.wait(20)
        mine.release()

    process = child(other)
    assert seen.wait(20)
    own = joined()
    worker = child(lambda: end.wait(20))
    own.release()
    go.set()
    process.join(20)
    assert worker.is_alive()
    assert list(shm.iterdir()) == []
    end.set()
    worker.join(20)


def test_what_a_killed_process_left_is_removed_by_the_next_one(shm):
    def killed() -> None:
        joined().image(b"0", "", lambda: IMAGE)
        os.kill(os.getpid(), signal.SIGKILL)

    process = child(killed)
    process.join(20)
    half_removed = shm / f"ssl_vit-{os.getuid()}.abc" / "decoded-images"
    half_removed.mkdir(parents=True)
    assert len(stored(ram())) == 1
    assert open_cache(DataConfig(cache="ram")) is not None
    assert list(shm.iterdir()) == []
    own = joined()
    own.image(b"0", "", lambda: IMAGE)
    assert open_cache(DataConfig(cache="ram")) is not None
    assert torch.equal(own.image(b"0", "", never), IMAGE), "in use, and not removed"
    own.release()


def test_who_comes_while_it_is_removed_gets_another_one(shm):
    place = shm / "ssl_vit"
    place.mkdir()
    with (place / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        process = child(lambda: (passing_folder.join(place), (place / "mine").touch()))
        time.sleep(0.5)  # it waits for the lock by now
        place.rename(shm / "removed")
        fcntl.flock(users, fcntl.LOCK_UN)
    process.join(20)
    assert process.exitcode == 0
    assert (place / "mine").exists()


def test_processes_that_come_and_go_never_miss_what_they_use(shm):
    place = shm / "ssl_vit"

    def come_and_go() -> None:
        for i in range(60):
            passing_folder.join(place)
            file = place / f"{os.getpid()}-{i}"
            file.touch()
            passing_folder.remove_abandoned(place)
            assert file.exists()
            passing_folder.leave(place)

    processes = [child(come_and_go) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(shm.iterdir()) == []


def test_batches_are_those_without_it_and_it_goes_with_the_last(shm, tmp_path):
    spec = folder(tmp_path / "images")
    cache = ram()
    seen = []
    cache.release = lambda: (seen.extend(stored(cache)), RamCache.release(cache))
    assert_same(batches(spec, cache, workers=2), batches(spec, None))
    assert len([file for file in seen if file.name != "users"]) == 12
    assert list(shm.iterdir()) == []


def test_it_goes_with_a_training_that_is_stopped_early(shm, tmp_path):
    spec = folder(tmp_path / "images")
    source = open_source(spec)
    images = TrainImages(source, SPEC, 3, seed=1, cache=ram())
    endless = train_batches(images, Order(len(source), 6, 1), 0, 10**6, 0, pin=False)
    assert len(list(itertools.islice(endless, 2))) == 2
    assert len(list(shm.iterdir())) == 1
    endless.close()
    assert list(shm.iterdir()) == []


def test_batches_keep_their_room_in_it(shm, tmp_path):
    """Of workers, which hand them over there; on a disk elsewhere none is kept."""
    spec = folder(tmp_path / "images")
    cache, kinds = ram(), [24 * 24, 2 * 16 * 12]
    batches(spec, cache, workers=2)
    assert cache.reserve >= 2 * 6 * 3 * sum(kinds)
    alone = ram()
    batches(spec, alone)
    assert alone.reserve == 0


def test_half_of_the_memory_stays_free_where_that_is_less(shm, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "free_memory_here", lambda: 3e6)
    spec = folder(tmp_path / "images")
    images = opened(spec, Path("ram"))
    assert images.cache == ram(1.5e6)
    assert images.about()[-1] == (
        "cache",
        "ram: 13 decoded images take about 0.0874 MB; 3 MB are free in memory, 1.5 MB stay so",
    )
    assert opened(spec, Path("ram"), cache_reserve=0.001).cache == ram(1e6)
    text = ram(1.5e6).about(1000, 6e3)
    assert text.endswith(
        "about 6 MB; 3 MB are free in memory, 1.5 MB stay so: room for 25 % of them"
    )
    assert list(shm.iterdir()) == []


def test_too_little_memory_is_said_once_and_stops_nothing(shm, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(caches, "free_memory_here", lambda: 3e6)
    spec = folder(tmp_path / "images")
    assert_same(batches(spec, ram(2.999e6), workers=2), batches(spec, None))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith(
        "--data.cache ram takes no more images (3 MB are free in memory, and "
    )


def test_a_system_without_it_is_told_so(shm):
    shm.rmdir()
    with pytest.raises(UserError) as refusal:
        open_cache(DataConfig(cache="ram"))
    said = f"--data.cache is 'ram'; this system has no {shm}: give a folder"
    assert str(refusal.value) == said


def test_a_place_of_somebody_else_is_refused(shm, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (shm / f"ssl_vit-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"^--data\.cache is 'ram': .* is another user's; give a fo"
    ):
        ram().prepare()


def test_a_folder_of_that_name_can_be_named(shm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = open_cache(DataConfig(cache="./ram"))
    assert type(found) is ImageCache
    found.prepare()
    assert (tmp_path / "ram" / "decoded-images").is_dir()


def test_a_folder_that_took_the_place_of_another_stays(tmp_path):
    """Who still looks at the old one when its last process leaves does not remove the new one."""
    folder = tmp_path / "images"
    passing_folder.join(folder)
    with passing_folder._opened(folder) as lock:
        passing_folder.leave(folder)
        passing_folder.join(folder)
        passing_folder._remove_unused(folder, lock)
    assert folder.is_dir()
    passing_folder.leave(folder)
    assert not list(tmp_path.iterdir())
