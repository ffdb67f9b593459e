"""Preflight: needs, duration and problems of a pretraining run, before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from statistics import median

import torch

from ssl_vit.benchmarks.trial import Found, Throughput, try_out
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.common.config import OptimConfig
from ssl_vit.common.duration import duration
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.evaluators.watch import bounded
from ssl_vit.objectives.base import Setting
from ssl_vit.training.parallel import loader_workers, own_cores
from ssl_vit.training.resume import check_same, starting_point
from ssl_vit.training.shared_cores import SharedCores

# Enlarged more than this, in height and width, an image fills its crop with interpolated pixels.
_ENLARGED = 2.0
# A rate this far below the rule is mostly a base rate given as the rate itself. One this far above
# it may do for small batches, if it is not above those of the largest ones too.
_TOO_LOW, _TOO_HIGH, _HIGHEST = 1 / 10, 8.0, 3e-3


def preflight(session: Pretraining) -> int:
    """Preflight: try the run out, show needs and problems found; returns the exit status.

    Nothing is written. All processes must call it.

    Raises:
        UserError: what the run itself would refuse.
        RunFailed: not even a few images fit into memory.
    """
    done, begins = where_it_begins(session)
    cores = SharedCores(session.parallel.device)
    cores.look()
    found = try_out(session)
    cores.look(least=0.0)
    if session.parallel.main:
        title = f"{session.name}, dry run: nothing is written to {session.out}"
        show_table(title, [*session.plan(session.about()), ("begins", begins)])
        show_table("what it takes", [*needs(session, found, done), *on_cores(cores)])
        show_table("memory of a process", list(memory_rows(session, found)))
        for line in [*advice(session, found), *on_waits(cores)] or ["no problems found"]:
            print(line)
    return 0


def where_it_begins(session: Pretraining) -> tuple[int, str]:
    """Start of the run: the number of steps done before, and its description."""
    start = starting_point(session.config.run, session.out)
    if start is None:
        return 0, "anew"
    check_same(session.config, session.out, start, session.fingerprint)
    named = re.fullmatch(r"step-(\d+)", start.name)
    if named is None:
        return 0, f"from {start}"
    return int(named[1]), f"after step {int(named[1]):,}, from {start}"


def needs(session: Pretraining, found: Found, done: int) -> list[tuple[str, str]]:
    """Rows on operations, rates and time."""
    schedule, batch = session.trainer.schedule, session.order.batch_size
    whole = found.flops * batch * schedule.total
    cost = f"{found.flops / 1e9:.3g} GFLOP an image (forward and backward), {whole:.2g} in all"
    throughput = found.throughput
    if throughput is None:
        return [("compute", cost), ("speed", "not measured: a step does not fit into memory")]
    left = max(0, schedule.total - done)
    workers = loader_workers(session.config.data.workers, session.parallel.device)
    processes = f"{workers} workers for each of {session.parallel.world} processes"
    steps = f"{rate(throughput.step)}, {throughput.step * found.flops / 1e12:.3g} TFLOP/s"
    time = (
        f"{long_duration(left * batch / throughput.run)} for {left:,} steps; checkpoints and probes"
    )
    return [
        ("compute", cost),
        ("loader", f"{rate(throughput.loader)}, {processes}, nothing trained meanwhile"),
        ("step", f"{steps}, no image waited for"),
        ("bound by", f"{throughput.bound}: {rate(throughput.run)}"),
        ("time to finish", f"{time} come on top"),
    ]


def on_cores(cores: SharedCores) -> Iterator[tuple[str, str]]:
    """A row on cores that others had meanwhile."""
    if cores.shared:
        yield "shared", f"other work had {cores.described}: all this is the speed beside it"


def on_waits(cores: SharedCores) -> Iterator[str]:
    """The problem of waits that spin on such cores."""
    if cores.shared and cores.spinning:
        yield (
            f"warning: other work has {cores.described}, and threads that wait for others spin, "
            "which may slow a run several times: begin it while that work runs, and waits are "
            "chosen for it, or set OMP_WAIT_POLICY=PASSIVE"
        )


def memory_rows(session: Pretraining, found: Found) -> Iterator[tuple[str, str]]:
    """Rows on the memory of the process that needs most."""
    memory, run = found.memory, session.config.run
    above = ", and one block's more" if run.activation_checkpointing else ""
    above += ", not compiled" if run.compile else ""
    yield "weights", size(memory.weights)
    yield "gradients", size(memory.gradients)
    yield "optimizer's moments", size(memory.moments)
    yield "activations", f"{size(memory.activations)} for {session.part_size} images at once{above}"
    yield "sum", f"{size(memory.total)}; temporary buffers come on top"
    if found.peak:
        yield "measured peak", size(found.peak)
    if math.isfinite(found.available):
        yield "available", size(found.available)


def rate(images: float) -> str:
    """Images per second for people."""
    return f"{images:,.0f} images/s" if images >= 10 else f"{images:.2g} images/s"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def long_duration(seconds: float) -> str:
    """Seconds as 2 d 1:02:03, 1:02:03 or 2:03."""
    days, rest = divmod(float(round(seconds)), 86400.0)
    return f"{days:.0f} d {duration(rest)}" if days else duration(rest)


def advice(session: Pretraining, found: Found) -> list[str]:
    """Advice: problems found, with remedies, one line each."""
    optim, memory = session.config.optim, found.memory
    setting = Setting(
        images=session.order.n,
        batch_size=optim.batch_size,
        parts=optim.accumulate,
        lacking=max(0.0, memory.total - found.available),
        per_crop=found.per_crop,
    )
    lines = [
        *session.images.warnings,
        *_on_memory(session, found),
        *session.task.advice(setting),
        *_on_rate(session),
        *_on_length(session),
        *_on_images(session),
        *(_on_throughput(session, found.throughput) if found.throughput else []),
    ]
    if not found.finite:
        lines.append("a loss or gradient was not finite: look at the images, or lower --optim.lr")
    return [f"warning: {line}" for line in lines]


def _on_memory(session: Pretraining, found: Found) -> Iterator[str]:
    need, room = found.memory, found.available
    parts, images = session.config.optim.accumulate, session.part_size
    images *= parts
    fitting = [
        m
        for m in range(1, images + 1)
        if images % m == 0 and need.state + found.per_image * images / m <= 0.9 * room
    ]
    if not found.fits:
        more = [f"--optim.accumulate {m}" for m in fitting if m > parts][:1]
        remedy = more or ["more processes with --run.parallel fsdp"]
        yield (
            f"a step does not fit: it takes over {size(need.total)} of {size(room)}; remedies: "
            f"{remedy[0]}, or --run.activation-checkpointing"
        )
    elif session.parallel.device.type == "cuda" and fitting and fitting[0] < parts:
        yield (
            f"--optim.accumulate is {parts}, and {fitting[0]} should fit: the same step in fewer "
            "and larger parts, which a GPU computes faster"
        )


def _on_rate(session: Pretraining) -> Iterator[str]:
    optim = session.config.optim
    usual = session.task.defaults.get("optim", {}).get("base_lr", OptimConfig.base_lr)
    if optim.lr is not None and optim.base_lr != usual:
        yield f"--optim.base-lr {optim.base_lr:g} has no effect beside --optim.lr {optim.lr:g}"
    rule, how = optim.scaled(usual)
    text = f"the peak learning rate is {optim.peak_lr:.3g}; the rule for {session.name} is "
    text += f"{how} = {rule:.3g}"
    if optim.peak_lr < _TOO_LOW * rule and not session.config.init.encoder:
        base = 1024 if optim.lr_rule == "sqrt" else 256
        yield f"{text}. --optim.lr is the rate itself, --optim.base-lr that of {base} images"
    if optim.peak_lr > max(_TOO_HIGH * rule, _HIGHEST):
        yield f"{text}, and no batch is trained well at such a rate: lower it"


def _on_length(session: Pretraining) -> Iterator[str]:
    schedule = session.trainer.schedule
    if schedule.shortened:
        yield (
            f"--optim.warmup asks for {schedule.shortened:,} steps of {schedule.total:,}; it is "
            f"cut to {schedule.warmup:,}, half the run: give a shorter one or a longer --run.length"
        )


def _on_images(session: Pretraining) -> Iterator[str]:
    """Crops that are larger than the images they are cut from."""
    config, data, shapes = session.config, session.config.data, []
    sample = bounded(session.images.train, 16, config.run.seed)
    for i in range(len(sample)):
        try:
            image = decode(sample.read(i)[0], data.channels, data)
            shapes.append(tuple(image.shape[1:]))
        except BadImage:
            continue
    height, width = max((crop.size for crop in session.views.crops), key=math.prod)
    enlarged = median([math.sqrt(height * width / math.prod(s)) for s in shapes] or [0.0])
    if enlarged > _ENLARGED:
        shape = sorted(shapes, key=math.prod)[len(shapes) // 2]
        yield (
            f"images (of {len(shapes)}, half are up to {shape[0]}x{shape[1]} px) are enlarged at "
            f"least {enlarged:.1f} times to crops of {height}x{width}: a smaller "
            "--encoder.image-size and --encoder.patch-size give as much and cost less"
        )


def _on_throughput(session: Pretraining, throughput: Throughput) -> Iterator[str]:
    device = session.parallel.device
    workers = loader_workers(session.config.data.workers, device)
    if not workers and throughput.run < 0.9 * throughput.step:
        yield (
            f"--data.workers is 0, so that a step waits for its images: {rate(throughput.run)} of "
            f"{rate(throughput.step)}; give --data.workers 1 or more"
        )
    if throughput.bound != "the loader" or throughput.loader > 0.9 * throughput.step:
        return
    text = f"the loader gives {rate(throughput.loader)}, and a step takes {rate(throughput.step)}"
    wanted = math.ceil(workers * throughput.step / throughput.loader)
    on_cpu = device.type == "cpu"
    # The cores that the step itself leaves; a loader slow for want of them cannot be helped.
    spare = own_cores() - torch.get_num_threads() * on_cpu
    if workers < spare:
        yield f"{text}: give --data.workers {min(wanted, spare)}"
    elif not on_cpu:
        yield f"{text}, on all {workers} cores: more cores, or images stored smaller, would help"
