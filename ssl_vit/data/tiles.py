"""Tiles of large images: each an image of its own, read without the rest of its file.

An image of H x W pixels has ceil(H / h) rows and ceil(W / w) columns of tiles of h x w. They do not
overlap, but for those of the last row and column, which end where the image does: nothing is left
out, and all have one size. The list of tiles is made from the headers of the files.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssl_vit.common.errors import check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import Decoded, decode
from ssl_vit.data.extent import Extent, extent_of
from ssl_vit.data.headers_of import headers_of
from ssl_vit.data.missing import has_missing, valid_share
from ssl_vit.data.raster import BadImage, Box, EmptyTile, reason
from ssl_vit.data.slices import FileParts, is_array, log_planes
from ssl_vit.data.windows import OpenFiles

_log = logging.getLogger("ssl_vit")
_WHOLE = (1 << 62, 1 << 62)  # a tile that no image is larger than
_COSTLY = 8  # times as many pixels are decoded as a tile has: a warning


class TilePlace(NamedTuple):
    """File of a tile, its plane, row and column there."""

    file: int
    plane: int
    row: int
    column: int


class Tiles(FileParts):
    """Tiles source: every tile of every plane of the files of ``whole`` is an image of its own.

    ``extents``: int64 (files, 3), height, width and planes of each; height and width are 0 where
    they are not known. ``tile``: its height and width.
    """

    def __init__(
        self, whole: Source, extents: np.ndarray, tile: tuple[int, int], channels: int
    ) -> None:
        self.tile = tile
        self.heights, self.widths, planes = extents.T
        self.rows = np.maximum(-(-self.heights // tile[0]), 1)
        self.columns = np.maximum(-(-self.widths // tile[1]), 1)
        super().__init__(whole, self.rows * self.columns * planes, channels)
        self.open_files = OpenFiles(whole, channels)

    def read(self, i: int) -> Item:
        """Raises ``EmptyTile`` for a tile of an image without any data."""
        place = self.place(i)
        cut = self._planes(place.file) * self._per_plane(place.file) > 1
        if not cut and not self.reading.level:
            return self.whole.read(place.file)
        several = self._planes(place.file) > 1
        reading = replace(self.reading, slices=str(place.plane)) if several else self.reading
        windows = self.open_files.windows(place.file, reading)
        try:
            image = windows.read(self.box(i) if cut else Box(0, 0, *windows.size))
        except BadImage:
            raise
        except Exception as error:  # decoders raise all kinds
            raise BadImage(reason(error)) from error
        if cut and has_missing(image) and not valid_share(image):
            raise EmptyTile("holds no data")
        return image.numpy().view(Decoded), self.label(i)

    def name(self, i: int) -> str:
        """``scene.tif#r3c5``: row and column from 0; of a file with several planes
        ``stack.tif[2]#r3c5``."""
        place = self.place(i)
        name = self.whole.name(place.file)
        if self._planes(place.file) > 1:
            name += f"[{place.plane}]"
        return f"{name}#r{place.row}c{place.column}" if self._per_plane(place.file) > 1 else name

    def listing(self) -> Iterable[np.ndarray]:
        """Listing of the files, how large their images are, and where their tiles begin."""
        sizes = self.heights, self.widths, np.array([*self.tile, self.reading.level])
        return (*self.whole.listing(), *sizes, self.firsts)

    def place(self, i: int) -> TilePlace:
        """Origin of an image: its file, plane and tile."""
        i = range(len(self))[i]
        file = int(self.file_of[i])
        plane, tile = divmod(i - int(self.firsts[file]), self._per_plane(file))
        return TilePlace(file, plane, *divmod(tile, int(self.columns[file])))

    def box(self, i: int) -> Box:
        """Part of its file's image that an image is."""
        file, _, row, column = self.place(i)
        height, width = int(self.heights[file]), int(self.widths[file])
        size = min(self.tile[0], height), min(self.tile[1], width)
        top, left = row * self.tile[0], column * self.tile[1]
        return Box(min(top, height - size[0]), min(left, width - size[1]), *size)

    def _per_plane(self, file: int) -> int:
        return int(self.rows[file] * self.columns[file])

    def _planes(self, file: int) -> int:
        return int(self.firsts[file + 1] - self.firsts[file]) // self._per_plane(file)


