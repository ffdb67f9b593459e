"""Run lock: one run at a time in a run folder, also from other machines and containers.

A lock is a file, ``run.lock-1``, made by exclusive creation, which is atomic on any disk. Its owner
touches it every few seconds. A lock whose owner has ended is not removed by those who want the
folder, as two of them could remove each other's; they make the next number, ``run.lock-2``, which
one of them can. That one looks again whether nothing has changed, and then removes the old files.
Whose file is gone has lost the folder, and writes nothing more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ssl_vit.common.distributed import gather_texts
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.training.lock_owner import Owner, has_ended, this_process

log = logging.getLogger("ssl_vit")
_NAME, _ANY = "run.lock-{}", "run.lock-*"
# Seconds between two touches, and without one until a lock counts as left: a busy network disk may
# take its time.
_BEAT, _STALE = 5.0, 60.0
_LOOK = 0.5


class LockLost(RunFailed):
    """Lost lock: the run folder is no longer this run's; nothing may be written into it."""


class _Seen(NamedTuple):
    """Lock file as it was seen: its content, and when it was last touched, in nanoseconds."""

    text: str
    touched: int


class RunLock:
    """Lock on a run folder, held by this process and renewed by a thread until ``release``."""

    def __init__(self, folder: Path) -> None:
        """Take the lock of a folder, which is made if it is not there.

        Raises:
            UserError: another run uses the folder.
            OSError: the lock cannot be written.
        """
        self._made = not folder.exists()
        self.path, self.text = _take(folder)
        self.lost, self.renewed = False, _now()
        self._changing, self._left = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Check that the lock is still this process'; costs nothing while it is renewed in time.

        Raises:
            LockLost: it is not, for this process was suspended for long.
        """
        if not self.lost and _now() - self.renewed > _STALE / 2:
            self._renew()
        if self.lost:
            raise LockLost(
                f"{self.path} is no longer this run's: another run has taken the folder (this one "
                "was suspended), or it was moved or deleted. Nothing more is written there"
            )

    def follow(self, move: Callable[[], Path]) -> None:
        """Move the folder's content away by ``move``, which renames the folder and returns its new
        path, and take the lock of the empty one.

        Raises:
            UserError: another run was faster, or one uses a folder inside.
        """
        folder = self.path.parent
        for inside in folder.rglob(_ANY):
            if inside.parent != folder and (seen := _look(inside)):
                _wait_for_end(inside, seen, this_process())
        with self._changing:
            (move() / self.path.name).unlink()
            self.path, self.text = _take(folder)

    def release(self) -> None:
        """Give the folder back."""
        self._left.set()
        with self._changing, contextlib.suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self.text:
                self.path.unlink()
                if self._made:
                    self.path.parent.rmdir()  # if nothing was written into it

    def _keep(self) -> None:
        while not self._left.wait(_BEAT):
            self._renew()

    def _renew(self) -> None:
        with self._changing:
            try:
                if self.path.read_text(encoding="utf-8") != self.text:
                    self.lost = True
                else:
                    os.utime(self.path)
                    self.renewed = _now()
            except FileNotFoundError:
                self.lost = not self._left.is_set()
            except OSError as error:  # the disk may be back at the next touch
                log.debug("%s cannot be renewed: %s", self.path, error)


@contextmanager
def locked(folder: Path, main: bool) -> Iterator[RunLock | None]:
    """Context manager in which this run has its folder for itself. All processes must call it.

    Yields the lock in the main process, which holds it.

    Raises:
        UserError: another run uses the folder.
    """
    lock, refusal = None, ""
    if main:
        try:
            lock = RunLock(folder)
        except UserError as error:
            refusal = str(error)
    try:
        if refusal := gather_texts(refusal)[0]:
            raise UserError(refusal, everywhere=True)
        yield lock
    finally:
        if lock:
            lock.release()


def is_lock(path: Path) -> bool:
    """True for a lock file."""
    return path.match(_ANY)


# --- taking -------------------------------------------------------------------------------------


def _take(folder: Path) -> tuple[Path, str]:
    """Make a lock in a folder, after those of owners that have ended; its path and content."""
    own = this_process()
    text = json.dumps(dataclasses.asdict(own), indent=1) + "\n"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        before = _locks(folder)
        for number, seen in before.items():
            _wait_for_end(folder / _NAME.format(number), seen, own)
        path = folder / _NAME.format(max(before, default=0) + 1)
        if not _create(path, text):
            continue  # another was faster, who will refuse
        after = _locks(folder)
        after.pop(int(path.suffix.rpartition("-")[2]), None)
        if after == before:
            for number, seen in before.items():
                log.warning("%s has ended, or gives no sign; its run is taken over", _owner(seen))
                (folder / _NAME.format(number)).unlink(missing_ok=True)
            return path, text
        path.unlink(missing_ok=True)  # something has changed meanwhile: look again
        time.sleep(random.SystemRandom().uniform(0.1, 0.5))


def _create(path: Path, text: str) -> bool:
    """Create a file that is not there yet; false if it is, or its folder is not."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except (FileExistsError, FileNotFoundError):  # the latter: the folder was just removed
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _wait_for_end(path: Path, seen: _Seen, own: Owner) -> None:
    """Return if the owner of a lock has ended; also when the lock has changed, to look again.

    Raises:
        UserError: it lives.
    """
    owner = _owner(seen)
    ended, began = has_ended(owner, own), _now()
    if ended is None and (left := _STALE - _age(path, seen)) > 0:
        log.warning(
            "%s is of %s, which cannot be seen from here: waiting for a sign of it, for at most "
            "%.0f s",
            *(path, owner, min(left, _STALE)),
        )
        while ended is None and _now() - began < min(left, _STALE):
            time.sleep(_LOOK)
            now = _look(path)
            if now is None or now.text != seen.text:
                return
            ended = False if now.touched != seen.touched else None
    if ended is False:
        stop = f" (kill {owner.pid})" if has_ended(owner, own) is False else ""
        raise UserError(
            f"{path.parent} is in use by another run: {owner}. Give another --run.out, or wait "
            f"until that run has ended, or stop it{stop}"
        )


# --- lock files ---------------------------------------------------------------------------------


def _locks(folder: Path) -> dict[int, _Seen]:
    """Lock files of a folder by number."""
    found = {}
    for path in folder.glob(_ANY):
        number = re.fullmatch(r"run\.lock-(\d+)", path.name)
        if number and (seen := _look(path)):
            found[int(number[1])] = seen
    return found


def _look(path: Path) -> _Seen | None:
    """A lock file as it is; None if there is none. It is opened, as network disks then ask anew."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None
    except PermissionError:
        return _Seen("", path.stat().st_mtime_ns)


def _owner(seen: _Seen) -> Owner:
    """Owner of a lock; unknown if it is damaged, or not yet written."""
    try:
        return Owner(**json.loads(seen.text))
    except (ValueError, TypeError, RecursionError):
        return Owner()


def _age(path: Path, seen: _Seen) -> float:
    """Seconds since a lock was touched, by the clock of its disk: those of machines differ."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as probe:
        os.utime(probe.name)
        return (os.stat(probe.name).st_mtime_ns - seen.touched) / 1e9


def _now() -> float:
    """Seconds of a clock that also counts while the machine is suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)
