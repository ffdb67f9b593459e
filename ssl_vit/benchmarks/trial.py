"""Trial of a run before it begins: memory and time of a step, throughput of the loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ssl_vit.benchmarks.speed import wait
from ssl_vit.common.distributed import gather_rows
from ssl_vit.common.errors import RunFailed
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.batch import Batch
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.training.footprint import Memory, free_memory, measure_step, memory_of
from ssl_vit.training.launched import launched
from ssl_vit.training.parallel import loader_workers, own_cores
from ssl_vit.training.session import Session

_LOADER_SECONDS, _STEP_SECONDS, _MOST_STEPS = 2.0, 1.0, 100


@dataclass(frozen=True)
class Throughput:
    """Throughput of all processes, in images per second.

    ``loader``: the loaders alone, without training. ``step``: the steps alone, without waiting for
    images. ``run``: both together. ``bound``: the name of what limits ``run``.
    """

    loader: float
    step: float
    run: float
    bound: str


@dataclass(frozen=True)
class Found:
    """Trial results, of the process with the least memory or speed.

    ``flops``: per image, forward and backward. ``available``: free bytes, including those that the
    process holds already. ``per_image``: bytes of activations. ``per_crop``: bytes that one crop of
    the most numerous kind adds, for all images of a part; 0: unknown. ``fits``: whether whole
    steps fit into memory. ``throughput``: of whole steps; None: not measured. ``peak``: peak
    memory of a CUDA device in bytes. ``finite``: whether all losses and gradients were finite.
    """

    flops: float
    memory: Memory
    available: float
    per_image: float
    per_crop: float = 0.0
    fits: bool = True
    throughput: Throughput | None = None
    peak: float = 0.0
    finite: bool = True


def try_out(session: Session) -> Found:
    """Trial: memory and FLOPs from steps of a few images; speed from whole steps, if they fit.

    The weights change, so the session cannot be trained afterwards. All processes must call it.

    Raises:
        RunFailed: not even a few images fit into memory; or, with several processes, a whole step
            does not fit into the memory of this one.
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
        # Other processes may be waiting for this one: it has to exit.
        if session.parallel.world > 1:
            raise RunFailed("a whole step does not fit into the device's memory") from None
        return replace(found, fits=False)


def _probe(session: Session, spec: ViewSpec | None = None) -> Found:
    """Trial results from steps of 2 and 3 images, from which on memory grows linearly."""
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
    """Maximum of each value over all processes."""
    return gather_rows(torch.tensor([values], dtype=torch.float64)).amax(0).tolist()


def _one_crop(session: Session, found: Found) -> float:
    """Bytes that one crop of the most numerous kind adds, for a whole part of the batch."""
    crops = list(session.views.crops)
    most = max(range(len(crops)), key=lambda i: crops[i].count)
    count = crops[most].count
    if count < 2:
        return 0.0
    crops[most] = replace(crops[most], count=count - 1)
    fewer = _probe(session, replace(session.views, crops=tuple(crops)))
    return (found.per_image - fewer.per_image) * session.part_size


def _images(session: Session, spec: ViewSpec | None = None) -> TrainImages:
    # The last phase is the heaviest as a rule, and the one that the run has to get through.
    views, config = spec or session.views.last, session.config
    channels, cache = config.data.channels, session.images.cache
    cache = cache.read_only() if cache else None  # a trial writes nothing
    return TrainImages(session.images.train, views, channels, config.run.seed, cache)


def _deliver(session: Session, workers: int) -> tuple[list[list[Batch]], float]:
    """Batches of two steps, and the throughput of this process's loader in images per second.

    After the first batch of every worker, whole rounds of one batch each are timed for seconds.
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
    bad.note(batch)
    return batch


def _take(
    session: Session, found: Found, steps: list[list[Batch]], workers: int, delivered: float
) -> Found:
    """Trial results with whole steps: one to warm up, whose time decides the number of others."""
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
    own = combined_throughput(-least, step, workers, busy, own_cores())
    whole = Throughput(world * own.loader, world * own.step, world * own.run, own.bound)
    return replace(found, throughput=whole, peak=peak, finite=not skipped)


def _seconds(session: Session, steps: list[list[Batch]], count: int) -> tuple[float, float]:
    """Mean seconds of ``count`` steps, and how many of them were not finite."""
    trainer, device = session.trainer, session.parallel.device
    skipped = torch.zeros((), device=device)
    wait(device)
    started = time.perf_counter()
    for i in range(count):
        skipped = skipped + trainer.update(steps[i % len(steps)])["skipped"]
        trainer.step = min(trainer.step + 1, trainer.schedule.total - 1)
    wait(device)
    return (time.perf_counter() - started) / count, float(skipped)


def combined_throughput(
    loader: float, step: float, workers: int, busy: int, own: int
) -> Throughput:
    """Throughput of a run, from that of its loader and of its steps, each measured alone.

    Without workers, loading and computing alternate. With workers the slower of the two decides,
    unless the steps run on ``busy`` threads of the same ``own`` cores as the workers: then an image
    also costs the core seconds of both.
    """
    if not workers:
        alternating = 1 / (1 / loader + 1 / step)
        return Throughput(loader, step, alternating, "loading and computing in turn")
    limits = {"the step": step, "the loader": loader}
    if busy:
        work = min(workers, own) / loader + min(busy, own) / step
        limits["the cores, which loader and step share"] = own / work
    run = min(limits.values())
    # The step or the loader is named if it alone limits the run nearly as much.
    bound = next(name for name, rate in limits.items() if rate <= 1.1 * run)
    return Throughput(loader, step, run, bound)
