"""Batches: worker processes that read, decode and crop; the same batches at any number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold, generator
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Draw, DrawnCrop, ViewSpec
from ssl_vit.data.base import epoch_length
from ssl_vit.data.batch import Batch, stack
from ssl_vit.data.cache import ImageCache
from ssl_vit.data.decode import BadImage
from ssl_vit.data.draws import Draws
from ssl_vit.data.order import Order, Places
from ssl_vit.data.raster import EmptyTile
from ssl_vit.data.reduced import views_of
from ssl_vit.data.sources import Source
from ssl_vit.data.workers import load

log = logging.getLogger("ssl_vit")
T = TypeVar("T")
_ATTEMPTS = 10
_EMPTY_ATTEMPTS = 500  # of tiles without data nearly all may be, in a scene of a few islands


class TrainImages(Dataset):
    """Crops of a source's images; everything random follows from (seed, epoch, index).

    ``cache``: where decoded images are kept; the crops do not depend on it.
    """

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        channels: int,
        seed: int,
        cache: ImageCache | None = None,
    ) -> None:
        self.source = source
        self.spec = spec
        self.channels = channels
        self.seed = seed
        self.cache = cache
        mix = source.mix
        self.draws = None if mix is None or mix.even else Draws(mix, seed)

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, index) pairs, collated here, in the worker; of mixed sources
        with weights the index is a place among the draws of the epoch.

        A :class:`Part` is part of a step; a plain list is a step of its own, after all phases.
        """
        bad: dict[int, str] = {}
        empty: set[int] = set()
        part = wanted if isinstance(wanted, Part) else None
        spec = part.spec(self.spec, epoch_length(self.source)) if part else self.spec
        if part and part.soon:
            self.source.expect(part.soon)
        taken: list[list[DrawnCrop]] = [[] for _ in spec.crops]
        keys, labels = [], []
        for (epoch, place), index in zip(wanted, self._images(wanted), strict=True):
            key = fold(self.seed, epoch, place)
            crops, label = self._readable(index, key, spec, bad, empty)
            for all_of_kind, own in zip(taken, crops, strict=True):
                all_of_kind += own
            keys.append(fold(key))
            labels.append(-1 if label is None else label)
        # Crops of one kind are ordered view by view: all first crops, then all second ones.
        counts = [c.count for c in spec.crops]
        kinds = [_by_view(kind, n) for kind, n in zip(taken, counts, strict=True)]
        stacked = [stack([c.crop for c in kind]) for kind in kinds]
        missing = any(c.missing for kind in kinds for c in kind)
        views = Views(
            crops=stacked,
            keys=torch.tensor(keys),
            labels=torch.tensor(labels),
            photometric=[torch.tensor([c.photometric for c in kind]) for kind in kinds],
            key=fold(*keys),
            drawn=draw_all(spec, keys, part.places if part else None),
            boxes=[torch.tensor([c.place for c in kind]) for kind in kinds],
            missing=[kind.isnan() for kind in stacked] if missing else [],
        )
        stopped = self.cache.stopped if self.cache else ""
        return Batch(views, bad, empty=empty, unkept=stopped)

    def _images(self, wanted: Sequence[tuple[int, int]]) -> list[int]:
        """Image of each (epoch, index) pair."""
        if self.draws is None:
            return [index for _, index in wanted]
        epochs, places = np.array(wanted, dtype=np.int64).reshape(-1, 2).T
        found = np.empty(len(wanted), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            found[epochs == epoch] = self.draws.at(epoch, places[epochs == epoch])
        return found.tolist()

    def _readable(
        self, index: int, key: int, spec: ViewSpec, bad: dict[int, str], empty: set[int]
    ) -> tuple[list[list[DrawnCrop]], int | None]:
        """Crops of the image at ``index`` or, if it is bad, of the one that always replaces it."""

        def crops(index: int) -> tuple[list[list[DrawnCrop]], int | None]:
            raw, label = self.source.read(index)
            reading = self.source.reading
            return views_of(raw, self.channels, spec, key, reading, self.cache), label

        return self.replaced(index, crops, bad, empty)

    def replaced(
        self, index: int, make: Callable[[int], T], bad: dict[int, str], empty: set[int]
    ) -> T:
        """Result of ``make`` for the image at ``index`` or, if that is bad, for its fixed
        replacement; ``bad`` and ``empty`` take in those that were replaced."""
        failed = 0
        for attempt in range(_EMPTY_ATTEMPTS):
            try:
                return make(index)
            except EmptyTile:
                empty.add(index)
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
                failed += 1
                if failed == _ATTEMPTS:
                    break
            index = fold(self.seed, index, attempt) % len(self.source)
        if failed < _ATTEMPTS:
            raise UserError(f"{_EMPTY_ATTEMPTS} tiles in a row hold no data: leave such files out")
        reasons = "; ".join(list(bad.values())[-2:])
        raise UserError(f"{_ATTEMPTS} images in a row cannot be read, the last: {reasons}")


def _by_view(taken: list[DrawnCrop], count: int) -> list[DrawnCrop]:
    """Crops listed image by image, ``count`` each, ordered view by view."""
    return [crop for nth in range(count) for crop in taken[nth::count]]


def whole_boxes(spec: ViewSpec, images: int) -> list[Tensor]:
    """``Views.boxes`` of crops that are whole images, not flipped: those of made-up batches."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])
    return [box.repeat(images * crop.count, 1) for crop in spec.crops]


def draw_all(
    spec: ViewSpec, keys: Sequence[int], places: Places | None = None
) -> dict[str, Tensor]:
    """``Views.drawn`` of images of these keys; without ``places`` they are a step of their own."""
    drawn = draw_samples(spec.draw, keys) if spec.draw else {}
    if spec.draw_together:
        places = places or Places(fold(*keys), len(keys), 0, len(keys))
        together = spec.draw_together(places)
        drawn |= {name: torch.from_numpy(array) for name, array in together.items()}
    return drawn


def draw_samples(draw: Draw, keys: Sequence[int]) -> dict[str, Tensor]:
    """Draws for samples of these keys (``Views.keys``), stacked: (B, ...) by name."""
    samples = [draw(generator(fold(key))) for key in keys]
    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}


class Part(list[tuple[int, int]]):
    """The (epoch, index) pairs of a part of a step, with the step and their places in it.

    ``soon``: ``Order.soon`` of the step.
    """

    def __init__(
        self, pairs: Iterable[tuple[int, int]], places: Places, step: int, soon: Sequence[int] = ()
    ) -> None:
        super().__init__(pairs)
        self.places, self.step, self.soon = places, step, tuple(soon)

    def __reduce__(self) -> tuple[type[Part], tuple[Any, ...]]:
        return Part, (list(self), self.places, self.step, self.soon)

    def spec(self, whole: ViewSpec, images: int) -> ViewSpec:
        """Views at this step of a training set of so many images."""
        return whole.at(self.step, images // self.places.batch)


class _Positions:
    """The :class:`Part` of every part of every step from ``start`` to ``stop``."""

    def __init__(self, order: Order, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.order.accumulate

    def __iter__(self) -> Iterator[Part]:
        for step in range(self.start, self.stop):
            soon = self.order.soon(step).tolist()
            for part in range(self.order.accumulate):
                epoch, indices = self.order.part(step, part)
                pairs = ((epoch, int(i)) for i in indices)
                yield Part(pairs, self.order.places(step, part), step, soon)


def train_batches(
    images: TrainImages, order: Order, start: int, stop: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop``, ``order.accumulate`` for each step.

    Raises:
        UserError: the images' cache cannot be written to.
    """
    batches, held, cache = _Positions(order, start, stop), order.accumulate + 1, images.cache
    if cache is None:
        return load(images, batches, workers, pin, prefetch=4, held=held)
    cache.prepare()
    loaded = load(images, batches, workers, pin, prefetch=4, held=held, claim=cache.spare)
    return _reporting_full_cache(loaded, cache)


def _reporting_full_cache(batches: Iterator[Batch], cache: ImageCache) -> Iterator[Batch]:
    """The same batches; logs once that a worker's cache takes no more images, and releases it."""
    reported = False
    try:
        for batch in batches:
            if batch.unkept and not reported:
                reported = True
                log.warning("%s", batch.unkept)
            yield batch
    finally:
        cache.release()
