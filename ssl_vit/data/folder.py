"""Folder source: images as files in folders."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.class_folders import (
    images_and_masks,
    refuse_masks,
    refuse_splits,
    splits_among,
    warn_masks,
    warn_odd_classes,
    why_no_classes,
)
from ssl_vit.data.files import FileSource
from ssl_vit.data.fingerprint import sample
from ssl_vit.data.formats import EXTENSIONS
from ssl_vit.data.listing import Listing, identity
from ssl_vit.data.names import Names

__all__ = ["EXTENSIONS", "FolderSource", "open_flat", "open_folder"]
log = logging.getLogger("ssl_vit")
_SIZES = 4096  # files whose sizes are in a fingerprint: all of a small folder


class FolderSource(FileSource):
    """Folder source: image files below `root`, perhaps with a label each."""

    def __init__(
        self,
        spec: str,
        root: bytes,
        files: Names,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        labels_from: str = "",
    ):
        super().__init__(spec, root, files)
        self.labels, self.classes, self.labels_from = labels, classes, labels_from

    def listing(self) -> Iterable[np.ndarray]:
        """Names of the files within the folder, and the sizes of up to ``_SIZES`` of them.

        To ask for the sizes of a million files would take minutes on a network disk.
        """
        chosen = sample(len(self), _SIZES)
        sizes = [self._size(i) for i in chosen]
        return self.files.buffer, self.files.ends, np.array(sizes, dtype=np.int64)

    def _size(self, i: int) -> int:
        """Bytes of a file; -1 if it is not there."""
        try:
            return os.stat(self.path(i)).st_size
        except OSError:
            return -1


def open_folder(spec: str, path: str, reading: ReadConfig | None = None) -> FolderSource:
    """Open `folder:PATH`: each top-level sub-folder is a class, at any depth below it.

    A sub-folder without images keeps its class number, so that parts of one data set agree. Few
    images directly in PATH are of no class; with many of them, or one sub-folder only, there are
    no classes (``why_no_classes``).

    Raises:
        UserError: PATH is not a readable folder, contains no images, or contains splits or masks.
    """
    root = _root(spec, path)
    listing = Listing(spec)
    beside, folders = listing.list(root)
    names = tuple(os.fsdecode(folder) for folder in folders)
    refuse_splits(spec, path, splits_among(names))
    both = images_and_masks(names)
    inner = both[0] if both else names[0] if names else ""
    within = _folders(spec, root, inner)
    if both or len(names) == 1:
        refuse_splits(spec, f"{path.rstrip('/')}/{inner}", splits_among(within))
    counts: list[int] = []

    def files() -> Iterator[bytes]:
        yield from beside
        for folder in folders:
            counts.append(0)
            for file in listing.walk(root, folder, (identity(root),)):
                counts[-1] += 1
                yield file

    found = _not_empty(listing, Names.of(files()))
    if both:
        refuse_masks(spec, path, both, found)
    warn_masks(spec, found)
    reason = why_no_classes(names, counts, len(beside), len(within))
    if reason:
        if len(names) > 1:
            log.warning("warning: %s is taken without labels: %s", spec, reason)
        return FolderSource(spec, root, found, labels_from=reason)
    warn_odd_classes(spec, names, {inner: splits_among(within)})
    if beside:
        first = os.fsdecode(beside[0])
        text = "warning: %s: %d of %d images lie beside the class folders (%s) and have no label"
        log.warning(text, spec, len(beside), len(found), first)
    labels = np.repeat(np.arange(-1, len(folders), dtype=np.int64), [len(beside), *counts])
    return FolderSource(spec, root, found, labels, names, "class folders")


def open_flat(spec: str, path: str, reading: ReadConfig | None = None) -> FolderSource:
    """Open `flat:PATH`: the images at any depth, unlabelled. Raises as `open_folder`."""
    source = all_images(spec, path)
    names = _folders(spec, source.root)
    if both := images_and_masks(names):
        refuse_masks(spec, path, both, source.files)
    warn_masks(spec, source.files)
    if splits := splits_among(names):
        log.warning("warning: %s takes the images of %s together", spec, ", ".join(splits))
    return source


def all_images(spec: str, path: str) -> FolderSource:
    """All images of a folder at any depth, unlabelled.

    Raises:
        UserError: it is not a readable folder, or contains no images.
    """
    root = _root(spec, path)
    listing = Listing(spec)
    files = _not_empty(listing, Names.of(listing.walk(root)))
    return FolderSource(spec, root, files, labels_from="flat: has no classes")


def _folders(spec: str, root: bytes, inside: str = "") -> list[str]:
    """Sub-folders of a folder."""
    place = os.path.join(root, os.fsencode(inside)) if inside else root
    return [os.fsdecode(folder) for folder in Listing(spec).list(place)[1]]


def _root(spec: str, path: str) -> bytes:
    folder = Path(path).expanduser()
    if any(mark in path for mark in "*?{") and not folder.exists():
        raise UserError(f"{spec!r}: one folder is needed, not a pattern; give the one above")
    if not path or not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        shard = f" (did you mean 'tar:{path}'?)" if ".tar" in folder.name else ""
        raise UserError(f"{spec!r}: {path!r} {what}; a folder of images is needed{shard}")
    return os.fsencode(os.path.abspath(folder))


def _not_empty(listing: Listing, files: Names) -> Names:
    """The files of a listing, with a word on what was left out.

    Raises:
        UserError: there are none.
    """
    if not len(files):
        left = listing.left_out() or f"looked for files in {', '.join(EXTENSIONS)}"
        raise UserError(f"{listing.spec!r} holds no image; {left}")
    listing.log()
    return files
