"""Feature files: .npz, .parquet and .npy, written part by part with names, labels and a card."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ssl_vit.common.files import write_atomically, write_text_atomically
from ssl_vit.data.base import Source
from ssl_vit.evaluators.feature_parts import Parts

_KEY = b"ssl_vit"  # of the card in a .parquet file
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip file: the same rows, the same bytes


@dataclass(frozen=True)
class FeatureTable:
    """Table of features: one row for each readable image of ``source``, in its order.

    ``card``: how the features were made, JSON-serialisable; the table adds the number of rows and
    the images left out.
    """

    source: Source
    parts: Parts
    card: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each feature of an image."""
        return self.parts.layout.shapes

    @property
    def numbers(self) -> range:
        """Numbers of the parts."""
        return range(self.parts.layout.parts)

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(self.parts.index(part)) for part in self.numbers)

    @cached_property
    def unreadable(self) -> list[str]:
        """The images that are left out, each with the reason."""
        return [readable(why) for part in self.numbers for why in self.parts.bad(part).values()]

    @property
    def text(self) -> str:
        """The whole card, as JSON."""
        return json.dumps(self.card | {"rows": self.rows, "unreadable": self.unreadable}, indent=1)

    def feature(self, name: str) -> Iterator[np.ndarray]:
        """One feature, float32 (n, ...), part by part."""
        return (self.parts.read(part, name) for part in self.numbers)

    def names(self) -> Iterator[list[str]]:
        """Names of the images, part by part."""
        for part in self.numbers:
            yield [readable(self.source.name(i)) for i in self.parts.index(part).tolist()]

    def labels(self) -> Iterator[np.ndarray] | None:
        """Classes, int64 (n,), or several labels, float32 (n, L), part by part; None without."""
        known = self.source.labels if self.source.targets is None else self.source.targets
        if known is None:
            return None
        return (known[self.parts.index(part)] for part in self.numbers)


def readable(name: str) -> str:
    """A name as UTF-8 can hold it: bytes of a file's name that are none are written as escapes."""
    return name.encode(errors="backslashreplace").decode()


# --- .npz ---------------------------------------------------------------------------------------


def write_npz(path: Path, table: FeatureTable) -> None:
    """Write ``names``, ``labels``, ``classes``, each feature and ``card`` for ``numpy.load``.

    Text is compressed: numpy takes four bytes for each character of the longest name.
    """
    with zipfile.ZipFile(path, "w") as file:
        width = max((len(name) for part in table.names() for name in part), default=0)
        kind = np.dtype(f"<U{max(1, width)}")
        names = (np.array(part, dtype=kind) for part in table.names())
        _member(file, "names", kind, (table.rows,), names, zipfile.ZIP_DEFLATED)
        if (labels := table.labels()) is not None:
            several = table.source.targets
            shape = () if several is None else several.shape[1:]
            kind = np.dtype("<i8" if several is None else "<f4")
            _member(file, "labels", kind, (table.rows, *shape), labels)
            _text(file, "classes", np.array(table.source.classes or (), dtype=str))
        for name, shape in table.shapes.items():
            rows = table.feature(name)
            _member(file, name, np.dtype("<f4"), (table.rows, *shape), rows)
        _text(file, "card", np.array(table.text))


