"""Tar index: members of a WebDataset shard and their labels, cached in a small file.

The index is NAME.tar.ssl_vit.npz next to the shard or, if that folder is read-only, in
$SSL_VIT_CACHE or ~/.cache/ssl_vit. It is valid for a shard of the same size and modification time.
It has what every choice of a key or an image needs; other columns of labels have a file of their
own.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.common.files import cache_folder
from ssl_vit.data.formats import EXTENSIONS, HEAD, format_of
from ssl_vit.data.label_files import LabelFiles
from ssl_vit.data.listing import is_junk, is_unclear
from ssl_vit.data.names import Names
from ssl_vit.data.tar_names import split_name

INDEX_SUFFIX = ".ssl_vit.npz"
_VERSION = 4
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_LARGEST_JSON = 1 << 20
_log = logging.getLogger(__name__)


@dataclass
class ShardIndex:
    """Shard index: the n images among its members, in order, and labels by where they are from.

    Attributes:
        offsets, sizes: int64 (n,), in bytes from the start of the shard.
        names: of the members, without "./".
        alone: no two images have the same name up to the first dot.
        labels: by column (".cls" and ".txt" are files, others keys of .json): for each image the
            index of its value, int32 (n,), -1 for none.
        values: by column: its distinct values.
        passed: members that are no images, counted by extension.
        keys: of the first .json, for messages.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    names: Names
    alone: bool
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


def load_index(shard: Path, columns: tuple[str, ...] = ()) -> ShardIndex:
    """Load the index of a shard, or create and save it; ``columns``: of labels, if given.

    Raises:
        UserError: the shard is missing, compressed, truncated, or not a tar file.
    """
    try:
        with open(shard, "rb") as file:
            stat = os.fstat(file.fileno())
            stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
            places = _places(shard, columns)
            for place in places:
                if (index := _load(place, stamp)) is not None:
                    return index
            if file.read(6).startswith(_COMPRESSED):
                raise UserError(f"{shard} is compressed: decompress it to a plain .tar file first")
            index = _scan(shard, file.fileno(), stat.st_size, columns)
    except OSError as error:
        raise UserError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    if not any(_save(place, index, stamp) for place in places):
        _log.warning("%s: its index cannot be saved, and is rebuilt each time", shard)
    return index


def saved_index(
    shard: Path, size: int, mtime_ns: int, columns: tuple[str, ...] = ()
) -> ShardIndex | None:
    """The index of a shard of this size and modification time, which may itself be absent; None
    where it is not there."""
    stamp = np.array([_VERSION, size, mtime_ns], dtype=np.int64)
    found = (_load(place, stamp) for place in _places(shard, columns))
    return next((index for index in found if index is not None), None)


def adopt_index(
    shard: Path, raw: bytes, size: int, mtime_ns: int, columns: tuple[str, ...] = ()
) -> ShardIndex | None:
    """Save the bytes of an index file that was made elsewhere, of a shard of this size, as if the
    shard had this modification time; None where they are of another shard, or damaged."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            if file["stamp"][:2].tolist() != [_VERSION, size]:
                return None
            index = _read(file)
    except Exception as error:  # damaged zip files raise all kinds
        _log.warning("the index beside %s is damaged, and not used: %s", shard.name, error)
        return None
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= size - index.offsets)
    if not inside.all():
        return None
    _save(_places(shard, columns)[0], index, np.array([_VERSION, size, mtime_ns], dtype=np.int64))
    return index


def same_members(one: ShardIndex, other: ShardIndex) -> bool:
    """True if two indexes are of the same images at the same places."""
    pairs = [(getattr(index, name) for index in (one, other)) for name in ("offsets", "sizes")]
    pairs.append(index.names.buffer for index in (one, other))
    return all(np.array_equal(*pair) for pair in pairs)


def index_suffix(columns: tuple[str, ...]) -> str:
    """Suffix of an index after the name of its shard; ``columns``: of labels, if given."""
    of = f"-{hashlib.sha256(repr(columns).encode()).hexdigest()[:8]}" if columns else ""
    return of + INDEX_SUFFIX


def _places(shard: Path, columns: tuple[str, ...]) -> list[Path]:
    """Possible paths of the index, by preference."""
    real = os.path.realpath(shard)  # relative paths and links must not share another shard's index
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    suffix, cache = index_suffix(columns), cache_folder()
    beside = shard.with_name(f"{shard.name}{suffix}")
    return [beside, cache / f"{shard.name}-{digest}{suffix}"]


def _load(place: Path, stamp: np.ndarray) -> ShardIndex | None:
    """Load an index file; None where it is absent, out of date or damaged."""
    try:
        with np.load(place, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], stamp):
                return None
            return _read(file)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged zip files raise all kinds
        _log.warning("%s is damaged and will be rebuilt: %s", place, error)
        return None


def _read(file: Any) -> ShardIndex:
    """The index in an open npz file."""
    about = json.loads(file["about"].tobytes())
    offsets, sizes, ends = (file[n].astype(np.int64) for n in ("offsets", "sizes", "ends"))
    labels = dict(zip(about["values"], file["labels"].astype(np.int32), strict=True))
    names = Names(file["names"], ends)
    rest = about["alone"], labels, about["values"], about["passed"], about["keys"]
    return ShardIndex(offsets, sizes, names, *rest)


def _save(place: Path, index: ShardIndex, stamp: np.ndarray) -> bool:
    """Save the index atomically; False where it cannot be written."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")  # several ranks may write
    about = {name: getattr(index, name) for name in ("alone", "values", "passed", "keys")}
    columns = [index.labels[name] for name in index.values]
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
                names=index.names.buffer,
                ends=index.names.ends,
                labels=np.array(columns, dtype=np.int32).reshape(len(columns), len(index.sizes)),
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            )
        os.replace(temporary, place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def _scan(shard: Path, descriptor: int, size: int, columns: tuple[str, ...]) -> ShardIndex:
    """Scan the headers of a shard, the files of labels, and the first bytes of other members."""
    images: dict[str, tuple[int, int]] = {}
    found = LabelFiles(columns)
    passed: Counter[str] = Counter()
    for member in _members(shard, descriptor, size):
        name = member.name.removeprefix("./")
        if _is_hidden(name):
            continue
        kind = split_name(name, full=True)[1].lower()
        unclear = is_unclear(os.fsencode(kind)) and not found.takes(name)
        if kind in EXTENSIONS or (unclear and _is_image(descriptor, member)):
            images[name] = (member.offset_data, member.size)  # of equal names the last, as in tar
            continue
        passed[kind] += 1
        if found.takes(name):
            length = min(member.size, _LARGEST_JSON)
            found.add(name, os.pread(descriptor, length, member.offset_data))
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    alone = len({split_name(name)[0] for name in images}) == len(images)
    names = Names.of(os.fsencode(name) for name in images)
    labels, values = found.of_images(list(images))
    rest = alone, labels, values, dict(passed), found.keys
    return ShardIndex(places[:, 0].copy(), places[:, 1].copy(), names, *rest)


def _is_image(descriptor: int, member: tarfile.TarInfo) -> bool:
    """True for a member that begins like an image."""
    return format_of(os.pread(descriptor, min(HEAD, member.size), member.offset_data)) != ""


def _is_hidden(name: str) -> bool:
    """True for a member that is junk, or in a folder that is."""
    return any(is_junk(os.fsencode(part)) for part in name.split("/") if part not in (".", ".."))


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
