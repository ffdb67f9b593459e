"""Batches: worker processes that read, decode and crop; the same batches at any number of them."""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.config import UserError
from ssl_vit.data.augment import DrawnCrop, ViewSpec, center_view, take_views
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.order import Order, permute
from ssl_vit.data.sources import Source
from ssl_vit.distributed import gather_texts
from ssl_vit.seeds import fold
from ssl_vit.task import Views

log = logging.getLogger("ssl_vit")
_ATTEMPTS = 10


@dataclass
class Batch:
    """What a worker hands over: views, and what could not be read (index -> reason)."""

    views: Views
    bad: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """What a loader calls so that copies to a GPU need not wait."""
        return Batch(self.views.pin_memory(), self.bad)


class TrainImages(Dataset):
    """Crops of a source's images; everything random follows from (seed, epoch, index)."""

    def __init__(self, source: Source, spec: ViewSpec, channels: int, seed: int) -> None:
        self.source = source
        self.spec = spec
        self.channels = channels
        self.seed = seed

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, index) pairs, collated here, in the worker."""
        bad: dict[int, str] = {}
        taken: list[list[DrawnCrop]] = [[] for _ in self.spec.crops]
        keys, labels = [], []
        for epoch, index in wanted:
            image, label = self._readable(index, bad)
            key = fold(self.seed, epoch, index)
            for kind, drawn in enumerate(take_views(image, self.spec, random.Random(key))):
                taken[kind] += drawn
            keys.append(fold(key))
            labels.append(-1 if label is None else label)
        # Crops of one kind are ordered view by view: all first crops, then all second ones.
        kinds = [_by_view(views, c.count) for views, c in zip(taken, self.spec.crops, strict=True)]
        crops, parameters = [c for c, _ in kinds], [p for _, p in kinds]
        views = Views(crops, torch.tensor(keys), torch.tensor(labels), parameters, fold(*keys))
        return Batch(views, bad)

    def _readable(self, index: int, bad: dict[int, str]) -> tuple[Tensor, int | None]:
        """The image at ``index`` or, if it is bad, the one that always replaces it."""
        for attempt in range(_ATTEMPTS):
            try:
                raw, label = self.source.read(index)
                return decode(raw, self.channels), label
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
            index = fold(self.seed, index, attempt) % len(self.source)
        reasons = "; ".join(list(bad.values())[-2:])
        raise UserError(f"{_ATTEMPTS} images in a row cannot be read, the last: {reasons}")


def _by_view(taken: list[DrawnCrop], count: int) -> tuple[Tensor, Tensor]:
    """Crops listed image by image, ``count`` each, and their parameters, stacked view by view."""
    ordered = [view for nth in range(count) for view in taken[nth::count]]
    return stack([crop for crop, _ in ordered]), torch.tensor([drawn for _, drawn in ordered])


def stack(crops: list[Tensor]) -> Tensor:
    """One batch; where 8-bit images meet deeper ones, all in the deeper ones' scale of 0..1."""
    if len({c.dtype for c in crops}) > 1:
        crops = [c.float() / 255 if c.dtype == torch.uint8 else c for c in crops]
    return torch.stack(crops)


class BadImages:
    """Counts unreadable images, names each once, and stops the run when they are too many.

    Over all processes: each notes its own, and all count them together.
    """

    def __init__(self, source: Source, max_share: float) -> None:
        self.spec, self.n, self.max_share = source.spec, len(source), max_share
        self.found: set[int] = set()
        self.noted: dict[int, str] = {}

    def note(self, bad: dict[int, str]) -> None:
        """Take in a batch's unreadable images; ``count`` counts those that are new."""
        self.noted |= {index: why for index, why in bad.items() if index not in self.found}

    def count(self) -> None:
        """Count and name what any process has noted. All must call it.

        Raises:
            UserError: more than the allowed share of all images is unreadable.
        """
        reason = ""
        for text in gather_texts(json.dumps(self.noted)):
            for index, reason in json.loads(text).items():
                if int(index) not in self.found:
                    self.found.add(int(index))
                    log.warning("unreadable image %d skipped: %s", len(self.found), reason)
        self.noted = {}
        if len(self.found) > self.max_share * self.n:
            raise UserError(
                f"{len(self.found)} of {self.n} images of {self.spec} are unreadable, more than "
                f"--data.max-bad {self.max_share:g} allows; the last: {reason}",
                everywhere=True,
            )


