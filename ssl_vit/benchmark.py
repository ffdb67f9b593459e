"""Benchmark command: ``python -m ssl_vit.benchmark step|loader|end-to-end|scale METHOD``,
``quality`` or ``device``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tyro.conf import Fixed, Suppress

from ssl_vit.benchmarks.comparison import measure_training
from ssl_vit.benchmarks.end_to_end import EndToEndComparison
from ssl_vit.benchmarks.loader import measure_loader
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.speed_tables import TableOf, end_to_end_tables, loader_tables, step_tables
from ssl_vit.benchmarks.step import StepComparison
from ssl_vit.commands import device, quality
from ssl_vit.commands.cli import (
    find_recipe,
    layered,
    run_door,
    show_table,
    split_config,
    subcommand,
)
from ssl_vit.commands.pretraining import PretrainConfig, default_options, initial_method
from ssl_vit.commands.scale import ScaleConfig, scale_report, show_scale
from ssl_vit.common.checks import check_least
from ssl_vit.common.config import DataConfig
from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from ssl_vit.methods.base import Method, find_method, method_names
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import resolve_device, resolve_precision

M = TypeVar("M")
Report = dict[str, Any]
_PROG = "python -m ssl_vit.benchmark"
_LEAST = {"batch_size": 1, "repeats": 1, "warm_up": 0, "count": 1, "steps": 1}


@dataclass(frozen=True)
class _Shared(PretrainConfig[M]):
    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins."""
    dry_run: Suppress[Fixed[bool]] = False
    against: str = "none"
    out: str = ""
    """JSON file for the report. Empty: none."""

    def __post_init__(self) -> None:
        for option, least in _LEAST.items():
            if hasattr(self, option):
                check_least(self, least, option)


@dataclass(frozen=True)
class LoaderConfig(_Shared[M]):
    """Loader benchmark: images per second that one core prepares, for a method's crops. Used are
    --data.train, --encoder, --method, --run.seed and --optim.batch-size; and --data.cache, measured
    beside the loader without it."""

    count: int = 256
    """At most this many images of --data.train, a seeded choice."""
    batch_size: int | None = None
    """Images prepared at once. None: --optim.batch-size. At most all images."""
    repeats: int = 3
    """Passes over the images, each with other crops."""
    against: str = "none"
    """Peers, measured in turn with ours; one or more, separated by commas: original (the reference
    implementation's whole chain in PIL and torchvision), lightly (its transform, in PIL too). One
    that a method does not have is refused with those it has."""


@dataclass(frozen=True)
class StepConfig(_Shared[M]):
    """Step benchmark: images per second of a whole training step (zero_grad, forward, backward,
    clipping, AdamW, teacher update), on noise in the sizes of a method's crops; with its FLOPs, its
    memory, and the best rate of matrix products of its own shapes. Used are --encoder, --method,
    --optim, --data.channels and, of --run, seed, device, precision, compile and
    activation-checkpointing."""

    batch_size: int = 8
    """Images of one step: noise, without photometric operations, which loader measures."""
    repeats: int = 5
    """Timed steps, and as many again for the breakdown of a step."""
    warm_up: int = 3
    """Untimed steps before them."""
    against: str = "none"
    """Peers, measured in turn with ours in the same sizes and precision, each in its own process;
    one or more, separated by commas: original (the reference's modules, written from the paper),
    huggingface, huggingface-fp32 (its default), lightly (as in its example), lightly-grouped (views
    of one size together, as in its ImageNet benchmark). A name that a method does not have is
    refused with those it has."""


