"""Scale estimate: FLOPs and memory of pretraining by encoder and image size, and predicted time."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from ssl_vit.benchmarks.costs import count_step, largest_batch, sharded_state, state_of
from ssl_vit.benchmarks.measured import describe
from ssl_vit.commands.benchmark_options import ScaleConfig
from ssl_vit.commands.cli import layered, recipes, show_table
from ssl_vit.commands.pretrain_options import default_options
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.schedules import Length
from ssl_vit.methods import find_options
from ssl_vit.methods.base import Method
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder, parameter_count
from ssl_vit.training.muon import block_matrices, orthogonalizing

log = logging.getLogger("ssl_vit")
# The share of a device's memory that is given out; the rest is for temporary buffers.
_USED = 0.9


def _words(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


def scale_report(name: str, kind: type[Method], config: ScaleConfig[Any]) -> dict[str, Any]:
    """Scale report, without its head; it takes a minute or two.

    The rows of ``sizes`` and ``resolutions`` are those of the options, the rows of ``recipes`` the
    method's own recipes for ImageNet, each with its own length. ``hours`` are predictions.

    Raises:
        UserError: an encoder or image size that cannot be built.
    """
    own = config.encoder
    for option in ("width", "depth", "heads"):
        value = getattr(own, option)
        check(
            not value, f"--encoder.{option} is {value}; scale supports whole architectures: --archs"
        )
    sizes = [replace(config, encoder=replace(own, arch=arch)) for arch in config.archs]
    with without_memory():
        patch = Encoder(own, config.data.channels).patch_size
    sides = dict.fromkeys(side // patch * patch for side in config.image_sizes)
    check(0 not in sides, f"--image-sizes is {_words(config.image_sizes)}; a patch is {patch} wide")
    larger = [replace(config, encoder=replace(own, image_size=(side,))) for side in sides]
    found = {
        "sizes": [_row(kind, c, c.encoder.arch) for c in sizes],
        "resolutions": [_row(kind, c, own.arch) for c in larger],
        "recipes": [_row(kind, c, recipe) for recipe, c in _recipes(name, config)],
    }
    assumed = _assumed(config)
    assumed |= {"images": assumed.pop("count"), "memory_used": _USED}
    return {"assumed": assumed, **found}


def _assumed(config: ScaleConfig[Any]) -> dict[str, Any]:
    """Assumptions of the predictions: the options that describe devices and images."""
    return {k: getattr(config, k) for k in ("peak", "share", "memory", "count", "devices")}


def _recipes(name: str, config: ScaleConfig[Any]) -> list[tuple[str, ScaleConfig[Any]]]:
    """Recipes of the method for ImageNet, under the same assumptions."""
    own = find_options(name)
    default = default_options(ScaleConfig, own)
    assumed, read = _assumed(config), ScaleConfig[own.config]  # type: ignore[name-defined]
    return [
        (recipe, replace(layered(default, [file], [], "", "", read), **assumed))
        for recipe, file in recipes().items()
        if recipe.startswith(f"{name}_vit_")
    ]


def _row(kind: type[Method], config: ScaleConfig[Any], label: str) -> dict[str, Any]:
    """Row of one encoder and image size; ``hours`` by number of devices."""
    encoder = replace(config.encoder, drop_path=0.0)
    channels, devices = config.data.channels, config.devices
    muon = config.optim.name == "muon"
    row = {**_count(kind, config.method, encoder, channels, devices, config.memory, muon)}  # type: ignore[arg-type]
    span = Length.parse(config.run.length, "--run.length")
    seen = span.amount * (config.count if span.unit == "ep" else config.optim.batch_size)
    flops = seen * row["flop_per_image"]
    rate = config.peak * 1e12 * config.share
    steps = seen / config.optim.batch_size  # of which every device does all that the optimizer does
    optimizer = steps * row.pop("optimizer_flop")
    hours = {str(n): (flops / n + optimizer) / rate / 3600 for n in devices}
    return {"name": label, "length": config.run.length, **row, "flop_in_all": flops, "hours": hours}


@cache  # a recipe is often one of the sizes
def _count(
    kind: type[Method],
    method: Any,
    encoder: EncoderConfig,
    channels: int,
    devices: tuple[int, ...],
    memory: float,
    muon: bool,
) -> dict[str, Any]:
    """Row entries that do not depend on the length; in bytes, while ``memory`` is in GiB."""
    log.info("counting %s", encoder.arch)
    with without_memory():
        task = kind(method, encoder, channels)
    spec = kind.view_spec(method, task.encoder)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    muons = {p for p in block_matrices(task) if p.requires_grad} if muon else set()
    states = {"1": state_of(task, muons)}
    states |= {f"fsdp {n}": sharded_state(task, n, muons) for n in devices}
    optimizer = orthogonalizing(muons)
    room, cost = _USED * memory * 2**30, count_step(task, spec, channels)
    kept = {"kept": cost.kept, "recomputed": cost.recomputed}
    return {
        "crops": describe(spec),
        "parameters": {"trained": trained, "all": parameter_count(task)},
        "flop_per_image": cost.flops,
        "optimizer_flop": optimizer,
        "state": {n: asdict(s) | {"total": s.total} for n, s in states.items()},
        "activations": {how: asdict(k) for how, k in kept.items()},
        "largest_batch": {
            how: {n: largest_batch(room, s, k) for n, s in states.items()}
            for how, k in kept.items()
        },
    }


def show_scale(report: dict[str, Any]) -> None:
    """Print the tables: FLOPs and time by encoder, memory by encoder, by image size, of recipes."""
    assumed, sizes, larger = report["assumed"], report["sizes"], report["resolutions"]
    using = f"{assumed['share']:.0%} of {assumed['peak']:g} TFLOP/s a device"
    predicted = [f"hours on {n}" for n in assumed["devices"]]
    held = ("MiB/image", "recomputed", f"batch in {assumed['memory']:g} GiB", "recomputed")
    show_table(
        f"FLOPs, {_crops(sizes[0])} px; prediction for {sizes[0]['length']}: {using}",
        [(_short(r), *_weights(r), _work(r), *_hours(r)) for r in sizes],
        ("", "trained", "with fixed", "GFLOP/image", *predicted),
    )
    show_table(
        "memory of a process in bf16: state in GiB; activations; largest batch",
        [(_short(r), *_states(r), *_held(r)) for r in sizes],
        ("", "alone", *[f"FSDP {n}" for n in assumed["devices"]], *held),
    )
    if larger:
        show_table(
            f"{_short(larger[0])} by size of crops; recomputed: with activation checkpointing",
            [(_crops(r), _work(r), *_held(r)) for r in larger],
            ("", "GFLOP/image", *held),
        )
    if report["recipes"]:
        show_table(
            f"recipes for ImageNet; prediction: {using}",
            [(r["name"], r["length"], *_all_work(r), *_hours(r)) for r in report["recipes"]],
            ("", "length", "GFLOP/image", "total FLOP", *predicted),
        )


def _short(row: dict[str, Any]) -> str:
    return str(row["name"]).removeprefix("vit_").removesuffix("_224")


def _crops(row: dict[str, Any]) -> str:
    """Crops in short: ``2 x 224 + 8 x 96``, or ``1 x 224x192`` if they are not square."""
    counts = Counter[str]()
    for crop in row["crops"]:
        counts["x".join(map(str, dict.fromkeys(crop["size"])))] += crop["count"]
    return " + ".join(f"{count} x {size}" for size, count in counts.items())


def _weights(row: dict[str, Any]) -> list[str]:
    return [f"{count / 1e6:.1f} M" for count in row["parameters"].values()]


def _work(row: dict[str, Any]) -> str:
    return f"{row['flop_per_image'] / 1e9:,.1f}"


def _all_work(row: dict[str, Any]) -> tuple[str, str]:
    return _work(row), f"{row['flop_in_all']:.2g}"


def _hours(row: dict[str, Any]) -> list[str]:
    return [f"{h:,.0f}" if h >= 10 else f"{h:.2g}" for h in row["hours"].values()]


def _states(row: dict[str, Any]) -> list[str]:
    return [f"{state['total'] / 2**30:.2f}" for state in row["state"].values()]


def _held(row: dict[str, Any]) -> list[str]:
    """Cells on activations and the largest batch, of a single process."""
    kept = [f"{kept['per_image'] / 2**20:,.1f}" for kept in row["activations"].values()]
    return [*kept, *(f"{batch['1']:,}" for batch in row["largest_batch"].values())]