def _member(
    file: zipfile.ZipFile,
    name: str,
    kind: np.dtype[Any],
    shape: tuple[int, ...],
    parts: Iterable[np.ndarray],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    about = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    about.compress_type = compression
    with file.open(about, "w", force_zip64=True) as stream:
        _array(stream, kind, shape, parts)


def _text(file: zipfile.ZipFile, name: str, text: np.ndarray) -> None:
    _member(file, name, text.dtype, text.shape, [text], zipfile.ZIP_DEFLATED)


def _array(
    stream: IO[bytes] | io.BufferedIOBase,
    kind: np.dtype[Any],
    shape: tuple[int, ...],
    parts: Iterable[np.ndarray],
) -> None:
    """Write numpy's own format, a part at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in parts:
        stream.write(np.ascontiguousarray(part, dtype=kind).tobytes())


def _npz_card(path: Path) -> str:
    with np.load(path) as file:
        return str(file["card"])


# --- .parquet -----------------------------------------------------------------------------------


def write_parquet(path: Path, table: FeatureTable) -> None:
    """Write columns ``name``, ``label``, ``class`` (or ``labels``) and each feature as a list of
    fixed size, a row group for each part; the card is in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {"name": pa.string()}
    several = table.source.targets
    if several is not None:
        kinds["labels"] = pa.list_(pa.float32(), several.shape[1])
    elif table.source.labels is not None:
        kinds |= {"label": pa.int64(), "class": pa.string()}
    plain = list(kinds)
    for name, shape in table.shapes.items():
        kinds[name] = pa.list_(pa.float32(), int(np.prod(shape)))
    schema = pa.schema(list(kinds.items()), metadata={_KEY: table.text})
    how: dict[str, Any] = {"compression": dict.fromkeys(plain, "zstd")}
    # Statistics and dictionaries of features would take time and room for nothing.
    how |= {"use_dictionary": plain, "write_statistics": plain}
    with pq.ParquetWriter(path, schema, **how) as file:
        labels = table.labels()
        for part, names in zip(table.numbers, table.names(), strict=True):
            columns: list[Any] = [pa.array(names, pa.string())]
            if labels is not None:
                columns += _label_columns(next(labels), table.source.classes or ())
            columns += [_lists(table.parts.read(part, name)) for name in table.shapes]
            rows = pa.record_batch(columns, schema=schema)
            file.write_batch(rows, row_group_size=max(1, len(names)))


def _label_columns(labels: np.ndarray, classes: tuple[str, ...]) -> list[Any]:
    import pyarrow as pa

    if labels.ndim == 2:
        return [_lists(labels)]
    named = [classes[label] if label >= 0 else None for label in labels.tolist()]
    return [pa.array(labels, mask=labels < 0), pa.array(named, pa.string())]


def _lists(rows: np.ndarray) -> Any:
    """Rows (n, ...) as lists of fixed size."""
    import pyarrow as pa

    size = int(np.prod(rows.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), size)


def _parquet_card(path: Path) -> str:
    import pyarrow.parquet as pq

    return str((pq.read_schema(path).metadata or {})[_KEY].decode())


# --- .npy ---------------------------------------------------------------------------------------


def beside(path: Path) -> tuple[Path, Path]:
    """Files beside ``x.npy``: ``x.npy.csv`` with names and labels, and ``x.npy.json``, the card."""
    return path.with_name(f"{path.name}.csv"), path.with_name(f"{path.name}.json")


def write_npy(path: Path, table: FeatureTable) -> None:
    """Write the only feature as one array."""
    ((name, shape),) = table.shapes.items()
    with open(path, "wb") as file:
        _array(file, np.dtype("<f4"), (table.rows, *shape), table.feature(name))


def write_beside(path: Path, table: FeatureTable) -> None:
    """Write the files beside a .npy file, atomically, for the array that is not there yet.

    The CSV has columns ``name``, ``label`` and ``class``, blank where unknown, or one for each of
    several labels: it is one that ``--data.labels`` reads.
    """
    rows, card = beside(path)
    path.unlink(missing_ok=True)  # an array of other rows than these
    write_atomically(rows, lambda temporary: _write_rows(temporary, table))
    write_text_atomically(card, table.text + "\n")


def _write_rows(path: Path, table: FeatureTable) -> None:
    classes = table.source.classes or ()
    with open(path, "w", newline="", encoding="utf-8") as stream:
        file = csv.writer(stream, lineterminator="\n")
        labels = table.labels()
        several = table.source.targets is not None
        rest = [] if labels is None else list(classes) if several else ["label", "class"]
        file.writerow(["name", *rest])
        for names in table.names():
            known = [] if labels is None else next(labels).tolist()
            cells = [_cells(label, classes) for label in known] or [[]] * len(names)
            file.writerows([name, *own] for name, own in zip(names, cells, strict=True))


def _cells(label: int | list[float], classes: tuple[str, ...]) -> list[Any]:
    if isinstance(label, list):
        return ["" if value != value else int(value) for value in label]
    return [label, classes[label]] if label >= 0 else ["", ""]


def _npy_card(path: Path) -> str:
    return beside(path)[1].read_text(encoding="utf-8")


# --- all ----------------------------------------------------------------------------------------


class Format(NamedTuple):
    """Format of a feature file: how it is written, and its card read.

    ``first``: writes what lies beside the file, before it.
    """

    write: Callable[[Path, FeatureTable], None]
    card: Callable[[Path], str]
    first: Callable[[Path, FeatureTable], None] | None = None


FORMATS = {
    ".npz": Format(write_npz, _npz_card),
    ".parquet": Format(write_parquet, _parquet_card),
    ".npy": Format(write_npy, _npy_card, first=write_beside),
}


def write_features(path: Path, table: FeatureTable) -> None:
    """Write a feature file of the format that its name says; it is complete or absent."""
    form = FORMATS[path.suffix]
    if form.first:
        form.first(path, table)
    write_atomically(path, lambda temporary: form.write(temporary, table))


def read_card(path: Path) -> dict[str, Any] | None:
    """Card of a feature file; None of a file that :func:`write_features` has not written."""
    try:
        card = json.loads(FORMATS[path.suffix].card(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile):
        return None
    return dict(card) if isinstance(card, dict) else None
