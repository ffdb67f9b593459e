"""Training pipelines: a side's loader and step together, from image files to weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ssl_vit.benchmarks.breakdown import breakdown
from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.peers import Peer
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.speed import wait
from ssl_vit.common.config import RunConfig
from ssl_vit.common.task import Task
from ssl_vit.data.base import Source, epoch_length
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.order import Order
from ssl_vit.data.raster import BadImage
from ssl_vit.data.workers import load
from ssl_vit.training.prefetch import on_device

_ENDLESS = 1 << 40
QUEUED = 4  # most batches that wait in the queue of one worker (ours; torch's default is lower)


class Pipeline:
    """Training pipeline of a side: its step fed by its own loader, in the current process."""

    def __init__(self, work: Workload, workers: int) -> None:
        self.work, self.workers = work, workers
        self.batches = self.load()

    def load(self) -> Iterator[Any]:
        """Endless batches of the side's loader."""
        raise NotImplementedError

    def learn(self, batch: Any) -> Tensor:
        """One step, with the transfer to the device; returns the loss."""
        raise NotImplementedError

    def timed(self, steps: int) -> tuple[float, float, float]:
        """Seconds of consecutive steps, seconds of them spent waiting for images, last loss."""
        device, waited = self.work.device, 0.0
        wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            loss = self.learn(batch)
        wait(device)
        return time.perf_counter() - started, waited, float(loss)

    def step_alone(self, steps: int) -> float:
        """Seconds of a step whose batch is ready, once the workers have filled their queues."""
        batch = next(self.batches)
        for _ in range(QUEUED):
            self.learn(batch)
        wait(self.work.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.learn(batch)
        wait(self.work.device)
        return (time.perf_counter() - started) / steps

    def loader_alone(self, rounds: int) -> float:
        """Images per second of the loader without training.

        After the first batch of every worker, ``rounds`` of one batch of each worker are timed.
        """
        batches, each = self.load(), max(1, self.workers)
        for _ in range(each):
            next(batches)
        started = time.perf_counter()
        for _ in range(rounds * each):
            next(batches)
        return rounds * each * self.work.batch_size / (time.perf_counter() - started)


class OurPipeline(Pipeline):
    """Our pipeline: loader and step as in pretraining."""

    def __init__(
        self, work: Workload, make: Callable[[], Task], run: RunConfig, source: Source, workers: int
    ) -> None:
        self.side = OurStep.build(work, make, run)
        self.images = TrainImages(source, work.spec, work.channels, work.seed)
        super().__init__(work, workers)

    def load(self) -> Iterator[Any]:
        """Batches of the training loader, moved to the device."""
        order = Order(epoch_length(self.images.source), self.work.batch_size, self.work.seed)
        pin = self.work.device.type == "cuda"
        batches = train_batches(self.images, order, 0, _ENDLESS, self.workers, pin)
        return on_device(batches, self.work.device)

    def learn(self, batch: Any) -> Tensor:
        """One step of the trainer."""
        return self.side.learn(batch)

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median seconds of each stage of a step."""
        return breakdown(self.side.trainer, lambda: next(self.batches), steps, loads=True)


class PeerPipeline(Pipeline):
    """Peer pipeline: its step, and its augmentation chain in torch's loader, as many workers.

    ``skips``: as of :class:`ChainImages`.
    """

    skips = False

    def __init__(
        self, work: Workload, peer: type[Peer], chain: OriginalChain, source: Source, workers: int
    ) -> None:
        self.side = peer.build(work)
        self.images = ChainImages(source, chain, self.skips)
        super().__init__(work, workers)

    def load(self) -> Iterator[Any]:
        """Batches in random order."""
        size, seed = self.work.batch_size, self.work.seed
        batches = _Shuffled(len(self.images.source), size, seed)
        pin = self.work.device.type == "cuda"
        return load(self.images, batches, self.workers, pin, collate=default_collate)

    def learn(self, batch: Any) -> Tensor:
        """One step of the peer; the workers have finished the views."""
        device = self.work.device
        return self.side.learn([v.to(device, non_blocking=device.type == "cuda") for v in batch])


class ChainImages(Dataset):
    """Map-style dataset of a source's images after a peer's chain.

    ``skips``: one that cannot be read is replaced by the next that can.
    """

    def __init__(self, source: Source, chain: OriginalChain, skips: bool = False) -> None:
        self.source, self.chain, self.skips = source, chain, skips

    def __getitem__(self, i: int) -> list[Tensor]:
        for more in range(len(self.source) if self.skips else 0):
            with suppress(BadImage, OSError):
                return self.chain(self.source.read((i + more) % len(self.source))[0])
        return self.chain(self.source.read(i)[0])


class _Shuffled:
    """Shuffled batches of indices, in another order each epoch; an incomplete batch is dropped."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        rng, size = np.random.default_rng(self.seed), self.batch_size
        while True:
            order = rng.permutation(self.n).tolist()
            yield from (order[i : i + size] for i in range(0, self.n - size + 1, size))
