"""CSV tables as people have them: of pandas, R and Excel, in any usual dialect and encoding."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.common.errors import UserError, check

log = logging.getLogger("ssl_vit")
_DELIMITERS = ",;\t|"
_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
_KINDS = {
    b"PK\x03\x04": "an Excel workbook: save it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save it as CSV",
    b"PAR1": "a Parquet file: write it as CSV",
}


@dataclass(frozen=True)
class CsvTable:
    """CSV table: names of the columns, and rows with their line numbers."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Cells of a column, stripped."""
        place = self.header.index(name)
        return [row[place].strip() for row in self.rows]


def read_table(path: Path) -> CsvTable:
    """Read a whole CSV file, and check its shape.

    It is UTF-8, UTF-16 with a byte order mark, or else Windows-1252, which contains Latin-1 and is
    logged; separated by commas, semicolons, tabs or bars, the one of a line ``sep=;`` or the most
    frequent one of the header. Empty lines, and columns without a name and a value, are left out.

    Raises:
        UserError: it cannot be read, has no two columns, or a row has another number of cells than
            the header.
    """
    text = _read_text(path)
    first, *rest = re.split(r"\r\n|\r|\n", text, maxsplit=1)
    declared = found[1] if (found := _SEPARATOR.fullmatch(first.strip())) else ""
    text = "".join(rest) if declared else text
    delimiter = declared or max(_DELIMITERS, key=first.count)
    rows, lines = [], []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(reader.line_num + bool(declared))
    except csv.Error as error:
        raise UserError(f"the labels {path} are no CSV file: {error}") from None
    check(len(rows) > 1, f"{path} holds no labels: a header and a line for each image are needed")
    blank = [i for i, name in enumerate(rows[0]) if not name.strip() and _is_blank(rows, i)]
    rows = [[cell for i, cell in enumerate(row) if i not in blank] for row in rows]
    header = [name.strip() for name in rows[0]]
    check(len(header) > 1, f"{path}, line {lines[0]} is {header[0]!r}: it needs a name and a label")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    check(not twice, f"{path} has two columns named {twice[:1]}")
    for row, line in zip(rows, lines, strict=True):
        there = f"{path}, line {line} has {len(row)} cells"
        check(len(row) == len(header), f"{there}; the header has {len(header)}")
    return CsvTable(path, header, rows[1:], lines[1:])


def _is_blank(rows: list[list[str]], place: int) -> bool:
    """True for a column without a value, as Excel leaves them at the end."""
    return not any(row[place].strip() for row in rows if place < len(row))


def _read_text(path: Path) -> str:
    """Text of a file, by its byte order mark, as UTF-8, or as Windows-1252."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the labels {path}: {error.strerror or error}") from None
    for start, kind in _KINDS.items():
        check(not raw.startswith(start), f"the labels {path} are {kind}")
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ["utf-16"] if wide else ["utf-8-sig", "cp1252"]:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if encoding == "cp1252":
            log.warning("%s is not UTF-8: read as Windows-1252 (Latin-1)", path)
        return text
    raise UserError(f"the labels {path} are no text in UTF-8, UTF-16 or Windows-1252")
