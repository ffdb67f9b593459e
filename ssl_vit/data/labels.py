"""CSV labels for the images of any source."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.data.base import Item, Source
from ssl_vit.data.folder import EXTENSIONS

_DELIMITERS = ",;\t"
_UNKNOWN = ("", "-1")
_OUTCOMES = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, **dict.fromkeys(_UNKNOWN, math.nan)}


class Labelled(Source):
    """Labelled source: a source with labels from a CSV file, one class or several labels."""

    def __init__(self, source: Source, spec: str, classes: tuple[str, ...], values: np.ndarray):
        self.source, self.spec, self.classes = source, spec, classes
        self.reading = source.reading
        self.labels = values if values.ndim == 1 else None
        self.targets = values if values.ndim == 2 else None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> Item:
        return self.source.read(i)[0], self.label(i)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def label(self, i: int) -> int | None:
        """Return the class of image i, None when unknown."""
        number = super().label(i)
        return None if number == -1 else number


def labelled_by(
    source: Source,
    path: Path,
    classes: Sequence[str] | None = None,
    columns: Sequence[str] = (),
) -> Labelled:
    """Label the images of ``source`` by a CSV file.

    The file is UTF-8, separated by commas, semicolons or tabs, with a header. Its first column is
    the image's name: any suffix of the source's name for it that starts after a slash (so the file
    name, or the path within a folder), or a tar sample's key; the image extension may be missing on
    either side. Lines of other images are ignored, so one file may serve several sources.

    One further column contains one class per image, a name or a number; several contain 1 or 0 for
    independent labels. Blank or -1 is unknown.

    Args:
        classes: the classes, in order, or the columns; as of a source labelled before. None: all in
            the file, numbers sorted numerically, names alphabetically.
        columns: use only these of the further columns.

    Raises:
        UserError: the file cannot be read; an image matches no line or several, or a line several
            images; a value is not allowed.
    """
    table = read_table(path)
    wanted = list(columns) or table.columns
    several = len(wanted) > 1
    if several and classes is not None and not columns:
        wanted = list(classes)
    for name in wanted:
        known = f"; allowed: {', '.join(table.columns[:20])}"
        check(name in table.columns, f"{path} has no column {name!r}{known}")
    cells = [[row[table.columns.index(name) + 1].strip() for name in wanted] for row in table.rows]
    if several:
        values, named = _outcomes(table, wanted, cells), tuple(wanted)
    else:
        values, named = _numbers(table, [cell[0] for cell in cells], classes)
    rows = _rows_of(source, table)
    return Labelled(source, f"{source.spec} labelled by {path}", named, values[rows])


@dataclass(frozen=True)
class Table:
    """CSV table: column names after the first, and rows with their line numbers."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_table(path: Path) -> Table:
    """Read a whole CSV file, and check its shape.

    Raises:
        UserError: it cannot be read, or a row has another number of cells than the header.
    """
    rows, lines = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(_DELIMITERS, key=first.count), strict=True)
            for row in reader:
                if any(row):
                    rows.append(row)
                    lines.append(reader.line_num)
    except OSError as error:
        raise UserError(f"cannot read the labels {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the labels {path} are no CSV file in UTF-8: {error}") from None
    check(len(rows) > 1, f"{path} holds no labels: a header and a line for each image are needed")
    header = [name.strip() for name in rows[0]]
    check(len(header) > 1, f"{path}, line {lines[0]} is {header[0]!r}: it needs a name and a label")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    check(not twice, f"{path} has two columns named {twice[:1]}")
    for row, line in zip(rows, lines, strict=True):
        there = f"{path}, line {line} has {len(row)} cells"
        check(len(row) == len(header), f"{there}; the header has {len(header)}")
    return Table(path, header[1:], rows[1:], lines[1:])


def _numbers(
    table: Table, cells: list[str], classes: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers, int64 (n,), -1 where unknown, and class names."""
    if classes is None:
        found = set(cells) - set(_UNKNOWN)
        check(bool(found), f"{table.path} holds no label: {table.columns[0]} is always blank")
        try:
            classes = sorted(found, key=lambda name: (int(name), name))
        except ValueError:
            classes = sorted(found)
    number = {name: i for i, name in enumerate(classes)} | dict.fromkeys(_UNKNOWN, -1)
    for cell, line in zip(cells, table.lines, strict=True):
        if cell not in number:
            hint = did_you_mean(cell, classes)
            raise UserError(f"{table.path}, line {line}: {cell!r} is none of the classes{hint}")
    return np.array([number[cell] for cell in cells], dtype=np.int64), tuple(classes)


def _outcomes(table: Table, columns: list[str], cells: list[list[str]]) -> np.ndarray:
    """Outcomes of independent labels, float32 (n, L): 1, 0, or NaN for unknown."""
    for row, line in zip(cells, table.lines, strict=True):
        for cell, name in zip(row, columns, strict=True):
            if cell not in _OUTCOMES:
                there = f"{table.path}, line {line}: {name} is {cell!r}"
                raise UserError(f"{there}; several columns hold 1, 0, or nothing for unknown")
    return np.array([[_OUTCOMES[cell] for cell in row] for row in cells], dtype=np.float32)


def _rows_of(source: Source, table: Table) -> np.ndarray:
    """Match images to rows: the row of each image, int64 (n,)."""
    names = [row[0].strip().removeprefix("./") for row in table.rows]
    exact, bare = _places(names), _places([_bare(name) for name in names])
    depths = sorted({name.count("/") + 1 for name in names}, reverse=True)
    rows = np.full(len(source), -1, dtype=np.int64)
    image_of = np.full(len(names), -1, dtype=np.int64)
    missing, first = 0, ""
    for i in range(len(source)):
        name = source.name(i)
        found = _find(name, depths, exact, bare)
        if not found:
            missing, first = missing + 1, first or name
            continue
        lines = " and ".join(str(table.lines[row]) for row in found[:2])
        check(len(found) == 1, f"{name}: lines {lines} of {table.path} both name it")
        row, other = found[0], int(image_of[found[0]])
        if other >= 0:
            there = f"{table.path}, line {table.lines[row]}: {names[row]!r} may be"
            raise UserError(f"{there} {source.name(other)} or {name}; give more of the path")
        rows[i], image_of[row] = row, i
    check(
        not missing,
        f"{table.path} has no line for {missing:,} of {len(source):,} images; first: {first}",
    )
    return rows


def _places(names: list[str]) -> dict[str, list[int]]:
    """Index of names: the positions of each."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return places


def _find(
    name: str, depths: list[int], exact: dict[str, list[int]], bare: dict[str, list[int]]
) -> list[int]:
    """Find the rows of an image: by the longest suffix of its name, first with its extension."""
    # A tar sample is "SHARD.tar:KEY"; other names are kept whole.
    pieces, key = name.split("/"), name.rpartition(".tar:")[2].split("/")
    ends = ["/".join(whole[-depth:]) for depth in depths for whole in (pieces, key)]
    for end in ends:
        if end in exact:
            return exact[end]
    return next((bare[_bare(end)] for end in ends if _bare(end) in bare), [])


def _bare(name: str) -> str:
    """Name without an image extension; other dots belong to the name."""
    stem, extension = os.path.splitext(name)
    return stem if extension[1:].lower() in EXTENSIONS else name
