"""Groups: images of one patient, scene or slide, which lie together on one side of every split.

``--data.group`` defines them. The number of a group is a hash of its name: the same group has the
same one in every source, wherever it lies, and names (of patients) are kept nowhere.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from ssl_vit.common.errors import NothingFound, UserError, check, did_you_mean
from ssl_vit.data.base import Source
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.headers_of import headers_of
from ssl_vit.data.table import CsvTable

log = logging.getLogger("ssl_vit")
_SHOWN = 3  # images without a group that are named
_SAID = 30.0  # seconds between two lines of progress
_UNKNOWN = ("", "nan")


def group_column(table: CsvTable, grouping: tuple[str, str]) -> str:
    """Column of a table that ``ReadConfig.grouping`` names; empty if it names something else.

    Raises:
        UserError: there is no such column, nor a DICOM keyword of a plain name.
    """
    kind, name = grouping
    known = ", ".join(table.header[:20])
    if kind == "column":
        text = f"--data.group is 'column:{name}'; {table.path} has the columns {known}"
        check(name in table.header, text)
    elif name and not kind and name not in table.header:
        _tag(name, name, f"no column of {table.path} ({known}), and ")
    return name if kind in ("", "column") and name in table.header else ""


def groups_of(source: Source) -> np.ndarray:
    """Group of each image as ``reading.group`` of its source defines it, int64 (n,): by its name,
    or by the header of its DICOM file. A plain name is a DICOM keyword here.

    Raises:
        UserError: no image has one, or there is no such keyword.
    """
    kind, text = source.reading.grouping
    if kind == "name":
        pattern = re.compile(text)
        names = (_found(pattern, source.inner_name(i)) for i in range(len(source)))
        return numbered(source, names, f"names ({text})")
    tag = _tag(text, source.reading.group)
    return numbered(source, _header_values(source, tag, text), f"{text} of DICOM")


def _found(pattern: re.Pattern[str], name: str) -> str:
    """The group in a name: what the first brackets of the pattern match, or all of it."""
    match = pattern.search(name)
    return "" if match is None else match[1 if pattern.groups else 0] or ""


def numbered(source: Source, names: Iterable[str], origin: str) -> np.ndarray:
    """Number of each image's group by the groups' names, int64 (n,).

    An image without one (blank, NaN) is a group of its own: a negative number, different from
    all others in the source. What was found is logged. ``origin``: where the names are from.

    Raises:
        UserError: no image has a group.
    """
    alone: list[int] = []

    def numbers() -> Iterator[int]:
        for i, name in enumerate(names):
            if (text := name.strip()).lower() in _UNKNOWN:
                alone.append(i)
            yield -1 - i if alone[-1:] == [i] else _number(text)

    made = np.fromiter(numbers(), dtype=np.int64, count=len(source))
    if len(alone) == len(source):
        raise NothingFound(
            f"--data.group is {source.reading.group!r}: no image of {source.spec} has a group by "
            f"{origin}; the first of {len(source):,} is {source.inner_name(0)}",
            "group",
        )
    sizes = np.unique(made, return_counts=True)[1]
    count, most = f"{len(sizes):,}", f"{int(sizes.max()):,}"
    log.info("%s: %s groups by %s, of at most %s images", source.spec, count, origin, most)
    if alone:
        share = f"{len(alone):,} of {len(source):,}"
        first = ", ".join(source.name(i) for i in alone[:_SHOWN])
        text = "warning: %s: %s images have no group by %s, and each is one of its own: %s%s"
        more = " ..." if len(alone) > _SHOWN else ""
        log.warning(text, source.spec, share, origin, first, more)
    elif len(sizes) == 1 and len(source) > 1:
        log.warning("warning: %s: all images are of one group by %s", source.spec, origin)
    elif len(sizes) == len(source) > 1:
        log.warning("warning: %s: no two images are of one group by %s", source.spec, origin)
    return made


def _number(name: str) -> int:
    """Number of a group, 63 bits: a million groups all differ but once in ten million times."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _tag(keyword: str, given: str, column: str = "") -> int:
    """DICOM tag of a keyword; ``column``: why it is no column, for messages.

    Raises:
        UserError: there is none, it holds other elements, or pydicom is not installed.
    """
    try:
        from pydicom.datadict import dictionary_VR, keyword_dict
    except ImportError as error:
        need = f"{column}DICOM needs: pip install 'ssl_vit[dicom]' ({error})"
        raise UserError(f"--data.group is {given!r}: {need}") from error
    tag = keyword_dict.get(keyword)
    if tag is None or dictionary_VR(tag) == "SQ":
        hint = did_you_mean(keyword, keyword_dict)
        named = "a column of --data.labels is named as it is"
        columns = named if column else "a column needs --data.labels CSV"
        raise UserError(
            f"--data.group is {given!r}: {column}no DICOM keyword of one value{hint}; {columns}, "
            "and a pattern is written name:PATTERN"
        )
    return int(tag)


def _header_values(source: Source, tag: int, keyword: str) -> Iterator[str]:
    """Value of a DICOM element of each image's file, by the first part of its header; empty where
    it has none. Read by threads, some thousands at a time; a line of progress every half minute."""
    from ssl_vit.data.dicom import read_element

    def value(stream: Any) -> str:
        head = stream.read(HEAD)
        stream.seek(0)
        # Without a preamble a file begins with its first group.
        bare = head[:2] in (b"\2\0", b"\b\0", b"\0\b")
        return read_element(stream, tag) if bare or format_of(head) == "DICOM" else ""

    n, started = len(source), time.monotonic()
    said = started
    for count, found in enumerate(headers_of(source, range(n), value, ""), 1):
        yield found
        if (now := time.monotonic()) - said > _SAID:
            said = now
            done, rate = f"{count:,} of {n:,}", count / (now - started)
            text = "%s: %s of DICOM read of %s files, %.0f/s"
            log.info(text, source.spec, keyword, done, rate)


def group_count(source: Source) -> int:
    """Number of groups of a source; 0 where none are asked for."""
    return 0 if source.groups is None else len(np.unique(source.groups))


def shared_groups(one: Source, two: Source) -> np.ndarray:
    """Groups that two sources have in common, int64, ascending."""
    if one.groups is None or two.groups is None:
        return np.zeros(0, dtype=np.int64)
    both = np.intersect1d(one.groups, two.groups)
    return both[both >= 0]


def leaks(sources: Mapping[str, Source]) -> list[str]:
    """A line for each two of these sources, by option, that have groups in common."""
    lines = []
    for (first, one), (second, two) in combinations(sources.items(), 2):
        both = shared_groups(one, two)
        if not len(both):
            continue
        places = [int(np.flatnonzero(s.groups == both[0])[0]) for s in (one, two)]
        share = f"{len(both):,} of {group_count(two):,} groups of --{second}"
        names = f"{two.name(places[1])} and {one.name(places[0])}"
        lines.append(
            f"{share} are in --{first}, too ({names} are of one group by --data.group "
            f"{one.reading.group}): scores are too good; leave them out of one"
        )
    return lines
