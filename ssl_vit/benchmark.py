"""The measuring door: ``python -m ssl_vit.benchmark step|loader|end-to-end|scale dino|mae``."""

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

from ssl_vit.benchmarks.end_to_end import measure_feeding
from ssl_vit.benchmarks.loader import measure_loader
from ssl_vit.benchmarks.side import Work
from ssl_vit.benchmarks.speed_tables import TableOf, end_to_end_tables, loader_tables, step_tables
from ssl_vit.benchmarks.step import measure_steps
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
from ssl_vit.common.config import DataConfig, check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from ssl_vit.methods.base import Method, find_method, method_names
from ssl_vit.model.encoder import Encoder, without_memory
from ssl_vit.training.parallel import resolve_device, resolve_precision

M = TypeVar("M")
Report = dict[str, Any]
_PROG = "python -m ssl_vit.benchmark"
# Options that have but one role here, by a shorter name.
_SHORT = {"--data": "--data.train", "--device": "--run.device", "--precision": "--run.precision"}
_LEAST = {"batch_size": 1, "repeats": 1, "warm_up": 0, "images": 1, "steps": 1}


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
            value = getattr(self, option, None)
            flag = f"--{option.replace('_', '-')}"
            check(value is None or value >= least, f"{flag} is {value}; at least {least}")


@dataclass(frozen=True)
class LoaderConfig(_Shared[M]):
    """Images that one core of the workers prepares in a second, for a method's crops. Of --run seed
    matters alone, of --optim batch-size; --data is short for --data.train."""

    images: int = 256
    """At most this many images of --data, a seeded choice."""
    batch_size: int | None = None
    """Images prepared at once. None: --optim.batch-size. At most all images."""
    repeats: int = 3
    """Passes over the images, each with other crops."""
    against: str = "none"
    """In turn with ours, one or more, separated by commas: original (the whole chain of the
    reference in PIL and torchvision), lightly (of dino; its transform, in PIL too)."""


@dataclass(frozen=True)
class StepConfig(_Shared[M]):
    """Images that a whole training step takes in a second: zero_grad, forward, backward, clipping,
    AdamW, the teacher's move; on noise in the sizes of a method's crops. It counts operations,
    measures the best rate of matrix products in the step's own shapes, and memory. Of --run seed,
    device, precision (--device and --precision for short), compile and activation-checkpointing
    matter, of --data channels."""

    batch_size: int = 8
    """Images of one step; of noise, without photometric operations, which loader measures."""
    repeats: int = 5
    """Steps that are measured, and as many again for the parts of a step."""
    warm_up: int = 3
    """Steps before them that are not."""
    against: str = "none"
    """In turn with ours, one or more, separated by commas, in the same sizes and precision, each in
    a process of its own. mae: original (the reference's modules, built anew), huggingface
    (ViTMAEForPreTraining), huggingface-fp32 (its default), lightly. dino: original, lightly (one
    view after another, as its example does), lightly-grouped (views of one size together, as its
    ImageNet benchmark does)."""


@dataclass(frozen=True)
class EndToEndConfig(_Shared[M]):
    """Images a second of training on real images: loader, transfer, device half and step. Of --run
    seed, device, precision (--device and --precision for short), compile and
    activation-checkpointing matter, of --data train (--data for short), channels and workers."""

    images: int = 256
    """At most this many images of --data, a seeded choice, taken again and again."""
    batch_size: int = 8
    """Images of one step."""
    steps: int = 10
    """Steps in a row that are timed together."""
    repeats: int = 3
    """How many times they are."""
    warm_up: int = 1
    """Steps before each of them that are not counted; those that use up what was prepared while the
    other side was measured come on top."""
    against: str = "none"
    """original: in turn with ours, the reference's step fed by its whole chain in PIL, in as many
    workers."""


def loader_report(name: str, kind: type[Method], config: LoaderConfig[Any]) -> Report:
    """Measure the loader; the report without its head."""
    # What peers draw; ours does not depend on it.
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    return measure_loader(config, crops_of(kind, config), statistics(config.data), name)


def step_report(name: str, kind: type[Method], config: StepConfig[Any]) -> Report:
    """Measure the step; the report without its head."""
    return measure_steps(name, work_of(kind, config), partial(initial_method, kind, config), config)


def end_to_end_report(name: str, kind: type[Method], config: EndToEndConfig[Any]) -> Report:
    """Measure loader and step together; the report without its head."""
    work, make = work_of(kind, config), partial(initial_method, kind, config)
    return measure_feeding(name, work, make, config)


def crops_of(kind: type[Method], config: PretrainConfig[Any]) -> ViewSpec:
    """The crops of a method for its encoder, of which only the sizes are made."""
    with without_memory():
        encoder = Encoder(config.encoder, config.data.channels)
    return kind.view_spec(config.method, encoder)


def work_of(kind: type[Method], config: Any) -> Work:
    """What every side of a comparison does alike."""
    device = resolve_device(config.run.device)
    return Work(
        encoder=config.encoder,
        channels=config.data.channels,
        method=config.method,
        optim=config.optim,
        spec=crops_of(kind, config),
        batch_size=config.batch_size,
        seed=config.run.seed,
        statistics=statistics(config.data),
        device=device,
        precision=resolve_precision(config.run.precision, device),
    )


def statistics(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Some mean and deviation of each channel; none is estimated, as no speed depends on them."""
    if data.mean:
        return data.mean, data.std
    if data.channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * data.channels, (0.5,) * data.channels


def show(tables: Callable[[Report], Iterator[TableOf]], report: Report) -> None:
    """Print a report's tables."""
    for table in tables(report):
        show_table(table.title, table.rows, header=table.header)


class Benchmark(NamedTuple):
    """One thing that can be measured.

    ``report``: takes the method's name, its class and the options; ``show`` prints the report.
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
    """Refuse a report's path that cannot be written, before anything is measured."""
    path = Path(out).expanduser()
    check(
        not out or (path.suffix == ".json" and not path.is_dir()),
        f"--out is {out!r}; the report is a JSON file, its name must end in .json",
    )
    check(path.parent.is_dir(), f"--out is {out!r}; there is no folder {str(path.parent)!r}")


def read_options(argv: Sequence[str]) -> tuple[str, str, type[Method], Any]:
    """What is measured, of which method, and the options: method < YAML < command line."""
    what = subcommand(argv, _PROG, "benchmark", list(_BENCHMARKS))
    name = subcommand(argv[1:], f"{_PROG} {what}", "method", method_names())
    configs, flags = split_config(argv[2:])
    for i, flag in enumerate(flags):
        option, equals, value = flag.partition("=")
        flags[i] = _SHORT.get(option, option) + equals + value
    method, options = find_method(name), _BENCHMARKS[what].options
    default = default_options(options, method, data={"train": ""})
    files = [find_recipe(c) for c in configs]
    about, prog = options.__doc__ or "", f"{_PROG} {what} {name}"
    config = layered(default, files, flags, prog, about, options[method.Config])
    return what, name, method, config


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    what, name, kind, config = read_options(argv)
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
