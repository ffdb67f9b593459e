"""File source: images as files below a folder, by their names within it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ssl_vit.data.base import Item, Source
from ssl_vit.data.names import Names
from ssl_vit.data.raster import BadImage


class FileSource(Source):
    """File source: image files below ``root``; ``files`` are their relative paths."""

    def __init__(self, spec: str, root: bytes, files: Names) -> None:
        self.spec, self.root, self.files = spec, root, files

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> bytes:
        """Path of the file of image i."""
        return os.path.join(self.root, self.files[i])

    def read(self, i: int) -> Item:
        with _readable(), open(self.path(i), "rb") as file:
            return file.read(), self.label(i)

    def stream(self, i: int) -> io.IOBase:
        with _readable():
            return open(self.name(i), "rb")  # as text: readers look at its extension

    def name(self, i: int) -> str:
        return os.fsdecode(self.path(i))

    def inner_name(self, i: int) -> str:
        return os.fsdecode(self.files[i])


@contextmanager
def _readable() -> Iterator[None]:
    """Errors of a disk, as those of an image."""
    try:
        yield
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
