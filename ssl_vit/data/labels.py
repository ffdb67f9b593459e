"""CSV labels for the images of any source; equal class numbers for two sources."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import NothingFound, UserError, check
from ssl_vit.data.base import Item, Source
from ssl_vit.data.classes import (
    LABEL_NAMES,
    NoClasses,
    classes_of,
    is_label_name,
    is_outcome,
    outcomes_of,
)
from ssl_vit.data.groups import group_column, numbered
from ssl_vit.data.matching import Rows, is_image_name
from ssl_vit.data.table import CsvTable, read_table

log = logging.getLogger("ssl_vit")
# Names of columns that name images, the surest first.
_IMAGES = (
    *("image_path", "img_path", "path", "filepath", "file_path", "filename", "file_name", "file"),
    *("image_name", "image_file", "image_index", "image", "img", "name", "image_id", "isic_id"),
    *("id_code", "key", "sample", "uid", "id"),
)
# Names of columns that say something else of an image.
_ASIDE = ("split", "fold", "set", "subset", "partition", "phase", "is_train", "url")
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*")
_INDEX = re.compile(r"|unnamed: \d+|index", re.IGNORECASE)


class Labelled(Source):
    """Labelled source: a source with other labels, one class an image or several labels."""

    def __init__(
        self,
        source: Source,
        spec: str,
        classes: tuple[str, ...],
        values: np.ndarray,
        labels_from: str = "",
    ):
        self.inherit(source)
        self.source, self.spec, self.classes = source, spec, classes
        self.labels_from = labels_from
        self.labels = values if values.ndim == 1 else None
        self.targets = values if values.ndim == 2 else None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> Item:
        return self.source.read(i)[0], self.label(i)

    def stream(self, i: int) -> io.IOBase:
        return self.source.stream(i)

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        self.source.expect(images)

    def listing(self) -> Iterable[np.ndarray]:
        return self.source.listing()

    def inner_name(self, i: int) -> str:
        return self.source.inner_name(i)

    def name(self, i: int) -> str:
        return self.source.name(i)


def labelled_by(source: Source, path: Path, columns: Sequence[str] = ()) -> Source:
    """Label the images of ``source`` by a CSV file (``read_table``, ``Rows``).

    Lines of other images are ignored, so one file may serve several sources; images without a line
    have no label. What is taken for names and labels is logged, and is in ``labels_from``.

    One column contains one class per image, a name or a number; several contain 1 or 0 for
    independent labels. Blank, NaN or negative is unknown. Classes are those in the whole file,
    numbers sorted numerically, names alphabetically.

    A column that ``reading.group`` of the source names defines the groups of images. Where there is
    no other, the source keeps its own labels.

    Args:
        columns: of labels; empty: chosen by ``label_columns``.

    Raises:
        UserError: the file cannot be read; no image has a line, an image several, or a line several
            images; a value is not allowed, or it is not clear which column has the labels.
    """
    table = with_header(read_table(path))
    group = group_column(table, source.reading.grouping)
    image, rows = image_column(table, source, [*columns, group])
    wanted = list(columns) or label_columns(table, image, group)
    try:
        found = rows.of(source, str(path), table.lines)
    except NothingFound as error:
        raise NothingFound(str(error), *error.options, *(["group"] if group else [])) from None
    if not wanted:
        source.groups = _groups(source, table, found, group)
        return source
    for name in wanted:
        allowed = ", ".join([name for name in table.header if name != image][:20])
        check(name in table.header, f"{path} has no column {name!r}; allowed: {allowed}")
    values, named = _values(table, wanted)
    missing = np.flatnonzero(found < 0)
    if len(missing):
        text = "warning: %s has no line for %s of %s images, which have no label; the first: %s"
        first = source.name(int(missing[0]))
        log.warning(text, path, f"{len(missing):,}", f"{len(source):,}", first)
    shown = ", ".join(wanted[:4]) + (f" and {len(wanted) - 4} more" if len(wanted) > 4 else "")
    origin = f"{'columns' if len(wanted) > 1 else 'column'} {shown} of {path.name}"
    taken = (image, group, *wanted)
    unused = ", ".join(name for name in table.header if name and name not in taken)
    text = "%s, for %s: labels from %s, images by column %s%s"
    log.info(text, path, source.spec, shown, image, f"; not used: {unused}" if unused else "")
    made = Labelled(source, f"{source.spec} labelled by {path}", named, values[found], origin)
    if group:
        made.groups = _groups(source, table, found, group)
    return made


def _values(table: CsvTable, columns: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of each line, and of none in a last row; names of the classes."""
    if len(columns) > 1:
        unknown = np.full((1, len(columns)), np.nan, dtype=np.float32)
        return np.concatenate([_outcomes(table, columns), unknown]), tuple(columns)
    numbers, named = _numbers(table, columns[0])
    return np.append(numbers, -1), named


def _groups(source: Source, table: CsvTable, rows: np.ndarray, column: str) -> np.ndarray:
    """Group of each image by a column, int64 (n,); ``rows``: of the images, -1 for none."""
    cells = [*table.column(column), ""]
    names = (cells[row] for row in rows.tolist())
    return numbered(source, names, f"column {column} of {table.path.name}")


def with_header(table: CsvTable) -> CsvTable:
    """The table; where its first line names an image, that is a row, and columns are numbered."""
    if not any(is_image_name(name) for name in table.header):
        return table
    numbered = [f"column {i + 1}" for i in range(len(table.header))]
    log.warning("warning: %s has no header: its columns are %s", table.path, ", ".join(numbered))
    lines = [table.lines[0] - 1, *table.lines]
    return replace(table, header=numbered, rows=[table.header, *table.rows], lines=lines)


