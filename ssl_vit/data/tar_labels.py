"""Labels of shards: what is taken for them among .cls files, keys of .json, and .txt files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.data.classes import LABEL_NAMES, NoClasses, class_of_each, outcomes_of
from ssl_vit.data.tar_index import ShardIndex
from ssl_vit.data.tar_samples import Rows

log = logging.getLogger("ssl_vit")


class ShardLabels(NamedTuple):
    """Labels of all samples as a source has them; ``member``: the extension they are read from."""

    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    labels_from: str = ""
    member: str = ""


def read_labels(
    spec: str,
    shards: Sequence[str],
    indexes: Sequence[ShardIndex],
    rows: Rows,
    columns: tuple[str, ...],
) -> ShardLabels:
    """Labels of the samples ``rows``: of ``columns``, or of the first usual column that has some.

    Raises:
        UserError: a column that was asked for is not there, or its values are no classes.
    """
    there = dict.fromkeys(name for index in indexes for name in index.values)
    if columns:
        return _asked(spec, indexes, rows, columns)
    order = (".cls", *LABEL_NAMES, ".txt")
    refused = []
    for name in sorted(there, key=lambda name: order.index(name.lower())):
        ids, values = _joined(indexes, rows, name)
        if not (ids >= 0).any():  # of members that belong to no image
            continue
        try:
            labels, classes = class_of_each(ids, values)
        except NoClasses as error:
            refused.append(f"{_place(name)} {error}")
            continue
        _warn_missing(spec, shards, rows, labels, name)
        return ShardLabels(labels, None, classes, _place(name), _member(name))
    keys = next((", ".join(index.keys) for index in indexes if index.keys), "")
    named = f" ({keys}); --data.label-column names one" if keys else ""
    nothing = "no .cls, and no label in .json or .txt" + named
    return ShardLabels(labels_from="; ".join(refused) or nothing)


def _member(name: str) -> str:
    """Extension of the members that hold a column."""
    return name[1:] if name.startswith(".") else "json"


def _place(name: str) -> str:
    return f"{name} of the shards" if name.startswith(".") else f"{name!r} in .json of the shards"


def _asked(
    spec: str, indexes: Sequence[ShardIndex], rows: Rows, columns: tuple[str, ...]
) -> ShardLabels:
    """Labels of the columns that were asked for: one of classes, or several of 1 and 0."""
    made = []
    there = {name for index in indexes for name in index.values}
    for asked in columns:
        name = asked if asked in there else f".{asked.removeprefix('.')}"
        ids, values = _joined(indexes, rows, name)
        if not (ids >= 0).any():
            raise UserError(
                f"--data.label-column is {asked!r}; no sample of {spec} has it, as a key of its "
                ".json or as an extension"
            )
        try:
            if len(columns) > 1:
                made.append(np.append(outcomes_of(values), np.float32("nan"))[ids])
                continue
            labels, classes = class_of_each(ids, values, asked=True)
            return ShardLabels(labels, None, classes, _place(name), _member(name))
        except NoClasses as error:
            raise UserError(f"--data.label-column {asked}: {_place(name)} {error}") from None
    origin = f"{', '.join(columns)} of the shards"
    return ShardLabels(None, np.stack(made, axis=1), columns, origin, "json")


def _joined(indexes: Sequence[ShardIndex], rows: Rows, name: str) -> tuple[np.ndarray, list[Any]]:
    """Values of a column over all shards: for each sample the index of its value, -1 for none."""
    ids: list[np.ndarray] = []
    values: list[Any] = []
    for index, own in zip(indexes, rows, strict=True):
        if name in index.labels:
            found = index.labels[name][own].astype(np.int64)
            ids.append(np.where(found < 0, -1, found + len(values)))
            values += index.values[name]
        else:
            ids.append(np.full(len(own), -1, dtype=np.int64))
    return np.concatenate(ids), values


def _warn_missing(
    spec: str, shards: Sequence[str], rows: Rows, labels: np.ndarray, name: str
) -> None:
    """Warn of samples without a label, where others have one."""
    missing = int((labels < 0).sum())
    if not missing:
        return
    ends = np.cumsum([len(own) for own in rows])
    parts = np.split(labels, ends[:-1])
    blind = [Path(s).name for s, own in zip(shards, parts, strict=True) if (own < 0).all()]
    whole = f", of {len(blind)} of {len(shards)} shards none has ({blind[0]})" if blind else ""
    text = "warning: %s: %s of %s samples have no label in %s%s"
    log.warning(text, spec, f"{missing:,}", f"{len(labels):,}", _place(name), whole)
