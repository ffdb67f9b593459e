"""Training session: a task, its images, its run folder, and the hooks of the training loop."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_vit.common.config import RunConfig
from ssl_vit.common.distributed import gather_texts
from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.layers import as_written, to_yaml
from ssl_vit.common.presets import about_preset
from ssl_vit.common.schedules import Length
from ssl_vit.common.task import Task
from ssl_vit.common.waiting import chosen
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.base import describe_labels, epoch_length, too_few
from ssl_vit.data.description import described
from ssl_vit.data.images import Images
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import left_out
from ssl_vit.data.shard_order import order_of
from ssl_vit.model.encoder import parameter_count
from ssl_vit.model.execution import (
    checkpoint_activations,
    choose_attention,
    compile_blocks,
    nothing_compiled,
)
from ssl_vit.training.checkpoint import Checkpoints, clean
from ssl_vit.training.energy import Energy
from ssl_vit.training.loop import Hook, Trainer
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.optim import Schedule, encoder_rates, optimizer_parts
from ssl_vit.training.parallel import Parallel, loader_workers, resolve_precision, start_parallel
from ssl_vit.training.prefetch import on_device
from ssl_vit.training.resume import check_same, load_into, move_aside, starting_point
from ssl_vit.training.run_files import CONFIG_FILE
from ssl_vit.training.run_lock import RunLock, is_lock
from ssl_vit.training.shared_cores import SHARED


class Session:
    """Session: a run set up, with nothing written yet. Subclasses define its outputs.

    Args:
        name: of this kind of run: a method, or ``finetune``.
        config: its options: a dataclass with the groups ``run``, ``data`` and ``optim``.
        task: with its initial weights. It is moved to the run's device.
        views: the crops of an image that the task takes.
        images: the training images.

    Attributes:
        lock: on the run folder, in the main process, while the run is carried out.

    Raises:
        UserError: a batch size that the images or the processes do not allow, or a device that
            does not exist.
    """

    lock: RunLock | None = None

    def __init__(self, name: str, config: Any, task: Task, views: ViewSpec, images: Images) -> None:
        self.name, self.config, self.out = name, config, Path(config.run.out)
        self.task, self.views, self.images = task, views, images
        run = config.run
        self.parallel = start_parallel(run.device, run.parallel, run.timeout)
        optim, n = config.optim, epoch_length(images.train)
        rank, world, device = self.parallel.rank, self.parallel.world, self.parallel.device
        check(
            optim.batch_size % (world * optim.accumulate) == 0,
            f"--optim.batch-size is {optim.batch_size}; it must be divisible by "
            f"{world} processes x {optim.accumulate} parts",
        )
        check(
            optim.batch_size <= n,
            f"--optim.batch-size is {optim.batch_size}; {images.train.spec} has {n} images"
            + " in an epoch" * (n != len(images.train)),
        )
        shared = optim.batch_size, run.seed, optim.accumulate, rank, world
        self.order = order_of(images.train, config.data.shard_window, *shared)
        schedule = Schedule(run, optim, self.order.steps_per_epoch, task.peak_in_warmup)
        precision = resolve_precision(run.precision, device)
        prepare_task(task, run, self.parallel)
        normalize = Normalize(images.mean, images.std, bounded=not images.deep).to(device)
        self.trainer = Trainer(task, run, optim, schedule, normalize, self.parallel, precision)

    def training_images(self) -> TrainImages:
        """Training images as workers make batches of them."""
        images, config = self.images, self.config
        shared = config.data.channels, config.run.seed, images.cache
        return TrainImages(images.train, self.views, *shared)

    def export(self, whole: Task) -> Callable[[], object]:
        """Copy the weights to export; returns a function that writes the file.

        ``whole``: the task with all its weights, also where ``self.task`` is sharded.
        """
        raise NotImplementedError

    def exported_step(self) -> int | None:
        """Step of the exported file; None where there is none."""
        raise NotImplementedError

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Probe the model on held-out images and log the results. Nothing is selected by them."""
        raise NotImplementedError

    def looks_at_once(self, due: bool) -> bool:
        """True if a probe is made before the first step. ``due``: one is due after the steps
        done."""
        return False

    def options(self) -> dict[str, Any]:
        """All options by name, ``group.option``, as in ``config.yaml``."""
        return as_written(self.config)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint that a resumed run must find again, JSON-serialisable:
        ``Images.fingerprint``, and ``weights``, by option, where it begins with some."""
        return self.images.fingerprint

    def guard(self) -> None:
        """Check, before something is written, that the run folder is still this run's.

        Raises:
            LockLost: it is not.
        """
        if self.lock:
            self.lock.check()

    @property
    def part_size(self) -> int:
        """Images per forward pass of each process."""
        return self.order.batch_size // (self.parallel.world * self.config.optim.accumulate)

    def plan(self, about: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Plan: table rows shown before the first step, with every derived number resolved.

        ``about``: rows on what is trained.
        """
        trainer, optim, order = self.trainer, self.config.optim, self.order
        schedule, device = trainer.schedule, self.parallel.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        waits = f", which sleep while they wait: {SHARED}" if chosen() == "sleep" else ""
        rate = f"{optim.peak_lr:.4g}"
        rate += "" if optim.lr is not None else f" = {optim.scaled(optim.base_lr)[1]}"
        warmup = f"{schedule.warmup} steps"
        if schedule.shortened:
            warmup += f" (half the run; --optim.warmup asks for {schedule.shortened})"
        held_out = f"{len(self.images.val):,} held out"
        if not self.images.held_out:
            few = too_few(self.images.train) if self.config.data.holdout else ""
            held_out = f"none held out: {few}; give --data.val" if few else "none held out"
        if self.images.choice is not None:
            held_out += f", {len(self.images.choice):,} more to choose the best encoder by"
        processes = f"{self.parallel.world} {'sharded ' * self.parallel.sharded}processes"
        split = f"{processes} x {optim.accumulate} parts x {self.part_size}"
        epochs = f"{schedule.total / order.steps_per_epoch:g} epochs x {order.steps_per_epoch}"
        return [
            ("device", f"{name}, {torch.get_num_threads()} threads{waits}"),
            ("precision", str(trainer.precision).removeprefix("torch.")),
            *about,
            ("images", f"{len(self.images.train):,} train, {held_out}"),
            *self.images.about(),
            ("labels", describe_labels(self.images.train)),
            ("views", self.describe_views()),
            ("preset", f"{about_preset(self.config)}: {described(self.views.last)}"),
            *order.about(),
            ("effective batch", f"{optim.batch_size} = {split}"),
            ("learning rate", rate),
            ("steps", f"{schedule.total:,} = {epochs}"),
            ("warm-up", warmup),
            *encoder_rates(schedule, optim),
            *optimizer_parts(trainer.optimizer),
        ]

    def describe_views(self) -> str:
        """Views in a line: crops per image; operations left out for its channels or bit depth."""
        missing: dict[str, None] = {}
        deep, channels = self.images.deep, self.config.data.channels
        for crop in self.views.crops:
            if crop.photometric:
                names = left_out(crop.photometric, channels, bounded=not deep)
                missing |= dict.fromkeys(names)
            if crop.levels and crop.levels.drop and channels == 1:
                missing["dropping channels"] = None
            if crop.policy and (deep or channels not in (1, 3)):
                missing["RandAugment"] = None
        per_epoch = self.order.steps_per_epoch
        text = "".join(
            f"{sizes(phase.spec)} up to step {phase.until.steps(per_epoch):,}, then "
            for phase in self.views.phases
        )
        text += sizes(self.views)
        if missing:
            depth = "more than 8 bits" if deep else "8 bits"
            text += f"; for images of {channels} channels and {depth} left out: "
            text += ", ".join(missing)
        elif self.images.survey.missing and any(crop.policy for crop in self.views.crops):
            text += "; RandAugment is left out of images with missing pixels"
        return text


