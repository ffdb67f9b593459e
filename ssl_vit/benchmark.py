"""The measuring door: ``python -m ssl_vit.benchmark loader|step dino|mae [--config RECIPE]``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ssl_vit.cli import find_recipe, layered, run_door, show_table, split_config, subcommand
from ssl_vit.config import DataConfig, check
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Normalize, ViewSpec
from ssl_vit.data.decode import decode
from ssl_vit.data.images import is_deep
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.sources import open_source
from ssl_vit.encoder import Encoder, parameter_count, without_memory
from ssl_vit.evaluators.measured import describe, machine_card, summary
from ssl_vit.evaluators.own_process import OwnProcess
from ssl_vit.evaluators.peers import OriginalChain
from ssl_vit.evaluators.speed import (
    lightly_step,
    our_step,
    random_batch,
    readable,
    time_loader,
    time_steps,
    trainer_midway,
)
from ssl_vit.evaluators.watch import bounded
from ssl_vit.files import write_text_atomically
from ssl_vit.methods.base import Method, find_method, method_names
from ssl_vit.session import PretrainConfig, default_options, initial_method
from ssl_vit.training.parallel import resolve_device, resolve_precision

M = TypeVar("M")
_PROG = "python -m ssl_vit.benchmark"


@dataclass(frozen=True)
class LoaderConfig(PretrainConfig[M]):
    """Images that one core of the workers prepares in a second, for a method's crops."""

    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins."""
    images: int = 256
    """At most this many images of --data (short for --data.train), a seeded choice."""
    batch_size: int = 0
    """Images prepared at once. 0: --optim.batch-size. At most all images."""
    repeats: int = 3
    """Passes over the images, each with other crops."""
    against: Literal["none", "original"] = "none"
    """original: in turn with ours, the whole chain of the reference in PIL and torchvision."""
    out: str = ""
    """JSON file for the report. Empty: none."""

    def __post_init__(self) -> None:
        check(self.images >= 1, f"--images is {self.images}; at least 1")
        check(self.batch_size >= 0, f"--batch-size is {self.batch_size}; 0 or more")
        check(self.repeats >= 1, f"--repeats is {self.repeats}; at least 1")
        check_out(self.out)


@dataclass(frozen=True)
class StepConfig(PretrainConfig[M]):
    """Images that a whole training step takes in a second: zero_grad, forward, backward, clipping,
    AdamW, the teacher's move; on noise in the sizes of a method's crops."""

    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins."""
    batch_size: int = 8
    """Images of one step; of noise, without photometric operations, which loader measures."""
    repeats: int = 5
    """Steps that are measured."""
    warm_up: int = 3
    """Steps before them that are not."""
    against: Literal["none", "lightly", "lightly-grouped"] = "none"
    """lightly: in turn with ours, DINO in the same sizes made of lightly's modules, one view after
    another, as its example does. lightly-grouped: views of one size together, as its ImageNet
    benchmark does."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32 or auto, as in pretraining; of both sides."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    out: str = ""
    """JSON file for the report. Empty: none."""

    def __post_init__(self) -> None:
        for option, least in (("batch_size", 1), ("repeats", 1), ("warm_up", 0)):
            value = getattr(self, option)
            check(value >= least, f"--{option.replace('_', '-')} is {value}; at least {least}")
        check_out(self.out)


_BENCHMARKS: dict[str, Any] = {"loader": LoaderConfig, "step": StepConfig}


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
    # --data SOURCE, as images have but one role here.
    flags = [
        "--data.train" + f.removeprefix("--data") if f.split("=")[0] == "--data" else f
        for f in flags
    ]
    method, options = find_method(name), _BENCHMARKS[what]
    default = default_options(options, method, data={"train": ""})
    files = [find_recipe(c) for c in configs]
    about, prog = options.__doc__ or "", f"{_PROG} {what} {name}"
    config = layered(default, files, flags, prog, about, options[method.Config])
    return what, name, method, config


def crops_of(kind: type[Method], config: PretrainConfig[Any]) -> ViewSpec:
    """The crops of a method for its encoder, of which only the sizes are made."""
    with without_memory():
        encoder = Encoder(config.encoder, config.data.channels)
    return kind.views(config.method, encoder)


def statistics(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Some mean and deviation of each channel; none is estimated, as no speed depends on them."""
    if data.mean:
        return data.mean, data.std
    if data.channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * data.channels, (0.5,) * data.channels


