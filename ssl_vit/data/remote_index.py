"""Indexes of remote shards: from the cache, from the server, or made when a shard is fetched."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from ssl_vit.common.errors import UserError
from ssl_vit.data.remote import ASKING, NoRanges, RemoteFile, describe
from ssl_vit.data.shard_cache import CHANGED, ShardCache, size_text, total_size
from ssl_vit.data.tar_index import (
    ShardIndex,
    adopt_index,
    index_suffix,
    load_index,
    saved_index,
)

log = logging.getLogger("ssl_vit")
# As the time of change of a shard: its index is from the server.
GIVEN = CHANGED + 1
_THREADS = 8  # downloads of a process at a time
_SAID_EVERY = 30.0  # seconds between lines of progress


def bring(
    spec: str,
    files: list[RemoteFile],
    cache: ShardCache,
    indexes: dict[int, ShardIndex],
    columns: tuple[str, ...],
    held: bool,
) -> None:
    """Fetch the shards without an index, and make it. ``held``: all shards are then in the cache;
    else they stay as long as there is room."""

    def lacks(n: int) -> bool:
        return n not in indexes or (held and not cache.has(files[n]))

    def get(n: int, wait: bool) -> int:
        if cache.fetch(files[n], wait) is None:
            return 0
        if n not in indexes:
            indexes[n] = index_of(files[n], cache, columns)
        return files[n].size

    wanted = [n for n in range(len(files)) if lacks(n)]
    size = size_text(total_size(files[n] for n in wanted))
    if wanted:
        text = "%s: %d of %d shards (%s) are fetched into %s"
        log.info(text, spec, len(wanted), len(files), size, cache.folder)
    said, got = time.monotonic(), 0
    for wait in (False, True):  # first those that no other process is fetching
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                left = [pool.submit(get, n, wait) for n in wanted if lacks(n)]
                for done in as_completed(left):
                    got += done.result()
                    if time.monotonic() - said > _SAID_EVERY:
                        said = time.monotonic()
                        log.info("%s: %s of %s are fetched", spec, size_text(got), size)
            except BaseException:
                cache.stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def known_indexes(
    files: list[RemoteFile], cache: ShardCache, columns: tuple[str, ...]
) -> dict[int, ShardIndex]:
    """The indexes that are in the cache, of shards that were there once."""
    found = (saved_index(cache.path(file), file.size, CHANGED, columns) for file in files)
    return {n: index for n, index in enumerate(found) if index is not None}


def given_indexes(
    files: list[RemoteFile], cache: ShardCache, columns: tuple[str, ...], wanted: list[int]
) -> dict[int, ShardIndex]:
    """Indexes that lie beside shards on the server, as a disk has them; kept in the cache, too."""

    def look(n: int) -> ShardIndex | None:
        path, size = cache.path(files[n]), files[n].size
        if (index := saved_index(path, size, GIVEN, columns)) is not None:
            return index
        try:
            there = describe(files[n].url + index_suffix(columns))
            raw = b"".join(there.chunks(0) if there.ranges else there.stream())
        except UserError:  # there is none
            return None
        except NoRanges:
            raw = b"".join(there.stream())
        return adopt_index(path, raw, size, GIVEN, columns)

    with ThreadPoolExecutor(ASKING) as pool:
        found = dict(zip(wanted, pool.map(look, wanted), strict=True))
    return {n: index for n, index in found.items() if index is not None}


def index_of(file: RemoteFile, cache: ShardCache, columns: tuple[str, ...]) -> ShardIndex:
    """The index of a shard that was fetched. Raises UserError where it is no sound tar file."""
    while True:
        path = cache.path(file)
        try:
            return load_index(path, columns)
        except UserError as error:
            if path.exists():
                text = str(error).replace(str(path), file.url)
                raise UserError(text) from None
        cache.fetch(file)  # it was removed in the meantime