def sizes(spec: ViewSpec) -> str:
    """Crops of an image by their sizes, as ``2 of 224x224 px + 8 of 96x96 px``."""
    counts: dict[str, int] = {}
    for crop in spec.crops:
        size = "x".join(map(str, crop.size))
        counts[size] = counts.get(size, 0) + crop.count
    return " + ".join(f"{n} of {size} px" for size, n in counts.items())


def prepare_task(task: Task, run: RunConfig, parallel: Parallel) -> None:
    """Prepare a task before sharding: device, attention, activation checkpointing, compilation."""
    choose_attention(task, parallel.device)
    task.to(parallel.device)
    if run.activation_checkpointing:
        checkpoint_activations(task)
    if run.compile:
        compile_blocks(task, in_parts=parallel.sharded)


def prepare_folder(session: Session) -> None:
    """Start or resume: set the trainer to its first step, and write the run folder to match."""
    run, out, trainer = session.config.run, session.out, session.trainer
    # One process checks for all: network disks may show a new folder late on other machines.
    start = Path(found) if (found := gather_texts(str(starting_point(run, out) or ""))[0]) else None
    if start is not None:
        check_same(session.config, out, start, session.fingerprint)
        load_into(trainer, start)
    statistics = zlib.crc32(str(session.fingerprint).encode())
    session.parallel.check_agreement("the step to start from", trainer.step)
    session.parallel.check_agreement("the training set (a hash of it)", statistics)
    if session.parallel.main:
        if run.resume == "never" and out.exists() and not all(map(is_lock, out.iterdir())):
            move = partial(move_aside, out)
            session.lock.follow(move) if session.lock else move()
        out.mkdir(parents=True, exist_ok=True)
        clean(out / "checkpoints")
        # Resuming with this file must not start anew again.
        resume = "auto" if run.resume == "never" else run.resume
        text = to_yaml(replace(session.config, run=replace(run, resume=resume)))
        write_text_atomically(out / CONFIG_FILE, text)
    # After the synchronization above. A run killed between checkpoint and export has an exported
    # file of another step.
    late = session.parallel.main and bool(trainer.step) and session.exported_step() != trainer.step
    if session.parallel.any(late):
        whole = trainer.whole(torch.device("cpu"))
        if session.parallel.main:
            session.export(whole)()


