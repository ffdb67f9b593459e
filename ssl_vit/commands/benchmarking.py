"""Benchmarks of a method: measured or counted, printed, and written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssl_vit.benchmarks.baseline import changes, check_alike, read_baseline
from ssl_vit.benchmarks.comparison import measure_training, setting
from ssl_vit.benchmarks.end_to_end import EndToEndComparison
from ssl_vit.benchmarks.loader import Statistics, measure_loader
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.speed_tables import TableOf, end_to_end_tables, loader_tables, step_tables
from ssl_vit.benchmarks.step import StepComparison
from ssl_vit.commands.benchmark_options import EndToEndConfig, LoaderConfig, StepConfig
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.commands.scale import scale_report, show_scale
from ssl_vit.common.config import OptimConfig
from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import resolve_device, resolve_precision

Report = dict[str, Any]


def loader_report(name: str, kind: type[Method], config: LoaderConfig[Any]) -> Report:
    """Loader report, without its head."""
    # For the random numbers of peers; ours do not depend on it.
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    return measure_loader(config, crops_of(kind, config), statistics(config.data), name)


def step_report(name: str, kind: type[Method], config: StepConfig[Any]) -> Report:
    """Step report, without its head."""
    make = partial(initial_method, kind, config)
    comparison = StepComparison(name, workload(kind, config), make, config)
    if not config.baseline:
        return measure_training(comparison)
    before = read_baseline(config.baseline, name)
    check_alike(config.baseline, before, setting(comparison))
    found = measure_training(comparison)
    options = json.loads(json.dumps(asdict(config)))  # as they are read back
    return {**found, "baseline": changes(before, {**found, "options": options})}


def end_to_end_report(name: str, kind: type[Method], config: EndToEndConfig[Any]) -> Report:
    """End-to-end report, without its head."""
    make = partial(initial_method, kind, config)
    return measure_training(EndToEndComparison(name, workload(kind, config), make, config))


def crops_of(kind: type[Method], config: PretrainConfig[Any]) -> ViewSpec:
    """Crops of a method for its encoder; the encoder is built without weights."""
    with without_memory():
        encoder = Encoder(config.encoder, config.data.channels)
    return kind.view_spec(config.method, encoder)


def workload(kind: type[Method], config: Any) -> Workload:
    """Workload that all sides of a comparison share.

    Raises:
        UserError: peers are asked for, and an optimizer that they do not have.
    """
    if config.against != "none":
        check_adamw(config.optim)
    return workload_of(kind, config, config.batch_size, statistics(config.data))


def workload_of(
    kind: type[Method], config: PretrainConfig[Any], batch_size: int, known: Statistics
) -> Workload:
    """Workload of a method's options; ``known``: mean and standard deviation of each channel."""
    device = resolve_device(config.run.device)
    return Workload(
        encoder=config.encoder,
        channels=config.data.channels,
        method=config.method,
        optim=config.optim,
        spec=crops_of(kind, config),
        batch_size=batch_size,
        seed=config.run.seed,
        statistics=known,
        device=device,
        precision=resolve_precision(config.run.precision, device),
    )


def check_adamw(optim: OptimConfig) -> None:
    """Check that peers can train as ours does.

    Raises:
        UserError: with an optimizer that they do not have.
    """
    check(
        optim.name == "adamw",
        f"--optim.name is {optim.name!r}, and peers (--against) train by AdamW; give adamw",
    )


def statistics(data: DataConfig) -> Statistics:
    """Mean and standard deviation of each channel; not estimated, as no speed depends on them."""
    if data.mean:
        return data.mean, data.std
    if data.channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * data.channels, (0.5,) * data.channels


def show(tables: Callable[[Report], Iterator[TableOf]], report: Report) -> None:
    """Print the tables of a report."""
    for table in tables(report):
        show_table(table.title, table.rows, header=table.header)


class Benchmark(NamedTuple):
    """Benchmark: the function that measures, and the one that prints the report.

    ``report`` takes the method's name, its class and the options.
    """

    report: Callable[[str, type[Method], Any], Report]
    show: Callable[[Report], None]


_BENCHMARKS = {
    "step": Benchmark(step_report, partial(show, step_tables)),
    "loader": Benchmark(loader_report, partial(show, loader_tables)),
    "end-to-end": Benchmark(end_to_end_report, partial(show, end_to_end_tables)),
    "scale": Benchmark(scale_report, show_scale),
}


def measure(what: str, name: str, config: Any) -> None:
    """Measure a method by a benchmark, print the report, and write it where ``out`` says."""
    benchmark = _BENCHMARKS[what]
    found = benchmark.report(name, find_method(name), config)
    report = {"benchmark": what, "method": name, **found, "options": asdict(config)}
    deliver(report, benchmark.show, config.out)


def deliver(report: Report, show: Callable[[Report], None], file: str) -> None:
    """Print a report, and write it to a file, if one is named."""
    show(report)
    if file:
        out = Path(file).expanduser()
        write_text_atomically(out, json.dumps(report, indent=1) + "\n")
        print(f"report: {out}")
