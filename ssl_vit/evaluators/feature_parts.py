"""Feature parts: features of a whole source on the disk, made part by part.

A part is a fixed range of images, computed in fixed batches: a function of the options alone. So
any number of processes, however often they are killed, makes the same rows, and memory holds one
part at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.common.files import write_atomically, write_text_atomically
from ssl_vit.training.run_lock import is_lock

# Images and bytes of a part, at most: what a killed process loses, and what is held in memory. Of
# few images there are about so many parts, for many processes to share.
_IMAGES, _BYTES, _PARTS = 2048, 64 << 20, 64
_CARD = "card.json"
_NAME, _ANY = "images-{:010d}-{:010d}.safetensors", "images-*.safetensors"
_INDEX, _BAD = "index", "unreadable"


@dataclass(frozen=True)
class Layout:
    """Layout of parts: ``images`` in batches of ``batch_size``, and those in parts.

    ``shapes``: of each feature of an image: (D,), or (N, D) for patches.
    """

    images: int
    batch_size: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def row_bytes(self) -> int:
        """Bytes of all features of an image, in float32."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    @property
    def part_size(self) -> int:
        """Images of a part: whole batches, at least one."""
        most = min(_IMAGES, _BYTES // self.row_bytes, self.images // _PARTS)
        return self.batch_size * max(1, most // self.batch_size)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.images // self.part_size)

    def batches(self, part: int) -> list[range]:
        """Images of each batch of a part."""
        start = part * self.part_size
        stop = min(start + self.part_size, self.images)
        edges = range(start, stop, self.batch_size)
        return [range(edge, min(edge + self.batch_size, stop)) for edge in edges]


class Batches:
    """Batch sampler: the images of each batch of some parts, in their order."""

    def __init__(self, layout: Layout, parts: Sequence[int]) -> None:
        self.layout, self.parts = layout, parts

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.parts:
            yield from map(list, self.layout.batches(part))


@dataclass(frozen=True)
class Rows:
    """Rows of a batch, without its images: features by name, none where no image is readable; the
    images' indices in the source; and the unreadable ones, with reasons."""

    features: dict[str, Tensor]
    index: Int64[Tensor, " n"]
    bad: dict[int, str]


class Parts:
    """Parts of a source's features in a folder, each complete or absent."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout

    def begin(self, card: dict[str, Any]) -> None:
        """Begin anew: without any part, with a card of the features that they will hold."""
        self.clear()
        write_text_atomically(self.folder / _CARD, json.dumps(card, indent=1) + "\n")

    def card(self) -> dict[str, Any]:
        """Card of the parts that are there; empty if nothing was begun."""
        try:
            return dict(json.loads((self.folder / _CARD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def clear(self) -> None:
        """Remove all but the lock on the folder."""
        for path in self.folder.iterdir():
            if not is_lock(path):
                path.unlink()

    @property
    def begun(self) -> bool:
        """True if there is a part, of whatever layout."""
        return any(True for _ in self.folder.glob(_ANY))

    def there(self) -> list[int]:
        """Numbers of the parts that are there."""
        found = {path.name for path in self.folder.glob(_ANY)}
        return [part for part in range(self.layout.parts) if self._path(part).name in found]

    def write(self, part: int, made: Sequence[Rows]) -> None:
        """Write a part, given the rows of its batches."""
        bad = {index: why for rows in made for index, why in rows.bad.items()}
        tensors = {_INDEX: torch.cat([rows.index for rows in made])}
        for name, shape in self.layout.shapes.items():
            there = [rows.features[name] for rows in made if rows.features]
            tensors[name] = torch.cat(there) if there else torch.empty(0, *shape)
        metadata = {_BAD: json.dumps(bad)}
        write_atomically(self._path(part), lambda path: save_file(tensors, path, metadata=metadata))

    def read(self, part: int, name: str) -> np.ndarray:
        """One feature of the readable images of a part, float32 (n, ...)."""
        with safe_open(self._path(part), framework="numpy") as file:
            return np.asarray(file.get_tensor(name))

    def index(self, part: int) -> np.ndarray:
        """Indices in the source of the readable images of a part, int64 (n,)."""
        return self.read(part, _INDEX)

    def bad(self, part: int) -> dict[int, str]:
        """Reasons of the unreadable images of a part, by their indices."""
        with safe_open(self._path(part), framework="numpy") as file:
            kept = json.loads(file.metadata()[_BAD])
        return {int(index): why for index, why in kept.items()}

    def _path(self, part: int) -> Path:
        batches = self.layout.batches(part)
        first, last = batches[0].start, batches[-1].stop - 1
        return self.folder / _NAME.format(first, last)