@dataclass(frozen=True)
class EndToEndConfig(_Shared[M]):
    """End-to-end benchmark: images per second of training on real images, with loader, transfer,
    device half and step. Used are --encoder, --method, --optim, --data.train, --data.channels,
    --data.workers and, of --run, seed, device, precision, compile and activation-checkpointing."""

    count: int = 256
    """At most this many images of --data.train, a seeded choice, used again and again."""
    batch_size: int = 8
    """Images of one step."""
    steps: int = 10
    """Consecutive steps of one repeat."""
    repeats: int = 3
    """Timed repeats."""
    warm_up: int = 1
    """Untimed steps before each repeat, in addition to those that use up the batches prepared while
    the other side was measured."""
    against: str = "none"
    """Peer, measured in turn with ours: original (the reference implementation's step and its whole
    chain in PIL, with as many workers)."""


def loader_report(name: str, kind: type[Method], config: LoaderConfig[Any]) -> Report:
    """Loader report, without its head."""
    # For the random numbers of peers; ours do not depend on it.
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    return measure_loader(config, crops_of(kind, config), statistics(config.data), name)


def step_report(name: str, kind: type[Method], config: StepConfig[Any]) -> Report:
    """Step report, without its head."""
    make = partial(initial_method, kind, config)
    return measure_training(StepComparison(name, workload(kind, config), make, config))


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
    """Workload that all sides of a comparison share."""
    where = resolve_device(config.run.device)
    return Workload(
        encoder=config.encoder,
        channels=config.data.channels,
        method=config.method,
        optim=config.optim,
        spec=crops_of(kind, config),
        batch_size=config.batch_size,
        seed=config.run.seed,
        statistics=statistics(config.data),
        device=where,
        precision=resolve_precision(config.run.precision, where),
    )


def statistics(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
    """Benchmark: its options, the function that measures, and the one that prints the report.

    ``report`` takes the method's name, its class and the options.
    """

    options: Any
    report: Callable[[str, type[Method], Any], Report]
    show: Callable[[Report], None]


_BENCHMARKS = {
    "step": Benchmark(StepConfig, step_report, partial(show, step_tables)),
    "loader": Benchmark(LoaderConfig, loader_report, partial(show, loader_tables)),
    "end-to-end": Benchmark(EndToEndConfig, end_to_end_report, partial(show, end_to_end_tables)),
    "scale": Benchmark(ScaleConfig, scale_report, show_scale),
}


def check_out(out: str) -> None:
    """Check of the report's path, before anything is measured.

    Raises:
        UserError: no report can be written there.
    """
    path = Path(out).expanduser()
    check(
        not out or (path.suffix == ".json" and not path.is_dir()),
        f"--out is {out!r}; the report is a JSON file, its name must end in .json",
    )
    check(path.parent.is_dir(), f"--out is {out!r}; there is no folder {str(path.parent)!r}")


def parse_options(argv: Sequence[str]) -> tuple[str, str, type[Method], Any]:
    """Benchmark, method name and class, and the options: method < YAML < command line."""
    what = subcommand(argv, _PROG, "benchmark", [*_BENCHMARKS, "quality", "device"])
    name = subcommand(argv[1:], f"{_PROG} {what}", "method", method_names())
    configs, flags = split_config(argv[2:])
    method, options = find_method(name), _BENCHMARKS[what].options
    default = default_options(options, method, data={"train": ""})
    files = [find_recipe(c) for c in configs]
    about, prog = options.__doc__ or "", f"{_PROG} {what} {name}"
    config = layered(default, files, flags, prog, about, options[method.Config])
    return what, name, method, config


def main(argv: list[str]) -> int:
    """Benchmark command; returns the exit status."""
    if argv[:1] == ["quality"]:
        return quality.main(argv[1:])
    if argv[:1] == ["device"]:
        return device.main(argv[1:])
    what, name, kind, config = parse_options(argv)
    benchmark = _BENCHMARKS[what]
    check_out(config.out)
    found = benchmark.report(name, kind, config)
    report = {"benchmark": what, "method": name, **found, "options": asdict(config)}
    benchmark.show(report)
    if config.out:
        out = Path(config.out).expanduser()
        write_text_atomically(out, json.dumps(report, indent=1) + "\n")
        print(f"report: {out}")
    return 0


if __name__ == "__main__":
    run_door(main)