def image_column(table: CsvTable, source: Source, taken: Sequence[str] = ()) -> tuple[str, Rows]:
    """Column that names the images, the one by which most of them are found, and its rows.

    Tried in this order: columns with a usual name, the first column, the others but ``taken``.
    """
    usual = {_plain(name): name for name in reversed(table.header)}
    first = [name for name in table.header[:1] if not _INDEX.fullmatch(name)]
    order = [usual[name] for name in _IMAGES if name in usual] + first + table.header
    best: tuple[float, str, Rows] | None = None
    for name in dict.fromkeys(order):
        if name in taken:
            continue
        rows = Rows(table.column(name))
        share = rows.share(source)
        if not share:
            rows = Rows(rows.names, short=True)
            share = rows.share(source)
        if best is None or share > best[0]:
            best = share, name, rows
        if share == 1:
            break
    check(best is not None, f"{table.path} has no column for the images' names")
    assert best is not None
    return best[1], best[2]


def label_columns(table: CsvTable, image: str, group: str = "") -> list[str]:
    """Columns of labels: the only further column; or all, where they are 1, 0 or blank; or the one
    with a usual name; or those of 1, 0 or blank; or the only one in which values recur.

    That of groups is none. Indices and columns on splits are left aside.

    Raises:
        UserError: none of this decides.
    """
    rest = [name for name in table.header if name not in (image, group)]
    if len(rest) == 1 or not rest:
        return rest
    usable = [n for n in rest if not _INDEX.fullmatch(n) and _plain(n) not in _ASIDE]
    binary = [name for name in usable if all(map(is_outcome, set(table.column(name))))]
    if len(usable) == 1 or (usable and len(binary) == len(usable)):
        return usable
    named = sorted(filter(is_label_name, usable), key=lambda n: LABEL_NAMES.index(n.lower()))
    if named:
        return named[:1]
    if len(binary) > 1:
        return binary
    likely = [name for name in usable if _recurs(table.column(name))]
    if len(likely) == 1:
        return likely
    some = ", ".join((likely or usable or rest)[:12])
    raise UserError(
        f"{table.path} has several columns that may be labels ({some}): name one with "
        "--data.label-column, or several that hold 1, 0, or nothing for unknown"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _recurs(cells: list[str]) -> bool:
    """True for values that may be classes, of which at least one occurs twice."""
    known = [cell for cell in cells if cell]
    try:
        classes_of(sorted(set(known)))
    except NoClasses:
        return False
    return len(set(known)) < len(known) and not any(map(_FRACTION.fullmatch, known))


def _numbers(table: CsvTable, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers of all rows, int64 (n,), -1 where unknown, and class names."""
    cells = table.column(column)
    distinct = sorted(set(cells))
    broken = [cell for cell in distinct if _FRACTION.fullmatch(cell)]
    check(
        not broken or 2 * len(distinct) <= len(cells),
        f"{table.path}: column {column!r} holds numbers such as {broken[:1]}, which are no classes",
    )
    try:
        numbers, classes = classes_of(distinct)
    except NoClasses as error:
        raise UserError(f"{table.path}: column {column!r} {error}") from None
    number = dict(zip(distinct, numbers.tolist(), strict=True))
    return np.array([number[cell] for cell in cells], dtype=np.int64), classes


def _outcomes(table: CsvTable, columns: Sequence[str]) -> np.ndarray:
    """Outcomes of independent labels, float32 (n, L): 1, 0, or NaN for unknown."""
    made = []
    for name in columns:
        cells = table.column(name)
        distinct = sorted(set(cells))
        strange = {cell for cell in distinct if not is_outcome(cell)}
        for cell, line in zip(cells, table.lines, strict=True):
            if cell in strange:
                there = f"{table.path}, line {line}: {name} is {cell!r}"
                raise UserError(f"{there}; several columns hold 1, 0, or nothing for unknown")
        place = {cell: i for i, cell in enumerate(distinct)}
        made.append(outcomes_of(distinct)[[place[cell] for cell in cells]])
    return np.stack(made, axis=1)


def align_classes(train: Source, val: Source) -> Source:
    """``val`` with the class numbers of ``train``: equal names are one class.

    Classes that only ``val`` has come after those of ``train``.

    Raises:
        UserError: they have no class in common, or not the same labels.
    """
    ours, theirs = train.classes, val.classes
    if ours is None or theirs is None or ours == theirs:
        return val
    if val.labels is None and val.targets is None:
        return val  # classes of objects or pixels, not of images
    if (train.targets is None) != (val.targets is None):
        return val  # one class an image here, several labels there: nothing to align
    common = [name for name in theirs if name in set(ours)]
    if val.targets is not None:
        check(
            len(common) == len(ours) == len(theirs),
            f"{val.spec} has the labels {', '.join(theirs[:8])}; {train.spec} has "
            f"{', '.join(ours[:8])}; both must have the same",
        )
        values = val.targets[:, [theirs.index(name) for name in ours]]
        return Labelled(val, val.spec, ours, values, val.labels_from)
    check(
        bool(common),
        f"class 0 is {ours[0]!r} in {train.spec} and {theirs[0]!r} in {val.spec}; "
        "both must have the same classes",
    )
    classes = ours + tuple(name for name in theirs if name not in set(ours))
    assert val.labels is not None
    number = {name: i for i, name in enumerate(classes)}
    place = np.array([*(number[name] for name in theirs), -1], dtype=np.int64)
    return Labelled(val, val.spec, classes, place[val.labels], val.labels_from)
