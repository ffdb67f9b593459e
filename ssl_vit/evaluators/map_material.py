"""Map material: an encoder's frozen feature maps of images, with depth maps to train heads on.

As ``tokens`` does for one map and masks: kept in memory, or recomputed if too large.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.eval_images import eval_batches
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.pairs import PairBatch, PairImages, Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.depth_heads import fine_grid
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.frozen import Statistics, room, warn_unreadable
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import autocast, loader_workers

log = logging.getLogger("ssl_vit")


@dataclass
class SeenMaps:
    """Batch of pairs: ``maps``, each (b, D, h, w) in half precision on the device; ``depths`` at
    their own sizes; ``keys`` (b,) indices; ``bad``: index -> reason."""

    maps: list[Tensor]
    depths: list[Tensor]
    keys: Int64[Tensor, " b"]
    bad: dict[int, str]

    @property
    def floats(self) -> list[Tensor]:
        """Maps in single precision, as heads take them."""
        return [x.float() for x in self.maps]


@dataclass(frozen=True)
class MapExtractor:
    """Map extractor: frozen feature maps of images that ``view`` describes."""

    maps: FeatureMaps
    view: View
    machine: Machine

    def batches(self, pairs: Pairs) -> Iterator[SeenMaps]:
        """Maps of all readable pairs, in order; none where no pair of a batch is readable.

        Raises:
            UserError: an image and its depth map differ in size, a number in a map is not finite,
                or the network takes no images of this size.
        """
        device = self.machine.device
        workers, pin = loader_workers(self.machine.workers, device), device.type == "cuda"
        normalize = Normalize(self.view.mean, self.view.std).to(device)
        images = PairImages(pairs, self.view.size, self.view.channels)
        for batch in eval_batches(images, self.machine.at_once, workers, pin):
            assert isinstance(batch, PairBatch)
            maps = []
            if batch.masks:
                # Not inference mode, whose tensors could not be trained on.
                with torch.no_grad(), autocast(device, self.machine.precision):
                    made = self._made(normalize(batch.views.to(device)).crops[0])
                maps = [x.half() for x in made]
                finite = all(bool(x.isfinite().all()) for x in maps)
                check(finite, f"the encoder's maps of {pairs.spec} are not finite, or above 65504")
            yield SeenMaps(maps, batch.masks, batch.views.keys, batch.bad)

    def _made(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images."""
        if isinstance(self.maps.network, Encoder):
            return list(self.maps(images))
        try:
            return list(self.maps(images))
        except (AssertionError, RuntimeError, ValueError) as error:  # of timm's networks
            if isinstance(error, torch.OutOfMemoryError):
                raise
            size = "x".join(map(str, self.view.size))
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"images of {size} are none that the encoder takes: {reason}") from None


@dataclass(frozen=True)
class MapMaterial:
    """Training material: the readable ``pairs``, with depths and maps.

    ``depths``: (n, R, S) on ``fine_grid``, 0 where there is none. ``maps``: (n, D, h, w) each, None
    if too large. ``statistics``: of each map, mean and deviation of its channels, (D,) each, exact.
    ``highest``: the greatest depth; ``unreadable``: number of skipped pairs.
    """

    pairs: Pairs
    extractor: MapExtractor
    depths: Float32[Tensor, "n r s"]
    maps: list[Tensor] | None
    statistics: list[tuple[Tensor, Tensor]]
    highest: float
    unreadable: int

    def batches(
        self, rows: Int64[Tensor, " k"], size: int
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Batches of these pairs: maps in single precision, and depths (b, R, S)."""
        machine = self.extractor.machine
        if self.maps is not None:
            for chunk in rows.split(size):
                maps = [x[chunk].to(machine.device).float() for x in self.maps]
                yield maps, self.depths[chunk].to(machine.device)
            return
        extractor = replace(self.extractor, machine=replace(machine, at_once=size))
        for seen in extractor.batches(self.pairs.take(rows)):
            if seen.maps:
                yield seen.floats, self.depths[rows[seen.keys]].to(machine.device)


def gather_maps(extractor: MapExtractor, pairs: Pairs, cache_gb: float) -> MapMaterial:
    """Extract the maps of all pairs once; keep them if they take at most ``cache_gb`` 1e9 bytes.

    Raises:
        UserError: no pair can be read.
    """
    statistics = [Statistics() for _ in extractor.maps.widths]
    depths, places = list[Tensor](), list[Tensor]()
    kept: list[Tensor] | None = None
    bad, highest = dict[int, str](), 0.0
    for seen in extractor.batches(pairs):
        bad |= seen.bad
        if not seen.maps:
            continue
        if not depths:
            kept = room(seen.maps, len(pairs), cache_gb, "maps")
        for all_of_map, x in zip(kept or (), seen.maps, strict=False):
            all_of_map[len(depths) : len(depths) + len(x)] = x
        for each, x in zip(statistics, seen.maps, strict=True):
            each.add(x)
        size = fine_grid(seen.maps[0].shape[2], seen.maps[0].shape[3])
        depths += [nearest_mask(depth, size) for depth in seen.depths]
        highest = max(highest, *(float(depth.max()) for depth in seen.depths))
        places.append(seen.keys)
    warn_unreadable(bad, "pair")
    if not places:
        raise UserError(f"no pair of {pairs.spec} can be read: {next(iter(bad.values()), '')}")
    return MapMaterial(
        pairs.take(torch.cat(places)),
        extractor,
        torch.stack(depths),
        None if kept is None else [x[: len(depths)] for x in kept],
        [each.result() for each in statistics],
        highest,
        len(bad),
    )
