"""Windows: parts of an image that are read without the rest of it.

Of a TIFF (``tiff_window``) and of a NPY file the part alone is read. Files of other formats are
decoded as a whole, which is kept for the next windows.
"""

import contextlib
import os
import threading
from typing import Any, Literal

import numpy as np
import torch

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Source
from ssl_vit.data.decode import array_planes, channels_last, decode, from_array, npy_header
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.raster import BadImage, Box, reason, to_tensor, wanted
from ssl_vit.data.recent import Recent

# What a process keeps of the last used files: open ones, images decoded as a whole, and decoded
# strips and tiles of TIFFs of which the windows needed only a part.
_FILES, _IMAGES, _PARTS = 8, 1 << 28, 1 << 26


class FileWindows:
    """An image that is read in parts; ``size``: height and width; ``held``: bytes in memory."""

    size: tuple[int, int]
    held: int = 0

    def read(self, box: Box) -> torch.Tensor:
        """A part of the image (C, h, w), as ``decode`` makes the whole.

        Raises:
            BadImage: it cannot be decoded.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open."""


class OpenFiles:
    """Files of a source that a process has open, the last used ones; each thread has its own."""

    def __init__(self, source: Source, channels: int) -> None:
        self.source, self.channels = source, channels
        self.own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "channels": self.channels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, own=threading.local())

    def windows(self, file: int, reading: ReadConfig) -> FileWindows:
        """An image of a file of the source, opened unless it is.

        Raises:
            BadImage: it cannot be opened.
        """
        files, parts = self._mine()
        key = file, reading.slices
        found = files.find(key)
        if found is None:
            with contextlib.ExitStack() as stack:
                stream = stack.enter_context(self.source.stream(file))
                found = open_windows(stream, self.channels, reading, parts)
                if found.held:  # decoded as a whole
                    files.keep(key, found, found.held)
                else:
                    stack.pop_all()
                    files.keep(key, found, 0)
        return found

    def _mine(self) -> tuple[Recent[FileWindows], Recent[np.ndarray]]:
        """Files of this thread of this process: a forked one shares the position of a file with
        its parent, and must open its own."""
        if getattr(self.own, "process", None) != os.getpid():
            parts: Recent[np.ndarray] = Recent(1 << 12, _PARTS)

            def drop(windows: FileWindows) -> None:
                windows.close()
                parts.clear()  # they are known by the number of a file, which a next one may get

            self.own.process = os.getpid()
            self.own.kept = Recent(_FILES, _IMAGES, drop), parts
        return self.own.kept


def open_windows(
    stream: Any, channels: int, reading: ReadConfig, parts: Recent[np.ndarray]
) -> FileWindows:
    """Open the image of a file that ``reading`` asks for.

    Raises:
        BadImage: it cannot be opened.
    """
    try:
        kind = format_of(stream.read(HEAD))
        stream.seek(0)
        if kind == "TIFF":
            return _open_tiff(stream, channels, reading, parts)
        if kind == "NPY" and not reading.level:
            return ArrayWindows(stream, channels, reading)
        return WholeWindows(decode(stream.read(), channels, reading))
    except BadImage:
        raise
    except Exception as error:  # decoders raise all kinds
        raise BadImage(reason(error)) from error


def _open_tiff(
    stream: Any, channels: int, reading: ReadConfig, parts: Recent[np.ndarray]
) -> FileWindows:
    from ssl_vit.data.tiff import Plane, open_tiff

    plane = Plane.of(open_tiff(stream), channels, reading)
    if plane.by_window:
        return TiffWindows(stream, plane, channels, parts)
    return WholeWindows(to_tensor(plane.read(), channels))


class TiffWindows(FileWindows):
    """Windows of a plane of a TIFF."""

    def __init__(self, stream: Any, plane: Any, channels: int, parts: Recent[np.ndarray]) -> None:
        self.stream, self.plane, self.channels, self.parts = stream, plane, channels, parts
        self.size = plane.size

    def read(self, box: Box) -> torch.Tensor:
        return to_tensor(self.plane.read(box, self.parts), self.channels)

    def close(self) -> None:
        self.plane.file.close()
        self.stream.close()


class ArrayWindows(FileWindows):
    """Windows of the array of a NPY file, which is mapped into memory for each."""

    def __init__(self, stream: Any, channels: int, reading: ReadConfig) -> None:
        self.stream, self.channels, self.reading = stream, channels, reading
        self.shape, fortran, self.kind = npy_header(stream)
        if self.kind.hasobject:
            raise BadImage("holds Python objects, not numbers")
        self.start = stream.tell()
        self.order: Literal["C", "F"] = "F" if fortran else "C"
        own = wanted(channels, reading)
        self.planes = array_planes(self.shape, own)
        self.size = array_size(self.shape, own)

    def read(self, box: Box) -> torch.Tensor:
        made = from_array(self._mapped(), self.channels, self.reading, self.planes, box)
        return to_tensor(made, self.channels)

    def _mapped(self) -> np.ndarray:
        self.stream.seek(0)
        try:
            self.stream.fileno()
        except OSError:  # bytes in memory
            values = np.frombuffer(self.stream.read(), np.uint8)[self.start :]
            count = int(np.prod(self.shape)) * self.kind.itemsize
            return values[:count].view(self.kind).reshape(self.shape, order=self.order)
        options: Any = {"offset": self.start, "shape": self.shape, "order": self.order}
        return np.asarray(np.memmap(self.stream, self.kind, "r", **options))

    def close(self) -> None:
        self.stream.close()


def array_size(shape: tuple[int, ...], channels: int) -> tuple[int, int]:
    """Height and width of the image, or of a plane, in an array of this shape.

    Raises:
        BadImage: it is no image of so many channels.
    """
    some = np.broadcast_to(np.uint8(0), shape)  # an array of the shape that takes no memory
    image = some[0] if array_planes(shape, channels) > 1 else some
    height, width = channels_last(image, channels).shape[:2]
    return height, width


class WholeWindows(FileWindows):
    """Windows of an image (C, H, W) that was decoded as a whole."""

    def __init__(self, image: torch.Tensor) -> None:
        self.image, self.held = image, image.nbytes
        self.size = (image.shape[1], image.shape[2])

    def read(self, box: Box) -> torch.Tensor:
        rows = self.image[:, box.top : box.top + box.height]
        return rows[..., box.left : box.left + box.width].clone(
            memory_format=torch.contiguous_format
        )
