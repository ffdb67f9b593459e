"""Image and mask pairs: files of the same name in two folders; mask pixels are class numbers.

Other maps beside images are coupled in the same way (``data.depths``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.common.task import Views
from ssl_vit.data.base import Item, Source, Subset
from ssl_vit.data.batch import Batch, stack
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.folder import FolderSource, all_images
from ssl_vit.data.groups import groups_of
from ssl_vit.data.map_values import decode_mask
from ssl_vit.data.missing import missing_in, resized, with_data

CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class Beside:
    """Maps beside images: named ``scheme:``, in ``folder`` of a root; ``one`` is a "mask"."""

    scheme: str
    folder: str
    one: str

    @property
    def form(self) -> str:
        """Form of its specification."""
        other = f"{self.folder.upper()}_FOLDER"
        root = f"{self.scheme}:ROOT with ROOT/images and ROOT/{self.folder}"
        return f"{self.scheme}:IMAGES_FOLDER:{other}, or {root}"


MASKS = Beside("pairs", "masks", "mask")


class Pairs(Source):
    """Pairs source: images with masks of equal size; their paths differ only in the extension."""

    beside = MASKS

    def __init__(
        self, images: FolderSource, masks: FolderSource, couples: np.ndarray, spec: str
    ) -> None:
        """``couples``: (n, 2) indices into ``images`` and ``masks``."""
        self.spec, self.images, self.masks, self.couples = spec, images, masks, couples
        self.reading = images.reading
        self.groups = None if images.groups is None else images.groups[couples[:, 0]]
        self.classes = read_classes(os.fsdecode(masks.root))
        self.labels_from = f"images have a {self.beside.one} each, and no classes"

    def __len__(self) -> int:
        return len(self.couples)

    def read(self, i: int) -> Item:
        return self.images.read(int(self.couples[i, 0]))[0], None

    def name(self, i: int) -> str:
        return self.images.name(int(self.couples[i, 0]))

    def target(self, i: int) -> Shaped[Tensor, "h w"]:
        """Read the map of image i: of a mask the class of each pixel.

        Raises:
            BadImage: the file cannot be read or decoded.
            UserError: the image format cannot contain classes.
        """
        place = int(self.couples[i, 1])
        raw = self.masks.read(place)[0]
        assert isinstance(raw, bytes)
        return self.decoded(raw, self.masks.name(place))

    def decoded(self, raw: bytes, name: str) -> Shaped[Tensor, "h w"]:
        """Decode the file of a map."""
        return decode_mask(raw, name)

    def take(self, rows: Tensor) -> Pairs:
        """Subset of these pairs, in this order."""
        taken = copy(self)
        taken.couples = self.couples[rows.numpy()]
        if self.groups is not None:
            taken.groups = self.groups[rows.numpy()]
        return taken


def open_pairs(spec: str, reading: ReadConfig | None = None) -> Pairs:
    """Open ``pairs:IMAGES:MASKS`` or ``pairs:ROOT``; files at any depth, in the images' order.

    ``reading``: of the images, as for ``open_source``.

    Class names, one per line, may be in ``classes.txt``, in the masks' folder or its parent.

    Raises:
        UserError: not of this form, no such folder, or an image or a mask has no counterpart.
    """
    return Pairs(*coupled(spec, MASKS, reading), spec)


def open_pairs_source(spec: str, rest: str, reading: ReadConfig | None = None) -> Pairs:
    """Open pairs as a source of images, for ``open_source``."""
    return open_pairs(spec, reading)


def whole_pairs(source: Source) -> Pairs:
    """Pairs that a source is, or is a part of.

    Raises:
        UserError: it consists of none, or of several.
    """
    whole = source.source if isinstance(source, Subset) else source
    if not isinstance(whole, Pairs):
        raise UserError(f"{source.spec!r} is not one folder of images with maps beside them")
    return whole


def pairs_of(source: Source) -> Pairs:
    """Pairs of a source: itself, or that part of them which it is.

    Raises:
        UserError: as ``whole_pairs``.
    """
    whole = whole_pairs(source)
    if not isinstance(source, Subset):
        return whole
    part = whole.take(torch.from_numpy(source.indices))
    part.spec = source.spec
    return part


def coupled(
    spec: str, beside: Beside, reading: ReadConfig | None
) -> tuple[FolderSource, FolderSource, np.ndarray]:
    """Images, what lies beside them, and (n, 2) their indices, in the images' order.

    Raises:
        UserError: as ``open_pairs``.
    """
    scheme, _, rest = spec.partition(":")
    parts = rest.split(":")
    known = scheme == beside.scheme and all(parts) and len(parts) <= 2
    check(known, f"{spec!r} names no images with {beside.one}s; allowed: {beside.form}")
    own = ("images", beside.folder)
    folders = parts if len(parts) == 2 else [os.path.join(rest, name) for name in own]
    for option in ("tile", "level"):  # masks are as large as the images are read
        given = reading is not None and getattr(reading, option)
        check(not given, f"--data.{option} has no effect on {scheme}: leave it out")
    slices = reading.slices if reading is not None else ""
    check(slices != "all", f"--data.slices all has no effect on {scheme}: leave it out")
    images, others = (all_images(spec, folder) for folder in folders)
    images.reading = reading or ReadConfig()
    if images.reading.group:
        images.groups = groups_of(images)
    places, there = _by_stem(images), _by_stem(others)
    _all_there(spec, f"images without a {beside.one}", places, there, images)
    _all_there(spec, f"{beside.one}s without an image", there, places, others)
    couples = np.array([(place, there[stem]) for stem, place in places.items()], dtype=np.int64)
    return images, others, couples


def _by_stem(source: FolderSource) -> dict[bytes, int]:
    """Indices of files by path without extension."""
    places: dict[bytes, int] = {}
    for i in range(len(source)):
        other = places.setdefault(os.path.splitext(source.files[i])[0], i)
        if other != i:
            names = f"{source.name(other)} and {source.name(i)}"
            raise UserError(f"{source.spec!r}: {names} differ only in their extension; keep one")
    return places


def _all_there(
    spec: str, what: str, ours: dict[bytes, int], theirs: dict[bytes, int], source: FolderSource
) -> None:
    alone = [place for stem, place in ours.items() if stem not in theirs]
    if alone:
        raise UserError(
            f"{spec!r} has {len(alone)} {what} of the same path without extension; the first: "
            f"{source.name(alone[0])}"
        )


def read_classes(folder: str) -> tuple[str, ...] | None:
    """Read class names from ``classes.txt``, in the folder or its parent; None without the file.

    Raises:
        UserError: it cannot be read, is empty, or has a blank line or a name twice.
    """
    for place in (Path(folder), Path(folder).parent):
        file = place / CLASSES_FILE
        if file.is_file():
            try:
                names = tuple(n.strip() for n in file.read_text(encoding="utf-8").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: cannot be read as text: {error}") from None
            fine = bool(names) and all(names) and len(set(names)) == len(names)
            check(fine, f"{file}: must have a class name on every line, all different")
            return names
    return None


@dataclass
class PairBatch(Batch):
    """Batch of pairs: views of images, and their masks, each (h, w) of its own size."""

    masks: list[Tensor] = field(default_factory=list)

    def pin_memory(self) -> PairBatch:
        """Pin the views in page-locked memory; masks are not copied to a GPU directly."""
        return PairBatch(self.views.pin_memory(), self.bad, self.masks)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.views.nbytes + sum(mask.nbytes for mask in self.masks)


class PairImages(EvalImages):
    """Pair loader: whole images, each side resized to ``size``, with their original masks.

    Nothing is cropped, so that the encoder sees every pixel of a mask. ``sizes``: several sizes
    instead of one, each of them a kind of crop.
    """

    source: Pairs

    def __init__(
        self,
        pairs: Pairs,
        size: tuple[int, int],
        channels: int,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(pairs, size, 1.0, channels)
        self.sizes = tuple(sizes) or (size,)

    def __getitems__(self, indices: Sequence[int]) -> PairBatch:
        """Batch of these pairs; unreadable ones are skipped and reported.

        Raises:
            UserError: an image and its mask differ in size.
        """
        bad: dict[int, str] = {}
        crops, keys, masks = [], [], []
        for index in indices:
            try:
                raw = self.source.read(index)[0]
                image = decode(raw, self.channels, self.source.reading)
                views = [with_data(resized(image, size)) for size in self.sizes]
                mask = self.source.target(index)
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
                continue
            sizes = ["x".join(map(str, t.shape[-2:])) for t in (image, mask)]
            check(
                sizes[0] == sizes[1],
                f"{self.source.name(index)} has {sizes[0]} pixels, its {self.source.beside.one} "
                f"{sizes[1]} (rows x columns); they must agree",
            )
            crops.append(views)
            masks.append(mask)
            keys.append(index)
        kinds = [stack(list(kind)) for kind in zip(*crops, strict=True)]
        batch = Views(kinds, torch.tensor(keys).long(), torch.full((len(keys),), -1))
        return PairBatch(replace(batch, missing=missing_in(kinds)), bad, masks)
