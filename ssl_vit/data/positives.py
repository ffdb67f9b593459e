"""Positives: pairs of images that belong together, from a CSV file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from ssl_vit.common.errors import check
from ssl_vit.data.base import Source
from ssl_vit.data.matching import Rows
from ssl_vit.data.table import CsvTable, read_table

log = logging.getLogger("ssl_vit")
_COLUMNS = ("query", "positive")


def read_positives(
    path: Path, queries: Source, gallery: Source
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Read pairs from a CSV with the columns ``query`` and ``positive``: indices of the images in
    their sources, in the order of the lines.

    Images are named as in a CSV of labels (:class:`Rows`). Lines that name an image of neither are
    left out, and counted in the log.

    Raises:
        UserError: the file cannot be read, lacks a column, or none of its pairs is found.
    """
    table = read_table(path)
    for name in _COLUMNS:
        known = ", ".join(table.header[:20])
        check(name in table.header, f"--positives {path} has no column {name!r}, but {known}")
    found = [
        _images(table, column, source)
        for column, source in zip(_COLUMNS, (queries, gallery), strict=True)
    ]
    both = (found[0] >= 0) & (found[1] >= 0)
    check(
        bool(both.any()),
        f"--positives {path} has no line whose query is in {queries.spec} and whose positive is in "
        f"{gallery.spec}; its first: {', '.join(table.column(name)[0] for name in _COLUMNS)}",
    )
    if not both.all():
        first = table.lines[int(np.flatnonzero(~both)[0])]
        text = "warning: %s: %s of %s lines name an image that is not there; the first is line %d"
        log.warning(text, path, f"{int((~both).sum()):,}", f"{len(both):,}", first)
    return found[0][both], found[1][both]


def _images(table: CsvTable, column: str, source: Source) -> Int64[np.ndarray, " p"]:
    """Image that each line names in a column, -1 for none of the source."""
    names, line_of, name_of = _distinct(table.column(column), table.lines)
    rows = Rows(names)
    if not rows.share(source):
        rows = Rows(names, short=True)
    image_of = np.full(len(names), -1, dtype=np.int64)
    of = rows.of(source, f"--positives {table.path}, column {column},", line_of)
    there = np.flatnonzero(of >= 0)
    image_of[of[there]] = there
    return image_of[name_of]


def _distinct(
    cells: Sequence[str], lines: Sequence[int]
) -> tuple[list[str], list[int], Int64[np.ndarray, " p"]]:
    """Distinct names in order, the first line of each, and the name of each cell."""
    place: dict[str, int] = {}
    line_of = []
    for cell, line in zip(cells, lines, strict=True):
        if cell not in place:
            place[cell] = len(place)
            line_of.append(line)
    return list(place), line_of, np.array([place[cell] for cell in cells], dtype=np.int64)