class _Positions:
    """The (epoch, index) lists of every part of every step from ``start`` to ``stop``."""

    def __init__(self, order: Order, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.order.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for part in range(self.order.accumulate):
                epoch, indices = self.order.part(step, part)
                yield [(epoch, int(i)) for i in indices]


def train_batches(
    images: TrainImages, order: Order, start: int, stop: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop``, ``order.accumulate`` for each step."""
    loader = DataLoader(
        images,
        batch_sampler=_Positions(order, start, stop),
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_quiet_worker if workers else None,
        prefetch_factor=4 if workers else None,
    )
    return _iterate(loader)


class EvalImages(Dataset):
    """The central crop of every image, in order; unreadable ones are left out and reported."""

    def __init__(
        self, source: Source, size: tuple[int, int], crop_ratio: float, channels: int
    ) -> None:
        self.source, self.size, self.crop_ratio, self.channels = source, size, crop_ratio, channels

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these images: one kind of crop, the key being the index."""
        bad: dict[int, str] = {}
        crops, keys, labels = [], [], []
        for index in indices:
            try:
                raw, label = self.source.read(index)
                crops.append(center_view(decode(raw, self.channels), self.size, self.crop_ratio))
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
                continue
            keys.append(index)
            labels.append(-1 if label is None else label)
        if not crops:
            return Batch(Views([], torch.tensor([]).long(), torch.tensor([]).long()), bad)
        return Batch(Views([stack(crops)], torch.tensor(keys), torch.tensor(labels)), bad)


def eval_batches(images: EvalImages, batch_size: int, workers: int, pin: bool) -> Iterator[Batch]:
    """All images of an evaluation set in order; a batch without a readable image is empty."""
    n = len(images.source)
    loader = DataLoader(
        images,
        batch_sampler=[list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)],
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_quiet_worker if workers else None,
    )
    return _iterate(loader)


def _iterate(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The batches of a loader, whose workers start now and end with this process."""
    batches = iter(loader)
    if loader.num_workers:
        atexit.unregister(_end_workers)  # it must come before what the loader itself registers
        atexit.register(_end_workers)
    return _plain_errors(batches)


def _plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """A user's mistake found by a worker, without the traceback that comes with it from there."""
    try:
        yield from batches
    except UserError as error:
        # The traceback is a cycle that holds the loader: freed as one, it waits for its workers.
        error.__traceback__ = None
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _end_workers() -> None:
    """Workers do not heed the SIGTERM by which Python ends them: an error would hang at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _as_is(batch: Any) -> Any:
    return batch


def _quiet_worker(worker: int) -> None:
    """Workers leave stopping to the main process (Slurm and Ctrl-C signal every process)."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


def estimate_statistics(
    source: Source, channels: int, seed: int, count: int = 2000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the pixels of ``count`` random images.

    Images weigh equally, whatever their size; uint8 images are scaled to 0..1. Unreadable images
    are left out.

    Raises:
        UserError: no image could be read, or a channel is constant.
    """
    picks = permute(np.arange(min(count, len(source)), dtype=np.int64), len(source), fold(seed))
    first, second, n = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    reason = ""
    for index in picks:
        try:
            image = decode(source.read(int(index))[0], channels)
        except BadImage as error:
            reason = f"{source.name(int(index))}: {error}"
            continue
        pixels = image.double() / (255 if image.dtype == torch.uint8 else 1)
        first += pixels.mean((1, 2))
        second += pixels.square().mean((1, 2))
        n += 1
    if not n:
        raise UserError(f"none of {len(picks)} images of {source.spec} can be read: {reason}")
    mean = first / n
    std = (second / n - mean.square()).clamp(min=0).sqrt()
    if not (std > 1e-6).all():
        raise UserError(
            f"a channel of {source.spec} is constant (standard deviations {std.tolist()})"
        )
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())
