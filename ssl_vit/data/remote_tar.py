"""Remote tar source: WebDataset shards of S3, Google Cloud Storage or HTTP, by way of a cache.

The members of all shards must be known before the first image is read: the order of a run depends
on their number. So a shard whose index is not in the cache is fetched once, when the source is
opened. Where the cache can hold all shards they are all fetched then. Where it cannot, single
images are read by ranges, and whole shards when they are announced (``expect``) or read in a row.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic

import numpy as np

from ssl_vit.common.errors import RunFailed, check
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.base import Item
from ssl_vit.data.remote import ASKING, NoRanges, RemoteFile, describe, matching
from ssl_vit.data.remote_index import GIVEN, bring, given_indexes, index_of, known_indexes
from ssl_vit.data.shard_cache import CHANGED, ShardCache, open_shard_cache, size_text, total_size
from ssl_vit.data.shard_names import expand
from ssl_vit.data.shard_order import needs_window
from ssl_vit.data.tar import OpenFile, TarSource, samples_of
from ssl_vit.data.tar_index import INDEX_SUFFIX, ShardIndex, index_suffix, same_members, saved_index

log = logging.getLogger("ssl_vit")
_PART = re.compile(r"(kept:|held:)*")  # before a source, of which it is a part
_TOUCHED_EVERY = 30.0  # seconds after which a shard in use is marked as used
_IN_A_ROW = 100  # images of a shard read singly, one after the other, before it is fetched whole
_WINDOWS = 3  # of shards, that the cache must hold: the last, the present and the next one


class RemoteTarSource(TarSource):
    """Remote tar source: the samples of shards that are fetched into a cache.

    Attributes:
        files: the shards on their server; ``shards`` are their addresses.
        held: the cache can hold all of them, and did when the source was opened.
        given: shards whose index is from the server, and was not compared with them yet.
    """

    files: tuple[RemoteFile, ...]
    cache: ShardCache
    held: bool
    given: frozenset[int] = frozenset()

    def __init__(self, *samples: object) -> None:
        super().__init__(*samples)  # type: ignore[arg-type]
        self._touched: dict[int, float] = {}
        self._soon: tuple[int, ...] = ()
        self._row = (-1, 0)  # the shard that an image was read from singly, and how many in a row
        self._ahead: threading.Thread | None = None

    def read(self, i: int) -> Item:
        found = self._by_range(range(len(self))[i])
        return super().read(i) if found is None else (found, self.label(i))

    def stream(self, i: int) -> io.IOBase:
        found = self._by_range(range(len(self))[i])
        return super().stream(i) if found is None else io.BytesIO(found)

    def _by_range(self, i: int) -> bytearray | None:
        """An image alone, of a shard that is not here; None: its shard is, or is to be fetched."""
        shard = self._shard(i)
        file = self.files[shard]
        if self.held or shard in self._soon or shard in self._files or self.cache.has(file):
            return None
        self._row = (shard, self._row[1] + 1 if self._row[0] == shard else 1)
        if self._row[1] > _IN_A_ROW:
            return None
        start = int(self.offsets[i])
        with contextlib.suppress(NoRanges):
            return bytearray(file.read(start, start + int(self.sizes[i])))
        return None

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        """Fetch the shards of these images ahead, in a thread, in their order."""
        shards = np.searchsorted(self.starts, images, side="right") - 1
        soon = tuple(dict.fromkeys(shards.tolist()))
        if self.held or soon == self._soon:
            return
        self._soon = soon
        if self._ahead is None or not self._ahead.is_alive():
            self._ahead = threading.Thread(target=self._fetch_ahead, daemon=True)
            self._ahead.start()

    def _fetch_ahead(self) -> None:
        done: tuple[int, ...] = ()
        while done != self._soon:
            done = self._soon
            for shard in done:
                if shard in self._soon:
                    # An error is raised again by who reads an image of it.
                    with contextlib.suppress(Exception):
                        self.cache.fetch(self.files[shard], wait=False)

    def _open(self, shard: int) -> OpenFile:
        """Open file of a shard, which is thereby marked as used."""
        self._close_removed()
        file = super()._open(shard)
        if time.monotonic() - self._touched.get(shard, -_TOUCHED_EVERY) >= _TOUCHED_EVERY:
            self._touched[shard] = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(file.descriptor, ns=(time.time_ns(), CHANGED))
        return file

    def _close_removed(self) -> None:
        """Close the shards that were removed from the cache: only then the disk has their room."""
        for shard, file in list(self._files.items()):
            if not file.exists():
                self._files.pop(shard, None)

    def _opened(self, shard: int) -> OpenFile:
        while True:
            path = self.cache.fetch(self.files[shard])
            with contextlib.suppress(FileNotFoundError):  # removed again in the meantime
                opened = OpenFile(str(path))
                if shard in self.given:
                    self._compare(shard)
                return opened

    def _compare(self, shard: int) -> None:
        """Check that the index that was on the server is that of the shard.

        Raises:
            RunFailed: it is another one's.
        """
        file, columns = self.files[shard], self.reading.label_column
        path = self.cache.path(file)
        given = saved_index(path, file.size, GIVEN, columns)
        if given is not None and not same_members(given, index_of(file, self.cache, columns)):
            raise RunFailed(
                f"the index {file.url}{index_suffix(columns)} is not of this shard: remove it from "
                "the server, and start again"
            )
        self.given -= {shard}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_ahead": None}


def open_remote(spec: str, rest: str, reading: ReadConfig | None = None) -> RemoteTarSource:
    """Open the shards of an address, with ranges and, but for HTTP, wildcards.

    Raises:
        UserError: a shard is missing, compressed or damaged, or may not be read; there are no
            images; or the cache is too small.
        RunFailed: a connection is lost for good.
    """
    reading = reading or ReadConfig()
    files = find_remote(spec)
    cache = open_shard_cache(reading)
    if changed := [file.url for file in files if cache.changed(file)]:
        log.warning(
            "warning: %s: %d of %d shards are not those on the server before (the first: %s); they "
            "are fetched anew, and a run that goes on has other images",
            *(spec, len(changed), len(files), changed[0]),
        )
    held, apart = total_size(files) <= cache.room(), ""
    if not held:
        apart = f"its shards take {size_text(total_size(files))}, and {cache.about(cache.room())}"
        if isinstance(reading, DataConfig) and spec in reading.train:  # else it is read in order
            alone = _PART.sub("", reading.train, count=1) == spec
            several = "images of several sources are drawn from all of them at once"
            check(alone, f"{spec!r}: {several}, but {apart}")
            _check_windows(spec, files, cache, reading.shard_window, apart)
    columns = reading.label_column
    indexes = known_indexes(files, cache, columns)
    given: dict[int, ShardIndex] = {}
    if not held:
        given = given_indexes(
            files, cache, columns, [n for n in range(len(files)) if n not in indexes]
        )
        indexes |= given
    bring(spec, files, cache, indexes, columns, held)
    urls, known = [file.url for file in files], [indexes[n] for n in range(len(files))]
    source = samples_of(spec, urls, known, reading, RemoteTarSource)
    source.files, source.cache, source.held = tuple(files), cache, held
    source.given, source.reading, source.apart = frozenset(given), reading, apart
    return source


def find_remote(spec: str) -> list[RemoteFile]:
    """The shards that an address names, in the order of its ranges, wildcards sorted.

    Raises:
        UserError: one is missing, or the address is not understood.
        RunFailed: a server does not answer.
    """
    address = spec.removeprefix("tar:")
    scheme, mark, path = address.partition("://")
    kind = address.partition(":")[0]
    check(mark != "" and "/" in path, f"{spec!r} is no address: give {kind}://PLACE/NAME.tar")
    check("::" not in path, f"{spec!r} joins patterns by '::'; give one, with braces")
    check(
        spec.startswith("tar:") or path.endswith(".tar"),
        f"{spec!r}: of the network only tar shards are read, named ....tar (compressed ones are "
        "not); copy others, or mount them, and give the path. A data set of Hugging Face is named "
        "as hf:OWNER/NAME",
    )
    urls: list[str] = []
    for url in expand(spec, address):
        if scheme.startswith("http"):
            check("*" not in path, f"{spec!r}: HTTP cannot list; name the shards by {{000..146}}")
            urls.append(url)
            continue
        found = matching(url) if has_magic(url) else [url]
        found = [name for name in found if INDEX_SUFFIX not in name]
        check(bool(found), f"{spec!r}: there is no shard {url}")
        urls += found
    with ThreadPoolExecutor(ASKING) as pool:
        return list(pool.map(describe, dict.fromkeys(urls)))


def _check_windows(
    spec: str, files: list[RemoteFile], cache: ShardCache, window: int, apart: str
) -> None:
    """Check that a cache, which cannot hold all shards, holds windows of them.

    Raises:
        UserError: there are no windows, or they are too large.
    """
    largest, room = max(file.size for file in files), cache.room()
    most = int(room // (_WINDOWS * largest)) if largest else 0
    check(window > 0, needs_window(spec, apart, max(0, most)))
    check(
        window <= most,
        f"{spec!r}: --data.shard-window is {window}, and three times as many shards must fit, of "
        f"up to {size_text(largest)}; {cache.about(room)}"
        + (f", or give --data.shard-window {most}" if most > 0 else ""),
    )