def with_tiles(source: Source, channels: int) -> Source:
    """The source with tiles of its images, as its ``reading`` asks for, or at a level of them."""
    reading = source.reading
    if not len(source):
        return source
    if is_array(source):
        what = "tile" if reading.tile else "level"
        _log.warning(f"warning: {source.spec}: --data.{what} has no effect on arrays in memory")
        return source
    if reading.slices == "middle":
        log_planes(source, channels)
    tile = (reading.tile[0], reading.tile[-1]) if reading.tile else _WHOLE
    found, seen = np.zeros((len(source), 3), dtype=np.int64), _Seen(source.spec, tile)
    for row, extent in zip(found, extents(source, channels), strict=True):
        row[:] = extent.height, extent.width, extent.planes
        seen.add(extent)
    made = Tiles(source, found, tile, channels)
    warn_unreadable_headers(made)
    seen.log(made)
    return made


def warn_unreadable_headers(made: Tiles) -> None:
    """Warn of files of which not even the headers can be read: each is one image instead of many.

    Raises:
        UserError: they are more, of all files, than ``max_bad`` allows of a training set.
    """
    bad = np.flatnonzero(made.heights == 0)
    if not 0 < len(bad) < len(made.whole):  # that none can, reading the first ones says
        return
    first = int(bad[0])
    found = f"{len(bad):,} of {len(made.whole):,} files cannot be read"
    which = f"the first is {made.whole.name(first)}: {_why(made, first)}"
    allowed = getattr(made.reading, "max_bad", 1.0)
    check(
        len(bad) <= allowed * len(made.whole),
        f"{made.spec}: {found}, more than --data.max-bad {allowed:g} allows; {which}",
    )
    _log.warning(f"warning: {made.spec}: {found}; {which}")


def _why(made: Tiles, file: int) -> str:
    """Reason why a file cannot be read."""
    try:
        with made.whole.stream(file) as stream:
            extent_of(stream, made.channels, made.reading)
        decode(made.whole.read(file)[0], made.channels, made.reading)
    except Exception as error:  # libraries that read headers raise all kinds
        return str(error) if isinstance(error, BadImage) else reason(error)
    return "has no size"


def extents(source: Source, channels: int) -> Iterator[Extent]:
    """Extent of each file of a source, by threads; without sizes for those that are not known."""

    def extent(stream: io.IOBase) -> Extent:
        return extent_of(stream, channels, source.reading)

    return headers_of(source, range(len(source)), extent, Extent())


class _Seen:
    """Summary of the files that are cut."""

    def __init__(self, spec: str, tile: tuple[int, int]) -> None:
        self.spec, self.tile = spec, tile
        self.costs: Counter[tuple[int, int]] = Counter()
        self.levels: Counter[float] = Counter()

    def add(self, extent: Extent) -> None:
        """Take in the extent of a file."""
        if extent.height:
            self.costs[extent.part] += 1
            if extent.full:
                self.levels[round(extent.full / extent.height, 1)] += 1

    def log(self, made: Tiles) -> None:
        """Log the number of tiles, and warn of what looks wrong."""
        reading = made.reading
        if reading.level and self.levels:
            by = sorted(self.levels)
            shown = f"{by[0]:g}" if len(by) == 1 else f"{by[0]:g} to {by[-1]:g}"
            log = _log.warning if by[-1] > 1.5 * by[0] else _log.info
            log(f"{self.spec}: level {reading.level} is {shown} times smaller than the full size")
        if not reading.tile:
            return
        files = len(made.whole)
        cut = int((made.rows * made.columns > 1).sum())
        smaller = files - cut - int((made.heights == 0).sum())
        rest = f"; no larger: {smaller:,}" if smaller else ""
        _log.info(
            f"{self.spec}: {len(made):,} images: tiles of {self.tile[0]} x {self.tile[1]} px of "
            f"{cut:,} of {files:,} files{rest}"
        )
        for part, count in self.costs.most_common(1):
            cost = self._cost(part)
            if cost >= _COSTLY:
                _log.warning(
                    f"warning: {self.spec}: {count:,} of {files:,} files are stored in parts of "
                    f"{part[0]} x {part[1]} px, of which each tile decodes {cost:.0f} times its "
                    "own pixels: store them in tiles once, as by gdal_translate -co TILED=YES -co "
                    "COMPRESS=DEFLATE IN OUT"
                )

    def _cost(self, part: tuple[int, int]) -> float:
        """Pixels that a tile decodes over those that it has, at the least."""
        if not all(part):
            return 1.0
        (height, width), (h, w) = self.tile, part
        return max(h, height) * max(w, width) / (height * width)


def is_cut(reading: ReadConfig) -> bool:
    """True if the images of files are read in parts."""
    return bool(reading.tile or reading.level)
