"""A run tried out before it begins: what a step takes of memory and time, what the loader gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ssl_vit.benchmarks.speed import wait
from ssl_vit.common.config import RunFailed
from ssl_vit.common.distributed import gather_rows
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.loader import BadImages, Batch, TrainImages, train_batches
from ssl_vit.training.footprint import Memory, free_memory, measure_step, memory_of
from ssl_vit.training.launched import launched
from ssl_vit.training.parallel import loader_workers, own_cores
from ssl_vit.training.session import Session

_LOADER_SECONDS, _STEP_SECONDS, _MOST_STEPS = 2.0, 1.0, 100


@dataclass(frozen=True)
class Pace:
    """Images per second of all processes.

    ``loader``: what their loaders deliver when nothing is trained. ``step``: what the steps take
    when no image is waited for. ``run``: what comes of both. ``bound``: which of them decides it.
    """

    loader: float
    step: float
    run: float
    bound: str


@dataclass(frozen=True)
class Found:
    """What a trial measured, of the process that has least or is slowest.

    ``flops``: of an image, forward and backward. ``available``: bytes, with those that the process
    holds already. ``per_image``: bytes of activations. ``per_crop``: bytes that one crop of the
    most numerous kind adds, for all images that go through at once; 0: unknown. ``fits``: whether
    whole steps could be taken. ``pace``: of those. ``peak``: the most bytes that a CUDA device had
    in use meanwhile. ``finite``: whether all their losses and gradients were.
    """

    flops: float
    memory: Memory
    available: float
    per_image: float
    per_crop: float = 0.0
    fits: bool = True
    pace: Pace | None = None
    peak: float = 0.0
    finite: bool = True


def try_out(session: Session) -> Found:
    """Memory and operations, from steps of a few images; speed, from whole ones, if those fit.

    The weights move, and are of no use after it. All processes must call it.

    Raises:
        RunFailed: not even a few images fit into memory; with several processes, a whole step does
            not fit into that of this one.
        UserError: too many images are unreadable.
    """
    try:
        found = _probe(session)
    except torch.OutOfMemoryError:
        raise RunFailed("a step of 3 images does not fit into the device's memory") from None
    if found.memory.total > found.available:
        return replace(found, fits=False, per_crop=_one_crop(session, found))
    workers = loader_workers(session.config.data.workers, session.parallel.device)
    steps, delivered = _deliver(session, workers)
    try:
        return _take(session, found, steps, workers, delivered)
    except torch.OutOfMemoryError:
        # The others may be waiting for this process: it has to leave.
        if session.parallel.world > 1:
            raise RunFailed("a whole step does not fit into the device's memory") from None
        return replace(found, fits=False)


def _probe(session: Session, spec: ViewSpec | None = None) -> Found:
    """From steps of two and of three images, from where on memory grows evenly."""
    trainer, size = session.trainer, session.part_size
    images, (epoch, indices) = _images(session, spec), session.order.part(0, 0)
    flops, kept = 0.0, list[float]()
    for count in (min(2, size), min(3, size)):
        batch = images.__getitems__([(epoch, int(i)) for i in indices[:count]])
        total, held = measure_step(trainer, [batch])
        flops, kept = total / count, [*kept, float(held)]
    per_image = kept[1] - kept[0] or kept[1] / size
    memory = memory_of(trainer, kept[1] + max(0, size - 3) * per_image)
    free = free_memory(session.parallel.device, launched().local_world)
    own = [flops, per_image, -free - memory.state, *vars(memory).values()]
    flops, per_image, lacking, *parts = _largest(own)
    return Found(flops, Memory(*parts), available=-lacking, per_image=per_image)


def _largest(values: list[float]) -> list[float]:
    """Each value's largest over all processes."""
    return gather_rows(torch.tensor([values], dtype=torch.float64)).amax(0).tolist()


