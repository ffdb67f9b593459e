"""How fast images are prepared and steps are done; ours and a peer's turns alternate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.config import OptimConfig, RunConfig, RunFailed, UserError
from ssl_vit.data.augment import Normalize, ViewSpec
from ssl_vit.data.decode import BadImage
from ssl_vit.data.loader import Batch, TrainImages
from ssl_vit.data.sources import Source, Subset
from ssl_vit.encoder import choose_attention, compile_blocks
from ssl_vit.evaluators.measured import Speed
from ssl_vit.evaluators.peers import LightlyDINO, OriginalChain
from ssl_vit.task import Task, Views
from ssl_vit.training.loop import Trainer
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, reuse_memory

log = logging.getLogger("ssl_vit")
# A step is measured in the middle of a run of this length: nothing warms up or is frozen there.
_EPOCHS, _STEPS_PER_EPOCH = 100, 1000


def readable(source: Source, opens: list[Callable[[Any], object]]) -> tuple[Source, int]:
    """The images that all of ``opens`` can open, and how many others there were.

    Each side would otherwise meet a bad image in its own way. It also brings the files into memory,
    so that no repeat pays for the disk.

    Raises:
        UserError: no image is left.
    """
    good, reason = [], ""
    for i in range(len(source)):
        try:
            raw = source.read(i)[0]
            for each in opens:
                each(raw)
            good.append(i)
        except (BadImage, OSError) as error:
            reason = f"{source.name(i)}: {error}"
            log.warning("unreadable image left out: %s", reason)
    if not good:
        n = len(source)
        raise UserError(f"none of {n} images of {source.spec} can be read, the last: {reason}")
    return Subset(source, np.array(good)), len(source) - len(good)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one core inside, as in a worker process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class LoaderSpeeds:
    """One core, images per second of: the workers' half, the device's half on the CPU, both in
    turn, and the whole original chain (None: not asked for)."""

    workers: Speed
    device: Speed
    both: Speed
    original: Speed | None


def time_loader(
    images: TrainImages,
    normalize: Normalize,
    original: OriginalChain | None,
    batch_size: int,
    repeats: int,
) -> LoaderSpeeds:
    """Pass over all images ``repeats`` times, with other crops each time, on one thread.

    The first batch of both sides is made once before, and not counted.
    """
    n = len(images.source)
    parts = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    workers, device, both, peer = Speed(n), Speed(n), Speed(n), Speed(n)
    with one_thread():
        for repeat in range(-1, repeats):
            todo = parts if repeat >= 0 else parts[:1]
            halves = _ours(images, normalize, todo, repeat + 1)
            theirs = _theirs(images.source, original, todo) if original else 0.0
            if repeat >= 0:
                workers.seconds.append(halves[0])
                device.seconds.append(halves[1])
                both.seconds.append(sum(halves))
                peer.seconds.append(theirs)
                log.info("repeat %d of %d done", repeat + 1, repeats)
    return LoaderSpeeds(workers, device, both, peer if original else None)


def _ours(
    images: TrainImages, normalize: Normalize, parts: list[range], epoch: int
) -> tuple[float, float]:
    """Seconds of the workers' half and of the device's."""
    cropping = finishing = 0.0
    for part in parts:
        started = time.perf_counter()
        batch = images.__getitems__([(epoch, i) for i in part])
        cropped = time.perf_counter()
        normalize(batch.views)
        cropping += cropped - started
        finishing += time.perf_counter() - cropped
    return cropping, finishing


def _theirs(source: Source, chain: OriginalChain, parts: list[range]) -> float:
    started = time.perf_counter()
    for part in parts:
        chain.batch([source.read(i)[0] for i in part])
    return time.perf_counter() - started


def random_batch(spec: ViewSpec, batch: int, channels: int, seed: int) -> Batch:
    """A batch as workers hand it over, of noise, without photometric operations."""
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randint(
            0, 256, (batch * c.count, channels, *c.size), dtype=torch.uint8, generator=generator
        )
        for c in spec.crops
    ]
    return Batch(Views(crops, torch.arange(batch), torch.full((batch,), -1)))


def single_views(batch: Batch, spec: ViewSpec, normalize: Normalize) -> list[Tensor]:
    """The same batch for a peer: every view (B, C, h, w) apart, normalised, on the device."""
    views = normalize(batch.views.to(normalize.mean.device)).crops
    return [v for crops, c in zip(views, spec.crops, strict=True) for v in crops.chunk(c.count)]


def lightly_step(
    sizes: tuple[Any, ...],
    spec: ViewSpec,
    batch: Batch,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> tuple[Callable[[], Tensor], int]:
    """A step of lightly's DINO on a batch (``sizes``: of ``LightlyDINO``), and its parameters."""
    peer = LightlyDINO(*sizes)
    views = single_views(batch, spec, Normalize(*statistics).to(peer.device))

    def step() -> Tensor:
        loss = peer.step(views)
        wait(peer.device)
        return loss

    return step, peer.parameters


def trainer_midway(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    normalize: Normalize,
    device: torch.device,
    precision: torch.dtype,
) -> Trainer:
    """What pretraining would run, alone on ``device``, in the middle of its way."""
    reuse_memory(device)
    choose_attention(task, device)
    task.to(device)
    if run.compile:
        compile_blocks(task)
    run = replace(run, length=f"{_EPOCHS}ep")
    schedule = Schedule(run, optim, _STEPS_PER_EPOCH)
    alone = Parallel(0, 1, device)
    trainer = Trainer(task, run, optim, schedule, normalize.to(device), alone, precision)
    trainer.step = schedule.total // 2
    return trainer


def our_step(trainer: Trainer, batch: Batch) -> Callable[[], Tensor]:
    """What the loop does between two batches; it returns the loss."""

    def step() -> Tensor:
        trainer.task.train()
        loss = trainer.update([batch])["loss"]
        trainer.step += 1
        return loss

    return step


def time_steps(
    steps: dict[str, Callable[[], Any]],
    device: torch.device,
    batch_size: int,
    warm_up: int,
    repeats: int,
) -> tuple[dict[str, Speed], dict[str, float]]:
    """Speed and last loss of each kind of step, one of each in turn; ``warm_up`` rounds before.

    Raises:
        RunFailed: a loss is not finite: such a step may be skipped, and is no measure.
    """
    speeds, losses = {name: Speed(batch_size) for name in steps}, {}
    for i in range(-warm_up, repeats):
        for name, step in steps.items():
            wait(device)
            started = time.perf_counter()
            loss = step()
            wait(device)
            seconds = time.perf_counter() - started
            losses[name] = float(loss)
            if not math.isfinite(losses[name]):
                raise RunFailed(f"the loss of {name} is {losses[name]}; nothing was measured")
            if i >= 0:
                speeds[name].seconds.append(seconds)
    return speeds, losses


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
