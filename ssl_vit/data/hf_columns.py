"""Columns of a Hugging Face data set: which holds the images, and which the labels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.data.classes import (
    LABEL_NAMES,
    NoClasses,
    class_of_each,
    classes_of,
    is_label_name,
    outcomes_of,
)
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.matching import is_image_name

log = logging.getLogger("ssl_vit")
_TRIED = 20


class ColumnLabels(NamedTuple):
    """Labels as a source has them."""

    labels: np.ndarray | None
    targets: np.ndarray | None
    classes: tuple[str, ...] | None
    labels_from: str


def image_column(spec: str, dataset: Any, asked: str) -> str:
    """Column of the images: an Image, encoded bytes (also with a path), or paths of files.

    Raises:
        UserError: there is none, or the one asked for cannot be read.
    """
    features = dataset.features
    if asked:
        hint = did_you_mean(asked, features)
        known = f"{spec} has {', '.join(features)}"
        check(asked in features, f"--data.image is {asked!r}; {known}{hint}")
        reason = _why_no_image(dataset, asked)
        check(not reason, f"--data.image is {asked!r}, which {reason}")
        return asked
    import datasets

    first = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    found = first or [column for column in features if not _why_no_image(dataset, column)]
    if not found:
        reasons = [f"{column} {_why_no_image(dataset, column)}" for column in features]
        reasons.sort(key=lambda reason: " holds " not in reason)
        raise UserError(f"{spec!r} has no image column, only: {', '.join(features)}; {reasons[0]}")
    if len(found) > 1:
        text = "%s: images of column %r are taken, not of %s; --data.image chooses"
        log.info(text, spec, found[0], ", ".join(found[1:]))
    return found[0]


def _why_no_image(dataset: Any, column: str) -> str:
    """Reason why a column cannot be read as images; empty if it can."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return ""
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return "holds several images a row"
    if isinstance(feature, dict) and "bytes" in feature:
        return ""
    kind = str(getattr(feature, "dtype", ""))
    values = _some(dataset, column) if kind in ("binary", "large_binary", "string") else []
    if values and all(_is_image(value) for value in values):
        return ""
    if kind == "string" and any("://" in value for value in values):
        return "holds addresses; download the images first"
    return f"is {feature}; an image is encoded bytes, a path, or datasets.Image()"


def _some(dataset: Any, column: str) -> list[Any]:
    """Values of a column that are not None, some of them."""
    head = dataset.select_columns([column])[:_TRIED][column]
    return [value for value in head if value is not None]


def _is_image(value: bytes | str) -> bool:
    if isinstance(value, str):
        return "://" not in value and is_image_name(value)
    return format_of(value[:HEAD]) != ""


def image_folder(spec: str, dataset: Any, column: str, folder: Path) -> Path:
    """Folder of images given by paths: the one that has the first of them, this or ``folder``."""
    if getattr(dataset.features[column], "dtype", "") != "string":
        return Path()
    path = _some(dataset, column)[0]
    found = next((place for place in (Path(), folder) if (place / path).is_file()), None)
    if found is None:
        where = f", nor in {folder}" if folder.is_dir() else ""
        raise UserError(f"{spec!r}: column {column!r} names files; there is no {path} here{where}")
    return found


def read_labels(spec: str, dataset: Any, image: str, asked: tuple[str, ...]) -> ColumnLabels:
    """Labels of the columns asked for, or of the one that is made for them or named so.

    Raises:
        UserError: a column that was asked for is not there, or its values are no classes.
    """
    for name in asked:
        known = f"{spec} has {', '.join(dataset.features)}"
        check(name in dataset.features, f"--data.label-column is {name!r}; {known}")
    if len(asked) > 1:
        return _several(dataset, asked)
    refused = []
    columns = asked or _label_columns(dataset, image)
    for name in columns:
        try:
            made = _of_column(dataset, name, bool(asked))
        except NoClasses as error:
            check(not asked, f"--data.label-column is {name!r}, which {error}")
            refused.append(f"column {name!r} {error}")
            continue
        _log_choice(spec, made, name, [other for other in columns if other != name])
        return made
    rest = ", ".join(name for name in dataset.features if name != image)
    others = f"no column is named 'label' or the like ({rest}); --data.label-column names one"
    nothing = others if rest else "it has no other column"
    return ColumnLabels(None, None, None, "; ".join(refused) or nothing)