def loader_report(kind: type[Method], config: LoaderConfig[Any]) -> dict[str, Any]:
    """Measure the loader; the report without its head."""
    data = config.data
    check(bool(data.train), "--data is missing; it names images, as folder:PATH")
    spec = crops_of(kind, config)
    source = open_source(data.train)
    deep = is_deep(source, data.channels)
    original = None
    opens: list[Callable[[Any], object]] = [lambda raw: decode(raw, data.channels)]
    if config.against == "original":
        check(not deep, f"--against original reads 8-bit images; those of {data.train} are deeper")
        original = OriginalChain(spec, data.channels, *statistics(data))
        opens.append(original.open)
    seed = config.run.seed
    chosen, bad = readable(bounded(source, config.images, seed), opens)
    size = min(config.batch_size or config.optim.batch_size, len(chosen))
    images = TrainImages(chosen, spec, data.channels, seed)
    normalize = Normalize(*statistics(data), bounded=not deep)
    speeds = time_loader(images, normalize, original, size, config.repeats)
    results = {
        "workers": speeds.workers,
        "device half on CPU": speeds.device,
        "workers + device half": speeds.both,
    }
    ratios = {}
    if speeds.original:
        results["original"] = speeds.original
        for name in ("workers", "workers + device half"):
            ratios[f"{name} / original"] = results[name].rate / speeds.original.rate
    sizes = {"source": data.train, "images": len(chosen), "unreadable": bad, "batch_size": size}
    head = machine_card(torch.device("cpu"), threads=1)
    return {**head, "sizes": sizes | {"crops": describe(spec)}, **summary(results, ratios)}


def step_report(name: str, kind: type[Method], config: StepConfig[Any]) -> dict[str, Any]:
    """Measure the step; the report without its head."""
    peer, channels = config.against, config.data.channels
    check(
        peer == "none" or name == "dino",
        f"--against {peer} is for dino; for {name} there is nothing to compare with yet",
    )
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    normalize, method = Normalize(*statistics(config.data)), initial_method(kind, config)
    trainer = trainer_midway(method, config.run, config.optim, normalize, device, precision)
    spec = crops_of(kind, config)
    batch = random_batch(spec, config.batch_size, channels, config.run.seed)
    steps: dict[str, Callable[[], Any]] = {"ours": our_step(trainer, batch)}
    parameters = {"ours": parameter_count(trainer.task)}
    if peer != "none":
        grouped, mean_std = peer == "lightly-grouped", statistics(config.data)
        shared = (config.encoder, channels, config.method, config.optim, device, precision, grouped)
        theirs = OwnProcess(lightly_step, shared, spec, batch, mean_std)
        steps[peer], parameters[peer] = theirs, theirs.facts
    speeds, losses = time_steps(steps, device, config.batch_size, config.warm_up, config.repeats)
    ratios = {f"ours / {n}": speeds["ours"].rate / s.rate for n, s in speeds.items() if n != "ours"}
    sizes = {"batch_size": config.batch_size, "parameters": parameters, "crops": describe(spec)}
    return {
        **machine_card(device, torch.get_num_threads()),
        "precision": str(precision).removeprefix("torch."),
        "sizes": sizes,
        "last_loss": losses,
        **summary(speeds, ratios),
    }


def show_report(report: dict[str, Any]) -> None:
    """The table: medians with the least and most of the repeats, and ratios."""
    machine, sizes = report["hardware"], report["sizes"]
    crops = " + ".join(f"{c['count']} of {'x'.join(map(str, c['size']))}" for c in sizes["crops"])
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    batch = f"batches of {sizes['batch_size']}"
    title = f"{report['benchmark']} {report['method']}: {crops} px, {batch}\n"
    title += f"{report.get('precision', 'uint8 to float32')}, {where}"
    rows = []
    for name, found in report["results"].items():
        rates = found["images_per_second_of_repeats"]
        span = f"{min(rates):.2f} to {max(rates):.2f}"
        rows.append((name, f"{found['images_per_second']:.2f}", span))
    rows += [(name, f"{ratio:.2f} x", "") for name, ratio in report["ratios"].items()]
    show_table(title, rows, header=("", "images/s", f"{len(rates)} repeats"))


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    what, name, kind, config = read_options(argv)
    # What peers draw; ours does not depend on it.
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    report = loader_report(kind, config) if what == "loader" else step_report(name, kind, config)
    report = {"benchmark": what, "method": name, **report, "options": asdict(config)}
    show_report(report)
    if config.out:
        out = Path(config.out).expanduser()
        write_text_atomically(out, json.dumps(report, indent=1) + "\n")
        print(f"report: {out}")
    return 0


if __name__ == "__main__":
    run_door(main)
