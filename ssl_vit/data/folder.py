"""Folder source: images as files in folders."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Item, Names, Source
from ssl_vit.data.decode import BadImage

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "npy", "gif", "ppm", "pgm")
_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)


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
    top_images, folders = _list(spec, root)
    if top_images or not folders:
        return open_flat(spec, path)
    counts: list[int] = []

    def files() -> Iterator[bytes]:
        for folder in folders:
            counts.append(0)
            for file in _walk(spec, root, folder, (_identity(root),)):
                counts[-1] += 1
                yield file

    names = _not_empty(spec, Names.of(files()))
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    classes = tuple(os.fsdecode(folder) for folder in folders)
    return FolderSource(spec, root, names, labels, classes)


def open_flat(spec: str, path: str) -> FolderSource:
    """Open `flat:PATH`: the images at any depth, unlabelled. Raises as `open_folder`."""
    root = _root(spec, path)
    return FolderSource(spec, root, _not_empty(spec, Names.of(_walk(spec, root, b"", ()))))


def _root(spec: str, path: str) -> bytes:
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"{spec!r}: {path!r} {what}; a folder of images is needed")
    return os.fsencode(os.path.abspath(folder))


def _not_empty(spec: str, files: Names) -> Names:
    if not len(files):
        raise UserError(f"{spec!r} holds no image; looked for files in {', '.join(EXTENSIONS)}")
    return files


def _identity(folder: bytes) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _list(spec: str, folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """List the images and the sub-folders of a folder, each sorted by bytes.

    A broken link named like an image is listed: reading it reports the reason.
    """
    images: list[bytes] = []
    folders: list[bytes] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(_SUFFIXES):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(
            f"{spec!r}: cannot list {os.fsdecode(folder)!r}: {error.strerror}"
        ) from None
    return sorted(images), sorted(folders)


def _walk(
    spec: str, root: bytes, inside: bytes, above: tuple[tuple[int, int], ...]
) -> Iterator[bytes]:
    """Walk the images within `root`, below `inside`: a folder's own first, then its sub-folders'.

    `above` identifies the parent folders, so that links back to one of them are not followed.
    """
    folder = os.path.join(root, inside)
    here = _identity(folder)
    if here in above:
        return
    images, folders = _list(spec, folder)
    for image in images:
        yield os.path.join(inside, image)
    for sub_folder in folders:
        yield from _walk(spec, root, os.path.join(inside, sub_folder), (*above, here))
