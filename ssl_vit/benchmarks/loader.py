"""Loader benchmark: images per second that one core prepares, ours and peers' chains in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.measured import Speed, describe, machine_card
from ssl_vit.benchmarks.peers import peer_names, peers_of
from ssl_vit.common.errors import UserError, check
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.base import Source, Subset
from ssl_vit.data.cache import open_cache
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import open_source
from ssl_vit.data.statistics import FEW, survey
from ssl_vit.evaluators.watch import bounded

log = logging.getLogger("ssl_vit")
WORKERS, DEVICE, BOTH = "workers", "device half on CPU", "workers + device half"
CACHED = "workers, from the cache"
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def some_images(
    config: Any, spec: ViewSpec, statistics: Statistics, names: list[str], method: str
) -> tuple[Source, int, dict[str, OriginalChain]]:
    """Benchmark images: at most ``config.count`` of ``--data.train``, a seeded choice.

    Returns:
        those that all sides can open, the number of the others, and the named peers' chains.

    Raises:
        UserError: no source, no readable image, or images that a chain does not support.
    """
    data = config.data
    check(bool(data.train), "--data.train is missing; it names images, as folder:PATH")
    source = open_source(data.train, data, weighted=True)
    if names:
        check_shallow(source, config, names)
    known = peers_of(method, "CHAINS")
    chains = {n: known[n](spec, data.channels, *statistics) for n in names}
    opens: list[Callable[[Any], object]] = [lambda raw: decode(raw, data.channels, data)]
    opens += [chain.open for chain in chains.values()]
    chosen, bad = readable(bounded(source, config.count, config.run.seed), opens)
    return chosen, bad, chains


def check_shallow(source: Source, config: Any, names: list[str]) -> None:
    """Check that peers can read a source's images.

    Raises:
        UserError: they have more than 8 bits, or none is readable.
    """
    check(
        not is_deep(source, config),
        f"--against {','.join(names)} reads 8-bit images; those of {config.data.train} are deeper",
    )


def is_deep(source: Source, config: Any) -> bool:
    """True if images of a source have more than 8 bits.

    Raises:
        UserError: none is readable.
    """
    found = survey(source, config.data.channels, config.run.seed, FEW)
    found.check()
    return bool(found.deep)


def measure_loader(
    config: Any, spec: ViewSpec, statistics: Statistics, method: str
) -> dict[str, Any]:
    """Loader report, for JSON; ``config`` holds the options of the benchmark.

    Raises:
        UserError: as ``some_images``, or no such peer.
    """
    data, seed = config.data, config.run.seed
    names = peer_names(config.against, peers_of(method, "CHAINS"), f"loader {method}")
    chosen, bad, chains = some_images(config, spec, statistics, names, method)
    size = min(config.batch_size or config.optim.batch_size, len(chosen))
    images = TrainImages(chosen, spec, data.channels, seed)
    normalize = Normalize(*statistics, bounded=not is_deep(chosen, config))
    cached = None
    if cache := open_cache(data):
        cache.prepare()
        cached = TrainImages(chosen, spec, data.channels, seed, cache)
    speeds = time_loader(images, normalize, chains, size, config.repeats, cached)
    ratios = {
        f"{half} / {name}": speeds[half].rate / speeds[name].rate
        for name in chains
        for half in (WORKERS, BOTH)
    }
    if cache:
        ratios[f"{CACHED} / {WORKERS}"] = speeds[CACHED].rate / speeds[WORKERS].rate
        if cache.stopped:
            log.warning("%s", cache.stopped)
    sizes = {
        "source": data.train,
        "images": len(chosen),
        "unreadable": bad,
        "batch_size": size,
        "crops": describe(spec),
    }
    return {
        **machine_card(torch.device("cpu"), threads=1),
        "sizes": sizes,
        "results": {name: speed.card() for name, speed in speeds.items()},
        "ratios": ratios,
    }


def readable(source: Source, opens: list[Callable[[Any], object]]) -> tuple[Source, int]:
    """Readable images: those that all of ``opens`` can open, and the number of the others.

    Sides handle unreadable images differently, so none is measured. Reading them also brings the
    files into the page cache, so that no repeat includes disk time.

    Raises:
        UserError: no image is readable.
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
            log.warning("unreadable image skipped: %s", reason)
    if not good:
        n = len(source)
        raise UserError(f"none of {n} images of {source.spec} can be read, the last: {reason}")
    return Subset(source, np.array(good)), len(source) - len(good)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch inside the context, as in a worker process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_loader(
    images: TrainImages,
    normalize: Normalize,
    chains: Mapping[str, OriginalChain],
    batch_size: int,
    repeats: int,
    cached: TrainImages | None = None,
) -> dict[str, Speed]:
    """Loader speeds from ``repeats`` passes over all images, with new crops each time, one thread.

    Measured are the workers' half, the device's half on the CPU, both together, and each peer's
    whole chain. The first batch of every side is made once before, untimed; of ``cached``, the same
    images with a cache, all are.
    """
    n = len(images.source)
    parts = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    sides = (WORKERS, DEVICE, BOTH, *([CACHED] if cached else []), *chains)
    speeds = {name: Speed(n) for name in sides}
    with one_thread():
        for repeat in range(-1, repeats):
            todo = parts if repeat >= 0 else parts[:1]
            halves = _ours(images, normalize, todo, repeat + 1)
            seconds = dict(zip((WORKERS, DEVICE, BOTH), (*halves, sum(halves)), strict=True))
            if cached:
                whole = todo if repeat >= 0 else parts
                seconds[CACHED] = _ours(cached, normalize, whole, repeat + 1)[0]
            seconds |= {name: _theirs(images.source, c, todo) for name, c in chains.items()}
            if repeat >= 0:
                for name, speed in speeds.items():
                    speed.seconds.append(seconds[name])
                log.info("repeat %d of %d done", repeat + 1, repeats)
    return speeds


def _ours(
    images: TrainImages, normalize: Normalize, parts: list[range], epoch: int
) -> tuple[float, float]:
    """Seconds of the workers' half and of the device's half."""
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
