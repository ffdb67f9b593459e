"""Folder listing: which files are images, and a report of the others.

A file with an image's extension is taken by its name, and one of text, tables, archives and the
like is not. Of any other file the first bytes decide, which costs opening it: some 20 us on a local
disk, a round trip on a network one. Where the first ``_LOOKS`` files of an extension are no images,
the rest of that extension is not opened.
"""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator

from ssl_vit.common.errors import UserError
from ssl_vit.data.formats import EXTENSIONS, HEAD, format_of

_log = logging.getLogger("ssl_vit")
_LOOKS = 1000
_TAKEN = frozenset(b"." + extension.encode() for extension in EXTENSIONS)
# Formats that need an optional library: its module, the extra that installs it, and extensions.
_OPTIONAL = {
    "HEIF": ("pillow_heif", "heif", (b"heic", b"heif", b"hif")),
    "DICOM": ("pydicom", "dicom", (b"dcm", b"dicom")),
}
# Begin like an image, and are not the image that they are of: raw data of cameras, of which a
# reader of TIFF finds the thumbnail, and files that are not complete or a copy.
_NOT_TAKEN = frozenset(
    b"dng nef nrw cr2 arw srf sr2 orf rw2 pef srw 3fr iiq erf kdc dcr mos mef fff rwl "
    b"part partial crdownload download tmp temp bak orig old swp".split()
)
# Not opened either: they lie beside images by the million, as captions, labels and boxes.
_OTHER = frozenset(
    b"txt xml json jsonl geojson csv tsv yaml yml toml ini cfg md rst html htm log cls caption "
    b"py ipynb sh js pdf doc docx xls xlsx pkl pickle pt pth safetensors npz mat h5 hdf5 parquet "
    b"zip tar gz tgz bz2 xz zst 7z rar db sqlite mp4 avi mov mkv webm wav mp3".split()
)
# What storage boxes, archives and desktops leave beside images; hidden names are skipped besides.
_JUNK = frozenset(
    b"@eadir __macosx #recycle #snapshot $recycle.bin lost+found thumbs.db ehthumbs.db "
    b"desktop.ini dicomdir".split()
) | {b"system volume information"}
_SHOWN = 6


def is_junk(name: bytes) -> bool:
    """True for hidden names, and for thumbnails and the like that no user has put there."""
    return name.startswith(b".") or name.lower() in _JUNK


def is_unclear(extension: bytes) -> bool:
    """True for an extension, in lower case, of which the content decides whether it is an image."""
    return extension not in _TAKEN and extension not in _OTHER and extension not in _NOT_TAKEN


class Listing:
    """Listing of the images below a folder, and a count of what was passed over.

    ``spec``: the source, for errors.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.images = 0
        self.passed: Counter[bytes] = Counter()
        self.lacking: Counter[tuple[str, bytes]] = Counter()
        self._looked: Counter[bytes] = Counter()
        self._found: set[bytes] = set()
        self._absent = {
            kind: extensions
            for kind, (module, _, extensions) in _OPTIONAL.items()
            if importlib.util.find_spec(module) is None
        }

    def list(self, folder: bytes) -> tuple[list[bytes], list[bytes]]:
        """List the images and the sub-folders of a folder, each sorted by bytes.

        A broken link named like an image is listed: reading it reports the reason.

        Raises:
            UserError: the folder cannot be listed.
        """
        images: list[bytes] = []
        others: list[os.DirEntry[bytes]] = []
        folders: list[bytes] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        if name.lower() not in _JUNK:
                            folders.append(name)
                    elif name[name.rfind(b".") :].lower() in _TAKEN:
                        images.append(name)
                    elif name.lower() not in _JUNK:
                        others.append(entry)
        except OSError as error:
            raise UserError(
                f"{self.spec!r}: cannot list {os.fsdecode(folder)!r}: {error.strerror}"
            ) from None
        if self._absent:
            images = [name for name in images if not self._lacks(_extension(name))]
        images += [entry.name for entry in others if self._is_image(entry)]
        self.images += len(images)
        return sorted(images), sorted(folders)

    def _lacks(self, extension: bytes) -> bool:
        """True if an image, by its name, needs a library that is absent; it is counted then."""
        kinds = [kind for kind, own in self._absent.items() if extension in own]
        self.lacking.update((kind, extension) for kind in kinds)
        return bool(kinds)

    def _is_image(self, entry: "os.DirEntry[bytes]") -> bool:
        """True if a file with none of the extensions is an image; it is counted if it is not."""
        extension = _extension(entry.name)
        opened = is_unclear(extension) and entry.is_file()
        kind = self._look(extension, entry) if opened else ""
        if kind in self._absent:
            self.lacking[kind, extension] += 1
        elif not kind:
            self.passed[extension] += 1
        return bool(kind) and kind not in self._absent

    def _look(self, extension: bytes, entry: "os.DirEntry[bytes]") -> str:
        """Format of a file by its first bytes; empty for none, and where none was ever found."""
        if extension not in self._found and self._looked[extension] >= _LOOKS:
            return ""
        self._looked[extension] += 1
        try:
            with open(entry.path, "rb", buffering=0) as file:
                kind = format_of(file.read(HEAD))
        except OSError:
            return ""
        if kind:
            self._found.add(extension)
        return kind

    def walk(
        self, root: bytes, inside: bytes = b"", above: tuple[tuple[int, int], ...] = ()
    ) -> Iterator[bytes]:
        """Walk the images in ``root``, below ``inside``: a folder's own, then its sub-folders'.

        ``above`` identifies the parent folders, so that links back to one are not followed.
        """
        folder = os.path.join(root, inside)
        here = identity(folder)
        if here in above:
            return
        images, folders = self.list(folder)
        for image in images:
            yield os.path.join(inside, image)
        for sub_folder in folders:
            yield from self.walk(root, os.path.join(inside, sub_folder), (*above, here))

    def left_out(self) -> str:
        """Files left out, in words; empty if there are none."""
        parts = []
        if self.passed:
            count = self.passed.total()
            are = "file is no image and was" if count == 1 else "files are no images and were"
            parts.append(f"{count:,} {are} passed over: {_by_extension(self.passed)}")
        for kind in self._absent:
            own = Counter({name: n for (of, name), n in self.lacking.items() if of == kind})
            if count := own.total():
                need = "image needs" if count == 1 else "images need"
                install = f"pip install 'ssl_vit[{_OPTIONAL[kind][1]}]'"
                named = _by_extension(own)
                parts.append(f"{count:,} {need} {install} and were left out: {named}")
        return "; ".join(parts)

    def log(self) -> None:
        """Log once what was left out: a warning where it is more than one file in a hundred."""
        if text := self.left_out():
            count = self.passed.total() + self.lacking.total()
            grave = count > 1 and (self.lacking or 100 * count > self.images)
            _log.log(logging.WARNING if grave else logging.INFO, "%s: %s", self.spec, text)


def identity(folder: bytes) -> tuple[int, int]:
    """Identify a folder, however it is reached.

    Raises:
        OSError: there is none.
    """
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _extension(name: bytes) -> bytes:
    """Extension in lower case, without its dot; empty if there is none."""
    return name.rpartition(b".")[2].lower() if b"." in name else b""


def _by_extension(counts: Counter[bytes]) -> str:
    """``8 .txt, 4 .xml``, the most frequent first."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [
        f"{n:,} {'.' + os.fsdecode(e) if e else 'without extension'}" for e, n in most[:_SHOWN]
    ]
    rest = sum(n for _, n in most[_SHOWN:])
    return ", ".join([*named, *([f"{rest:,} others"] if rest else [])])