def _label_columns(dataset: Any, image: str) -> list[str]:
    """Columns that may hold labels: ClassLabel ones, then by their names."""
    import datasets

    features = {name: f for name, f in dataset.features.items() if name != image}
    made = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    lists = [n for n, f in features.items() if isinstance(_inner(f), datasets.ClassLabel)]
    named = sorted(
        filter(is_label_name, features), key=lambda name: LABEL_NAMES.index(name.lower())
    )
    return list(dict.fromkeys([*made, *named, *lists]))


def _inner(feature: Any) -> Any:
    """Feature of a list's items; None for other features."""
    return getattr(feature, "feature", None)


def _log_choice(spec: str, made: ColumnLabels, name: str, others: list[str]) -> None:
    if others:
        text = "%s: labels of column %r are taken, not of %s; --data.label-column chooses"
        log.info(text, spec, name, ", ".join(others))
    if made.labels is not None and (missing := int((made.labels < 0).sum())):
        text = "warning: %s: %s of %s rows have no label in column %r"
        log.warning(text, spec, f"{missing:,}", f"{len(made.labels):,}", name)


def _of_column(dataset: Any, name: str, asked: bool) -> ColumnLabels:
    """Labels of one column: numbers or names, or lists of them, of several labels an image."""
    feature, origin = dataset.features[name], f"column {name!r}"
    column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if _inner(feature) is not None:
        names = getattr(_inner(feature), "names", None)
        targets, classes = _of_lists(column.to_pylist(), names)
        return ColumnLabels(None, targets, classes, origin)
    names = getattr(feature, "names", None)
    if names is not None:
        labels = np.maximum(column.fill_null(-1).to_numpy().astype(np.int64), -1)
        if not (labels >= 0).any():
            raise NoClasses("holds no label")
        return ColumnLabels(labels, None, tuple(names), origin)
    labels, classes = class_of_each(*_distinct(column, name), asked=asked)
    return ColumnLabels(labels, None, classes, origin)


def _distinct(column: Any, name: str) -> tuple[np.ndarray, list[Any]]:
    """Index of each row's value among the distinct ones, -1 for null; and these."""
    try:
        coded = column.combine_chunks().dictionary_encode()
    except Exception as error:  # pyarrow's own, for nested types
        raise NoClasses(f"holds {column.type}, which are no classes") from error
    coded = coded.combine_chunks() if hasattr(coded, "chunks") else coded
    ids = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return ids, coded.dictionary.to_pylist()


def _of_lists(rows: list[list[Any] | None], names: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets of lists of classes, or of lists of 1 and 0, which then all have one length."""
    known = [row for row in rows if row is not None]
    values = sorted({value for row in known for value in row if value is not None}, key=str)
    lengths = {len(row) for row in known}
    if names is None and len(lengths) == 1 and min(lengths) > 1 and set(values) <= {0, 1}:
        width = lengths.pop()
        blank = [None] * width
        made = [outcomes_of(blank if row is None else row) for row in rows]
        return np.stack(made), tuple(map(str, range(width)))
    if names is None:
        numbers, classes = classes_of(values)
        number = dict(zip(values, numbers.tolist(), strict=True))
    else:
        number, classes = {i: i for i in range(len(names))}, tuple(names)
    targets = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for target, row in zip(targets, rows, strict=True):
        if row is None:
            target[:] = np.nan
        else:
            target[[number[value] for value in row if number.get(value, -1) >= 0]] = 1
    return targets, classes


def _several(dataset: Any, columns: tuple[str, ...]) -> ColumnLabels:
    """Several labels an image: a column of 1 and 0 for each."""
    made = []
    for name in columns:
        column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        try:
            ids, values = _distinct(column, name)
            made.append(np.append(outcomes_of(values), np.float32("nan"))[ids])
        except NoClasses as error:
            raise UserError(f"--data.label-column {name} {error}") from None
    return ColumnLabels(None, np.stack(made, axis=1), columns, f"columns {', '.join(columns)}")
