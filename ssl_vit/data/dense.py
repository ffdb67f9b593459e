"""Dense targets: of each training crop what is known of its pixels, cut out as the crop is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.base import Numbered, Source
from ssl_vit.data.batch import Batch
from ssl_vit.data.cache import ImageCache
from ssl_vit.data.decode import BadImage
from ssl_vit.data.loader import TrainImages

TARGET = "target"
"""Name of the targets among what is drawn for a batch (``Views.drawn``)."""

Prepare = Callable[[Shaped[Tensor, "h w"]], Shaped[Tensor, "h w"]]


class DenseImages(TrainImages):
    """Training crops of images that have maps beside them, with these maps, cut out alike.

    ``prepare`` makes of a map what a loss takes, of one type and with one value for pixels of which
    nothing is known: ``unknown``. It has all pixels of a map that cannot be read, which is reported
    as an unreadable image is.
    """

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        channels: int,
        seed: int,
        prepare: Prepare,
        unknown: float | int,
        cache: ImageCache | None = None,
    ) -> None:
        assert len(spec.crops) == spec.crops[0].count == 1, "one crop has one target"
        super().__init__(Numbered(source), spec, channels, seed, cache)
        self.prepare, self.unknown = prepare, unknown

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> Batch:
        """Batch as without targets; ``Views.drawn`` has them, (B, H, W)."""
        batch = super().__getitems__(wanted)
        size, views = self.spec.crops[0].size, batch.views
        targets: list[Tensor | None] = []
        for row, place in zip(views.labels.tolist(), views.boxes[0], strict=True):
            try:
                targets.append(self.prepare(cut_map(self.source.target(row), place, size)))
            except BadImage as error:
                batch.bad[row] = str(error)
                targets.append(None)
        kind = next((t.dtype for t in targets if t is not None), torch.int32)
        none = torch.full(size, self.unknown, dtype=kind)
        made = torch.stack([none if t is None else t for t in targets])
        views.drawn[TARGET] = made
        return batch


def cut_map(
    values: Shaped[Tensor, "h w"], place: Float[Tensor, 5], size: tuple[int, int]
) -> Shaped[Tensor, "r s"]:
    """Part of a map at a crop's place (``Views.boxes``), in the crop's size: of each pixel the
    value at its centre, which is never between two."""
    top, left, height, width, way = place.tolist()
    turns, flips = divmod(int(way), 4)
    rows, columns = size[::-1] if turns % 2 else size
    down = _centres(values.shape[0], top, height, rows)
    right = _centres(values.shape[1], left, width, columns)
    part = values[down[:, None], right]
    part = part.flip(1) if flips & 1 else part
    part = part.flip(0) if flips & 2 else part
    return part.rot90(turns) if turns else part


def _centres(old: int, start: float, share: float, new: int) -> Tensor:
    """Indices of ``new`` places, evenly spaced over a share of ``old`` ones."""
    # In double precision, and the box in whole pixels: what is stored is rounded to single.
    first, length = round(start * old), max(1, round(share * old))
    steps = (torch.arange(new, dtype=torch.float64) + 0.5) * (length / new)
    return (first + steps.floor().long()).clamp(max=old - 1)
