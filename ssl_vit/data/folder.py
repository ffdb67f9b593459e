"""Folder source: images as files in folders."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Item, Names, Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.formats import EXTENSIONS
from ssl_vit.data.listing import Listing, identity

__all__ = ["EXTENSIONS", "FolderSource", "open_flat", "open_folder"]


class FolderSource(Source):
    """Folder source: image files below `root`; `files` are their relative paths."""

    def __init__(
        self,
        spec: str,
        root: bytes,
        files: Names,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ):
        self.spec, self.root, self.files = spec, root, files
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> Item:
        try:
            with open(os.path.join(self.root, self.files[i]), "rb") as file:
                return file.read(), self.label(i)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def stream(self, i: int) -> io.IOBase:
        try:
            return open(self.name(i), "rb")  # as text: readers look at its extension
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, i: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.files[i]))


def open_folder(spec: str, path: str) -> FolderSource:
    """Open `folder:PATH`: each top-level sub-folder is a class, at any depth below it.

    A sub-folder without images keeps its class number, so that parts of one data set agree.
    If there are images directly in PATH, sub-folders are not classes: all are unlabelled.

    Raises:
        UserError: PATH is not a readable folder, or contains no images.
    """
    root = _root(spec, path)
    listing = Listing(spec)
    top_images, folders = listing.list(root)
    if top_images or not folders:
        return open_flat(spec, path)
    counts: list[int] = []

    def files() -> Iterator[bytes]:
        for folder in folders:
            counts.append(0)
            for file in listing.walk(root, folder, (identity(root),)):
                counts[-1] += 1
                yield file

    names = _not_empty(listing, Names.of(files()))
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    classes = tuple(os.fsdecode(folder) for folder in folders)
    return FolderSource(spec, root, names, labels, classes)


def open_flat(spec: str, path: str) -> FolderSource:
    """Open `flat:PATH`: the images at any depth, unlabelled. Raises as `open_folder`."""
    root = _root(spec, path)
    listing = Listing(spec)
    return FolderSource(spec, root, _not_empty(listing, Names.of(listing.walk(root))))


def _root(spec: str, path: str) -> bytes:
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"{spec!r}: {path!r} {what}; a folder of images is needed")
    return os.fsencode(os.path.abspath(folder))


def _not_empty(listing: Listing, files: Names) -> Names:
    """The files of a listing, with a word on what was left out.

    Raises:
        UserError: there are none.
    """
    if not len(files):
        left = listing.left_out() or f"looked for files in {', '.join(EXTENSIONS)}"
        raise UserError(f"{listing.spec!r} holds no image; {left}")
    listing.tell()
    return files
