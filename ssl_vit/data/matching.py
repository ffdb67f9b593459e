"""Matching: images and the rows of a table that name them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ssl_vit.common.errors import NothingFound, UserError, check
from ssl_vit.data.base import Source
from ssl_vit.data.formats import EXTENSIONS

_TRIED = 200


class Rows:
    """Rows of a table by the names they give; a name may be a path, and lack its extension.

    It is any suffix of the source's name for an image that starts after a slash (so the file name,
    or the path within a folder), or a tar sample's key; the image extension may be missing on
    either side. ``short``: without the folder that all names begin with, as of another disk.
    """

    def __init__(self, names: Sequence[str], short: bool = False) -> None:
        self.names = [name.replace("\\", "/").removeprefix("./") for name in names]
        if short:
            start = len(_common_folder(self.names))
            self.names = [name[start:] for name in self.names]
        self.exact = _places(self.names)
        self.bare = _places([_bare(name) for name in self.names])
        self.depths = sorted({name.count("/") + 1 for name in self.names}, reverse=True)

    def find(self, name: str) -> list[int]:
        """Rows of an image: by the longest suffix of its name, first with its extension."""
        # A tar sample is "SHARD.tar:KEY"; other names are kept whole.
        pieces, key = name.split("/"), name.rpartition(".tar:")[2].split("/")
        ends = ["/".join(whole[-depth:]) for depth in self.depths for whole in (pieces, key)]
        for end in ends:
            if end in self.exact:
                return self.exact[end]
        return next((self.bare[_bare(end)] for end in ends if _bare(end) in self.bare), [])

    def share(self, source: Source) -> float:
        """Share of some images, evenly spread over the source, that have a row."""
        tried = np.unique(np.linspace(0, len(source) - 1, _TRIED).round().astype(int))
        return float(np.mean([bool(self.find(source.name(int(i)))) for i in tried]))

    def of(self, source: Source, where: str, lines: Sequence[int]) -> np.ndarray:
        """Row of each image, int64 (n,), -1 for those without.

        Args:
            where, lines: the table's path and its rows' line numbers, for messages.

        Raises:
            UserError: no image has a row, an image has several, or a row several images.
        """
        rows = np.full(len(source), -1, dtype=np.int64)
        image_of = np.full(len(self.names), -1, dtype=np.int64)
        for i in range(len(source)):
            name = source.name(i)
            found = self.find(name)
            if not found:
                continue
            both = " and ".join(str(lines[row]) for row in found[:2])
            check(len(found) == 1, f"{name}: lines {both} of {where} both name it")
            row, other = found[0], int(image_of[found[0]])
            if other >= 0:
                there = f"{where}, line {lines[row]}: {self.names[row]!r} may be"
                raise UserError(f"{there} {source.name(other)} or {name}; give more of the path")
            rows[i], image_of[row] = row, i
        if not (rows >= 0).any():
            raise NothingFound(
                f"{where} has no line for any of {len(source):,} images; first: {source.name(0)}, "
                f"and in the file: {self.names[0]}",
                "labels",
            )
        return rows


def _common_folder(names: Sequence[str]) -> str:
    """Leading folders that all names have, with the last slash; empty if they differ."""
    ends = [min(names), max(names)]  # what these begin with, all between them do
    folder, slash, _ = os.path.commonprefix(ends).rpartition("/")  # noqa: RUF071
    return folder + slash


def is_image_name(text: str) -> bool:
    """True for a name with the extension of an image."""
    return os.path.splitext(text.strip())[1][1:].lower() in EXTENSIONS


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Index of names: the positions of each."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return places


def _bare(name: str) -> str:
    """Name without an image extension; other dots belong to the name."""
    return os.path.splitext(name)[0] if is_image_name(name) else name