def train(session: Session) -> int:
    """Run the training loop with its hooks; returns 0, or the signal that stopped it."""
    run, trainer, out, task = session.config.run, session.trainer, session.out, session.task
    data, order, per_epoch = session.config.data, session.order, session.order.steps_per_epoch
    images = session.training_images()
    main, device = session.parallel.main, session.parallel.device
    workers, pin = loader_workers(data.workers, device), device.type == "cuda"
    loaded = train_batches(images, order, trainer.step, trainer.schedule.total, workers, pin)
    # Accumulated parts are drawn together; then the device holds one at a time.
    batches = on_device(loaded, device) if order.accumulate == 1 else loaded
    saving = every(run.save_every, "--run.save-every", per_epoch)
    probing = every(run.probe_every, "--run.probe-every", per_epoch)
    for_good = every(run.keep_every, "--run.keep-every", per_epoch) if run.keep_every else 0
    due = trainer.step > 0 and trainer.step % probing == 0
    at_once = session.parallel.any(main and session.looks_at_once(due))
    folder, guard = out / "checkpoints", session.guard
    checkpoints = Checkpoints(folder, run.keep, for_good, session.parallel, guard)
    with RunLog(
        out,
        start=trainer.step,
        total=trainer.schedule.total,
        every=run.log_every,
        images_per_step=order.batch_size,
        main=main,
        energy=Energy(device),
        shown=task.progress,
        guard=guard,
    ) as runlog:

        def save(step: int) -> None:
            checkpoints.finish()  # before more is copied
            whole = trainer.whole(torch.device("cpu"))
            write = session.export(whole) if main else None
            about, scalars = session.fingerprint, trainer.guard.state
            checkpoints.save(step, task, trainer.optimizer, about, write, scalars)

        def probe(step: int) -> Callable[[], object] | None:
            checkpoints.finish()  # else completed only after the probe, which may take long
            whole = trainer.whole()
            return partial(_probe, session, whole.eval(), step, runlog) if main else None

        hooks = [
            Hook("saving_s", saving, save, when_stopped=True),
            Hook("looking_s", probing, probe, at_once=at_once),
        ]
        bad = BadImages(session.images.train, data.max_bad)
        return trainer.train(batches, bad, runlog, hooks, checkpoints)


def _probe(session: Session, whole: Task, step: int, log: RunLog) -> None:
    """Probe with its own sizes of images and of batches, for which nothing is compiled."""
    with nothing_compiled(session.config.run.compile):
        session.probe(whole, step, log)


def every(text: str, option: str, steps_per_epoch: int) -> int:
    """Interval in steps, at least one."""
    return max(1, Length.parse(text, option).steps(steps_per_epoch))


def counted(module: nn.Module) -> str:
    """Parameter count of a module in millions, as text."""
    return f"{parameter_count(module) / 1e6:.2f} M"
