"""Passing folder: one in memory that is there as long as any process uses it.

Each holds a lock on a file in it, which the kernel frees with the process, however that ends: who
gets the lock for itself alone knows that nobody uses the folder. So the last one that leaves
removes it and, of processes that were killed, whoever looks next.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

_LOCK = "users"
# Locks of the folders that this process uses. A forked one shares them, and uses none itself.
_held: dict[Path, int] = {}
os.register_at_fork(after_in_child=_held.clear)


def join(folder: Path) -> None:
    """Use a folder, which is made if it is not there, until :func:`leave` or the end of this
    process.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    while folder not in _held:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # Another process may just remove it: then a new one is made.
        with contextlib.suppress(FileNotFoundError):
            _join(folder)


def _join(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's")
    with _opened(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(lock), (folder / _LOCK).stat()):
            _held[folder] = os.dup(lock)
            atexit.register(leave, folder)


def leave(folder: Path) -> None:
    """Use a folder no longer; the last process to do so removes it."""
    if folder in _held:
        lock = _held.pop(folder)
        _remove_unused(folder, lock)
        os.close(lock)


def remove_abandoned(folder: Path) -> None:
    """Remove a folder, and what is left of it from before, if no process uses it."""
    for place in (folder, *folder.parent.glob(f"{folder.name}.*")):
        with contextlib.suppress(OSError), _opened(place) as lock:
            _remove_unused(place, lock)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


def _remove_unused(folder: Path, lock: int) -> None:
    """Remove a folder if nobody else has its lock, which is freed. It gets another name first, at
    once, so that who looks for it now makes a new one."""
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else another process has removed it, and the folder of this name is a new one.
        if os.path.samestat(os.fstat(lock), (folder / _LOCK).stat()):
            aside = folder.with_name(f"{folder.name.partition('.')[0]}.{uuid.uuid4().hex}")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    # Not by closing alone: a forked process may have the descriptor, too.
    fcntl.flock(lock, fcntl.LOCK_UN)