def _one_crop(session: Session, found: Found) -> float:
    """Bytes that one crop of the most numerous kind adds, in a whole part of the batch."""
    crops = list(session.views.crops)
    most = max(range(len(crops)), key=lambda i: crops[i].count)
    count = crops[most].count
    if count < 2:
        return 0.0
    crops[most] = replace(crops[most], count=count - 1)
    fewer = _probe(session, replace(session.views, crops=tuple(crops)))
    return (found.per_image - fewer.per_image) * session.part_size


def _images(session: Session, spec: ViewSpec | None = None) -> TrainImages:
    views, config = spec or session.views, session.config
    return TrainImages(session.images.train, views, config.data.channels, config.run.seed)


def _deliver(session: Session, workers: int) -> tuple[list[list[Batch]], float]:
    """The batches of two steps, and the images per second that this process's loader delivers.

    After every worker's first batch whole rounds are timed, one batch of each, for some seconds.
    """
    pin, parts = session.parallel.device.type == "cuda", session.config.optim.accumulate
    endless = 1 << 40
    batches = train_batches(_images(session), session.order, 0, endless, workers, pin)
    bad = BadImages(session.images.train, session.config.data.max_bad)
    each = max(1, workers)
    first = [_next(batches, bad) for _ in range(2 * parts)]
    for _ in range(-2 * parts % each):
        _next(batches, bad)
    rounds, started = 0, time.perf_counter()
    while not rounds or time.perf_counter() - started < _LOADER_SECONDS:
        for _ in range(each):
            _next(batches, bad)
        rounds += 1
    seconds = time.perf_counter() - started
    bad.count()
    return [first[:parts], first[parts:]], rounds * each * session.part_size / seconds


def _next(batches: Iterator[Batch], bad: BadImages) -> Batch:
    batch = next(batches)
    bad.note(batch.bad)
    return batch


def _take(
    session: Session, found: Found, steps: list[list[Batch]], workers: int, delivered: float
) -> Found:
    """Whole steps: one to warm up, which says how many others there is time for."""
    device, world = session.parallel.device, session.parallel.world
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warm = _seconds(session, steps[:1], 1)[0]
    count = int(_STEP_SECONDS / _largest([warm])[0])
    seconds, skipped = _seconds(session, steps[::-1], max(1, min(_MOST_STEPS, count)))
    peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
    slowest, skipped, peak, least = _largest([seconds, skipped, peak, -delivered])
    step = session.order.batch_size / world / slowest
    busy = torch.get_num_threads() if device.type == "cpu" else 0
    pace = pace_of(-least, step, workers, busy, own_cores())
    whole = Pace(world * pace.loader, world * pace.step, world * pace.run, pace.bound)
    return replace(found, pace=whole, peak=peak, finite=not skipped)


def _seconds(session: Session, steps: list[list[Batch]], count: int) -> tuple[float, float]:
    """Seconds of each of ``count`` steps, and how many of them were not finite."""
    trainer, device = session.trainer, session.parallel.device
    skipped = torch.zeros((), device=device)
    wait(device)
    started = time.perf_counter()
    for i in range(count):
        skipped = skipped + trainer.update(steps[i % len(steps)])["skipped"]
        trainer.step = min(trainer.step + 1, trainer.schedule.total - 1)
    wait(device)
    return (time.perf_counter() - started) / count, float(skipped)


def pace_of(loader: float, step: float, workers: int, busy: int, own: int) -> Pace:
    """The pace of a run, from that of its loader and of its steps, each measured alone.

    Without workers one waits for the other. With them the slower one decides, unless the steps run
    on ``busy`` threads of the same ``own`` cores as the workers: then an image also costs the core
    seconds of both.
    """
    if not workers:
        return Pace(loader, step, 1 / (1 / loader + 1 / step), "loading and computing in turn")
    paces = {"the step": step, "the loader": loader}
    if busy:
        work = min(workers, own) / loader + min(busy, own) / step
        paces["the cores, which loader and step share"] = own / work
    run = min(paces.values())
    # What is named has to be worth it: one of the two alone, if that says nearly the same.
    bound = next(name for name, pace in paces.items() if pace <= 1.1 * run)
    return Pace(loader, step, run, bound)
