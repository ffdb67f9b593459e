"""Shard cache: shards of the network on a disk of this machine, shared by all processes and runs.

A shard is fetched by one process, under a lock, while others wait or fetch other ones. It is
complete or absent: an interrupted download stays aside, and goes on where it ended. Where room is
wanted, the shards that were not used for longest are removed. Their indexes, which are small, stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.files import cache_folder
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.remote import NoRanges, RemoteFile, patiently
from ssl_vit.data.tar_index import INDEX_SUFFIX

_FOLDER, _LOCKS, _PARTIAL = "shards", "locks", ".partial"
_GB = 1e9
# Time of change of every cached shard, in ns: its index stays valid when it is fetched again.
CHANGED = 1_000_000_000 * 10**9
_POLL = 0.2  # seconds


class _Entry(NamedTuple):
    """A file of the cache: a shard, or one on its way, which will have ``size`` bytes."""

    used: float
    size: int
    path: Path
    there: int
    partial: bool


@dataclass
class ShardCache:
    """Shard cache in a folder, of at most ``limit`` bytes; ``reserve`` stay free on its disk."""

    folder: Path
    limit: float
    reserve: float
    stop: threading.Event = field(default_factory=threading.Event, compare=False)

    def path(self, file: RemoteFile) -> Path:
        """Path of a shard in the cache, whether it is there or not."""
        stem = file.url.rpartition("/")[2].removesuffix(".tar")[:40]
        return self.folder / f"{stem}-{file.digest}.tar"

    def has(self, file: RemoteFile) -> bool:
        """True if a shard is there."""
        try:
            return self.path(file).stat().st_size == file.size
        except FileNotFoundError:
            return False

    def fetch(self, file: RemoteFile, wait: bool = True) -> Path | None:
        """The path of a shard, which is downloaded if it is not there.

        ``wait``: for another process that downloads it; if not, None is returned.

        Raises:
            UserError: the cache is too small for it, or the server refuses it.
            RunFailed: the connection is lost for good, or the shard was changed.
        """
        path = self.path(file)
        if self.has(file):
            return path
        with self._locked(path.name, wait) as mine:
            if not mine:
                return None
            if not self.has(file):
                partial = self.folder / f"{path.name}.{file.size}{_PARTIAL}"
                self._make_room(partial, file)
                self._download(file, partial)
                partial.replace(path)
        return path

    def changed(self, file: RemoteFile) -> bool:
        """True if another version of a shard was fetched before, and not this one."""
        address, version = file.digest.split("-")
        known = [path.name for path in self.folder.glob(f"*-{address}-*.tar*{INDEX_SUFFIX}")]
        return bool(known) and not any(f"-{version}.tar" in name for name in known)

    def room(self) -> float:
        """Bytes of shards that it can hold at most."""
        used = sum(entry.there for entry in self._entries())
        return min(self.limit, used + shutil.disk_usage(self.folder).free - self.reserve)

    def _download(self, file: RemoteFile, partial: Path) -> None:
        """Download a shard, or what is left of it."""
        with partial.open("r+b") as out:
            try:
                for data in file.chunks(out.seek(0, os.SEEK_END), self._pause):
                    self._write(out, data)
            except NoRanges:  # from the beginning, also after a lost connection
                patiently(lambda: self._whole(file, out), file.url, pause=self._pause)
            file.check_unchanged()
            out.flush()
            os.fsync(out.fileno())
        os.utime(partial, ns=(time.time_ns(), CHANGED))

    def _whole(self, file: RemoteFile, out: BinaryIO) -> None:
        out.seek(0)
        out.truncate()
        for data in file.stream():
            self._write(out, data)
        if out.tell() != file.size:
            raise EOFError(f"{out.tell():,} of {file.size:,} bytes arrived")

    def _write(self, out: BinaryIO, data: bytes) -> None:
        if self.stop.is_set():
            raise RunFailed("downloads were stopped")
        try:
            out.write(data)
            out.flush()
        except OSError as error:
            raise RunFailed(f"{self.folder} cannot be written to: {error.strerror}") from None

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise RunFailed("downloads were stopped")

    def _make_room(self, partial: Path, file: RemoteFile) -> None:
        """Reserve room for a shard, by an empty file; shards that are not in use are removed."""
        while True:
            with self._locked("room", True):
                entries = [e for e in self._entries() if e.path != partial]
                room = self.room()
                if file.size > room:
                    raise UserError(f"{file.url} has {size_text(file.size)}: {self.about(room)}")
                left = self._evict(entries, room - file.size)
                if sum(entry.size for entry in left) <= room - file.size:
                    partial.touch()
                    return
                if not any(entry.partial for entry in left):
                    raise _refused(self.folder, "shards in it cannot be removed")
            self._pause(_POLL)  # for downloads of others

    def _evict(self, entries: list[_Entry], room: float) -> list[_Entry]:
        """Remove the least recently used entries until the rest, which is returned, fits into
        ``room``, or cannot be removed: downloads that go on, and files of others."""
        left, total = [], sum(entry.size for entry in entries)
        for entry in sorted(entries):
            if total > room and self._removed(entry):
                total -= entry.size
            else:
                left.append(entry)
        return left

    def _removed(self, entry: _Entry) -> bool:
        """Remove an entry, but for downloads that go on; False where it stays."""
        shard = entry.path.name.removesuffix(_PARTIAL).rpartition(".")[0]
        with self._locked(shard, False) if entry.partial else contextlib.nullcontext(True) as mine:
            if mine:
                with contextlib.suppress(PermissionError):
                    entry.path.unlink(missing_ok=True)
                    return True
            return False

    def _entries(self) -> Iterator[_Entry]:
        for path in self.folder.iterdir():
            partial = path.name.endswith(_PARTIAL)
            if partial or path.name.endswith(".tar"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    used = max(stat.st_atime, stat.st_mtime)
                    final = int(path.name.split(".")[-2]) if partial else stat.st_size
                    yield _Entry(used, final, path, stat.st_size, partial)

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the lock of this name; yields False where another holds it, without ``wait``."""
        descriptor = os.open(self.folder / _LOCKS / name, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise _refused(self.folder, error.strerror or str(error)) from None
            try:
                yield True
            finally:  # not by closing alone: a forked process may have the descriptor, too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def about(self, room: float) -> str:
        """Limit of the cache, and the remedy."""
        if room < self.limit:
            kept = f"--data.cache-reserve keeps {size_text(self.reserve)} free"
            return (
                f"the disk of {self.folder} has room for {size_text(max(0, room))} of shards "
                f"({kept}); --data.shard-cache names another folder"
            )
        return (
            f"{self.folder} takes at most {size_text(self.limit)} of shards; raise "
            "--data.shard-cache-size"
        )

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("folder", "limit", "reserve")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, stop=threading.Event())


def open_shard_cache(reading: ReadConfig) -> ShardCache:
    """The cache of ``--data.shard-cache``.

    Raises:
        UserError: there can be no folder there that is written to.
    """
    given = reading.shard_cache
    folder = (Path(given).expanduser() if given else cache_folder()) / _FOLDER
    try:
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("cannot be written to")
    except OSError as error:
        raise _refused(folder, error.strerror or str(error)) from None
    limit, reserve = reading.shard_cache_size * _GB, reading.cache_reserve * _GB
    return ShardCache(folder.absolute(), limit, reserve)


def total_size(files: Iterable[RemoteFile]) -> int:
    """Bytes of these shards together."""
    return sum(file.size for file in files)


def size_text(count: int | float) -> str:
    """Bytes for people, in the units of ``--data.shard-cache-size``."""
    return f"{count / _GB:,.1f} GB" if count >= _GB else f"{count / 1e6:,.3g} MB"


def _refused(folder: Path, reason: str) -> UserError:
    advice = "give a folder on a fast disk of this machine"
    return UserError(f"--data.shard-cache: {folder}: {reason}; {advice}")
