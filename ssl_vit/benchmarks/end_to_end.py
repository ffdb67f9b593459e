"""Training on real images, from files to weights: how fast, and what one waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.benchmarks.breakdown import breakdown
from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.loader import some_images
from ssl_vit.benchmarks.measured import Speed, describe, machine_card
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.peers import NONE, Peer, peer_names, peers_of
from ssl_vit.benchmarks.side import Work
from ssl_vit.benchmarks.speed import wait
from ssl_vit.benchmarks.step import OURS, shares, step_peers
from ssl_vit.benchmarks.trial import pace_of
from ssl_vit.common.config import RunConfig, check
from ssl_vit.common.task import Task
from ssl_vit.data.base import Source
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.order import Order
from ssl_vit.training.parallel import loader_workers, own_cores
from ssl_vit.training.prefetch import on_device

_ENDLESS = 1 << 40
_QUEUED = 4  # batches of each worker that wait at most, of ours; of torch by default fewer


class Feeding:
    """A side's step fed by its own loader, in the process where it is."""

    def __init__(self, work: Work, workers: int) -> None:
        self.work, self.workers = work, workers
        self.batches = self.load()

    def load(self) -> Iterator[Any]:
        """Its loader's batches, without end."""
        raise NotImplementedError

    def learn(self, batch: Any) -> Tensor:
        """A step, transfer to the device included; its loss."""
        raise NotImplementedError

    def segment(self, steps: int) -> tuple[float, float, float]:
        """Seconds of so many steps in a row, those of them spent waiting for images, last loss."""
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
        """Seconds of a step when its batch is there, its workers having filled their queues."""
        batch = next(self.batches)
        for _ in range(_QUEUED):
            self.learn(batch)
        wait(self.work.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.learn(batch)
        wait(self.work.device)
        return (time.perf_counter() - started) / steps

    def loader_alone(self, rounds: int) -> float:
        """Images per second when nothing is trained.

        After every worker's first batch so many rounds are timed, one batch of each worker.
        """
        batches, each = self.load(), max(1, self.workers)
        for _ in range(each):
            next(batches)
        started = time.perf_counter()
        for _ in range(rounds * each):
            next(batches)
        return rounds * each * self.work.batch_size / (time.perf_counter() - started)


class OurFeeding(Feeding):
    """Our step and loader."""

    def __init__(
        self, work: Work, make: Callable[[], Task], run: RunConfig, source: Source, workers: int
    ) -> None:
        self.side = OurStep.build(work, make, run)
        self.images = TrainImages(source, work.spec, work.channels, work.seed)
        super().__init__(work, workers)

    def load(self) -> Iterator[Any]:
        """As in pretraining."""
        order = Order(len(self.images.source), self.work.batch_size, self.work.seed)
        pin = self.work.device.type == "cuda"
        batches = train_batches(self.images, order, 0, _ENDLESS, self.workers, pin)
        return on_device(batches, self.work.device)

    def learn(self, batch: Any) -> Tensor:
        """As in pretraining."""
        self.side.batch = batch
        return self.side.step()

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median seconds of each part of a step."""
        return breakdown(self.side.trainer, lambda: next(self.batches), steps, loads=True)


class PeerFeeding(Feeding):
    """A peer's step, and its chain in torch's loader with as many workers."""

    def __init__(
        self, work: Work, peer: type[Peer], chain: OriginalChain, source: Source, workers: int
    ) -> None:
        self.side = peer.build(work)
        self.images = ChainImages(source, chain)
        super().__init__(work, workers)

    def load(self) -> Iterator[Any]:
        """In random order, batch by batch."""
        loader = DataLoader(
            self.images,
            batch_sampler=_Shuffled(len(self.images.source), self.work.batch_size, self.work.seed),
            num_workers=self.workers,
            pin_memory=self.work.device.type == "cuda",
        )
        return iter(loader)

    def learn(self, batch: Any) -> Tensor:
        """Its views are finished by the workers."""
        device = self.work.device
        return self.side.learn([v.to(device, non_blocking=device.type == "cuda") for v in batch])


class ChainImages(Dataset):
    """A source's images through a peer's chain, as torch's loader asks for them."""

    def __init__(self, source: Source, chain: OriginalChain) -> None:
        self.source, self.chain = source, chain

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.chain(self.source.read(i)[0])


class _Shuffled:
    """Batches of indices, each epoch in another order; what is left over is dropped."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        rng, size = np.random.default_rng(self.seed), self.batch_size
        while True:
            order = rng.permutation(self.n).tolist()
            yield from (order[i : i + size] for i in range(0, self.n - size + 1, size))


def measure_feeding(
    method: str, work: Work, make: Callable[[], Task], config: Any
) -> dict[str, Any]:
    """The report, for JSON; ``config`` holds the options of the door. Sides take turns.

    Raises:
        UserError: as ``some_images``; a peer that there is not, or too few images.
    """
    both = ("original",) if peers_of(method, "CHAINS") else ()
    names = peer_names(config.against, both, f"end-to-end {method}")
    peers = step_peers(method, ",".join(names) or NONE)
    source, bad, chains = some_images(config, work.spec, work.statistics, names, method)
    size, n = work.batch_size, len(source)
    check(size <= n, f"--batch-size is {size}; there are {n} images")
    workers = loader_workers(config.data.workers, work.device)
    with ExitStack() as stack:
        ours = OwnProcess(OurFeeding, work, make, config.run, source, workers)
        sides = {OURS: stack.enter_context(ours)}
        for name, peer in peers.items():
            side = OwnProcess(PeerFeeding, work, peer, chains[name], source, workers)
            sides[name] = stack.enter_context(side)
        results = _time(sides, work, workers, config)
        ours.ask("segment", _lead_in(workers, config))
        parts = ours.ask("breakdown", config.steps)
    rate = "images_per_second"
    return {
        **machine_card(work.device, torch.get_num_threads()),
        "precision": str(work.precision).removeprefix("torch."),
        "sizes": {
            "source": source.spec,
            "images": n,
            "unreadable": bad,
            "batch_size": size,
            "steps": config.steps,
            "workers": workers,
            "crops": describe(work.spec),
        },
        "results": results,
        "ratios": {
            f"{OURS} / {name}": results[OURS][rate] / found[rate]
            for name, found in results.items()
            if name != OURS
        },
        "breakdown": shares(parts),
    }


def _lead_in(workers: int, config: Any) -> int:
    """Steps before a turn counts: those that use up what was prepared while it was not its turn."""
    return int(config.warm_up + _QUEUED * workers)


def _time(
    sides: dict[str, OwnProcess], work: Work, workers: int, config: Any
) -> dict[str, dict[str, Any]]:
    """What is told of each side."""
    loaders = {n: s.ask("loader_alone", config.steps) for n, s in sides.items()}
    lead_in = _lead_in(workers, config)
    alone = {n: s.ask("step_alone", config.steps) for n, s in sides.items()}
    speeds = {name: Speed(work.batch_size * config.steps) for name in sides}
    waited: dict[str, float] = dict.fromkeys(sides, 0.0)
    losses: dict[str, float] = {}
    for _ in range(config.repeats):
        for name, side in sides.items():
            side.ask("segment", lead_in)
            seconds, waiting, losses[name] = side.ask("segment", config.steps)
            speeds[name].seconds.append(seconds)
            waited[name] += waiting
    busy = torch.get_num_threads() if work.device.type == "cpu" else 0
    results = {}
    for name, speed in speeds.items():
        step = work.batch_size / alone[name]
        results[name] = {
            **speed.card(),
            "seconds_of_a_step": work.batch_size / speed.rate,
            "share_waiting_for_images": waited[name] / sum(speed.seconds),
            "loader_images_per_second": loaders[name],
            "step_images_per_second": step,
            "bound": pace_of(loaders[name], step, workers, busy, own_cores()).bound,
            "last_loss": losses[name],
        }
    return results
