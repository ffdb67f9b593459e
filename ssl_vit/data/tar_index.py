"""Tar index: offsets of the samples of a WebDataset shard, cached in a small file.

The index is NAME.tar.ssl_vit.npz next to the shard or, if that folder is read-only, in
$SSL_VIT_CACHE or ~/.cache/ssl_vit. It is valid for a shard of the same size and modification time.
"""

import contextlib
import hashlib
import logging
import os
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.common.files import cache_folder
from ssl_vit.data.base import Names
from ssl_vit.data.folder import EXTENSIONS

INDEX_SUFFIX = ".ssl_vit.npz"
_VERSION = 1
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Shard index: int64 (n,) each, offsets in bytes from the start; label -1 for none."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: Names


def load_index(shard: Path) -> ShardIndex:
    """Load the index of a shard, or create and save it.

    Raises:
        UserError: the shard is missing, compressed, truncated, or not a tar file.
    """
    try:
        with open(shard, "rb") as file:
            stat = os.fstat(file.fileno())
            stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
            places = _places(shard)
            for place in places:
                if (index := _load(place, stamp)) is not None:
                    return index
            if file.read(6).startswith(_COMPRESSED):
                raise UserError(f"{shard} is compressed: decompress it to a plain .tar file first")
            index = _scan(shard, file.fileno(), stat.st_size)
    except OSError as error:
        raise UserError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    if not any(_save(place, index, stamp) for place in places):
        _log.warning("%s: its index cannot be saved, and is rebuilt each time", shard)
    return index


def _places(shard: Path) -> list[Path]:
    """Possible paths of the index, by preference."""
    real = os.path.realpath(shard)  # relative paths and links must not share another shard's index
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    cache = cache_folder()
    beside = shard.with_name(shard.name + INDEX_SUFFIX)
    return [beside, cache / f"{shard.name}-{digest}{INDEX_SUFFIX}"]


def _load(place: Path, stamp: np.ndarray) -> ShardIndex | None:
    """Load an index file; None where it is absent, out of date or damaged."""
    try:
        with np.load(place, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], stamp):
                return None
            names = ("offsets", "sizes", "labels", "key_ends")
            offsets, sizes, labels, key_ends = (file[name].astype(np.int64) for name in names)
            index = ShardIndex(offsets, sizes, labels, Names(file["key_buffer"], key_ends))
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged zip files raise all kinds
        _log.warning("%s is damaged and will be rebuilt: %s", place, error)
        return None
    return index


def _save(place: Path, index: ShardIndex, stamp: np.ndarray) -> bool:
    """Save the index atomically; False where it cannot be written."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")  # several ranks may write
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:
            return False  # marked read-only, though root could write there
        with open(temporary, "xb") as file:
            np.savez(
                file,
                stamp=stamp,
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
                key_buffer=index.keys.buffer,
                key_ends=index.keys.ends,
            )
        os.replace(temporary, place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def _scan(shard: Path, descriptor: int, size: int) -> ShardIndex:
    """Scan the headers of a shard. A sample is all members with the same key."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for member in _members(shard, descriptor, size):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem:  # a hidden file
            continue
        if extension == "cls":
            text = os.pread(descriptor, min(member.size, 64), member.offset_data)
            labels[key] = _label(shard, member.name, text)
        elif extension.rpartition(".")[2].lower() in EXTENSIONS:
            images.setdefault(key, (member.offset_data, member.size))
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    numbers = np.array([labels.get(key, -1) for key in images], dtype=np.int64)
    keys = Names.of(os.fsencode(key) for key in images)
    return ShardIndex(places[:, 0].copy(), places[:, 1].copy(), numbers, keys)


def _members(shard: Path, descriptor: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Regular files of a complete shard: up to its end mark, a block of zeros.

    tarfile accepts a shard that was cut between two members, or has a damaged header, as one that
    ends there; the mark detects it.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg() and not member.issparse():
                    yield member
            if os.pread(descriptor, 512, archive.offset) != bytes(512):
                raise tarfile.ReadError("no end mark after the last member")
    except tarfile.TarError as error:
        reason = f"the shard {shard} is truncated or damaged ({error}): copy it again"
        raise UserError(reason) from error


def _label(shard: Path, member: str, text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0:
        raise UserError(f"{shard}: {member} holds {text!r}, not a class number from 0 up")
    return label
