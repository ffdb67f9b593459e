"""A pretraining run put together from its options: images, method, trainer, folder, hooks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ssl_vit.config import (
    DataConfig,
    EncoderConfig,
    Length,
    OptimConfig,
    RunConfig,
    UserError,
    check,
)
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Normalize, ViewSpec
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.loader import BadImages, TrainImages, estimate_statistics, train_batches
from ssl_vit.data.order import Order
from ssl_vit.data.sources import Source, check_classes, open_source, split_holdout
from ssl_vit.encoder import Encoder, choose_attention, compile_blocks
from ssl_vit.evaluators.features import View
from ssl_vit.evaluators.watch import Watch, bounded
from ssl_vit.files import write_text_atomically
from ssl_vit.methods.base import Method
from ssl_vit.options import to_yaml
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.loop import Hook, Trainer
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, loader_workers, resolve_precision, start_parallel
from ssl_vit.training.resume import (
    CONFIG_FILE,
    check_same_run,
    load_into,
    move_aside,
    starting_point,
)
from ssl_vit.weights.exchange import ENCODER_FILE, EncoderInfo, read_info, save_encoder

M = TypeVar("M")


@dataclass(frozen=True)
class PretrainConfig(Generic[M]):
    """All options of a pretraining run."""

    method: M
    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins. Without
    this and --data.train: the method's recipe for the digits inside scikit-learn."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def default_options(options: Any, method: type[Method], **groups: dict[str, Any]) -> Any:
    """``options`` (a ``PretrainConfig``) as a method has them, before YAML and command line.

    ``groups`` holds a door's own values of shared options; those of the method win.
    """
    kinds = {"run": RunConfig, "data": DataConfig, "encoder": EncoderConfig, "optim": OptimConfig}
    given = groups | method.defaults
    shared = {name: kind(**given.get(name, {})) for name, kind in kinds.items()}
    return options(method=method.Config(), **shared)


@dataclass
class Images:
    """The images of a run: sources, and how a pixel becomes a number."""

    train: Source
    val: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    deep: bool
    """More than 8 bits a channel, so in no fixed range."""

    @property
    def held_out(self) -> bool:
        """Whether ``val`` is apart from ``train``; where nothing is held out they are the same."""
        return self.val is not self.train

    def fingerprint(self) -> dict[str, Any]:
        """What tells a changed training set, as JSON gives it back."""
        return {"count": len(self.train), "mean": list(self.mean), "std": list(self.std)}


def open_images(config: PretrainConfig[Any]) -> Images:
    """Open the sources, hold some out, look at an image's channels, and settle the statistics."""
    data = config.data
    train = open_source(data.train)
    if data.val:
        val = open_source(data.val)
    else:
        rest, val = split_holdout(train, data.holdout, config.run.seed)
        train, val = (rest, val) if len(val) else (train, train)
    deep, _ = (is_deep(source, data.channels) for source in (train, val))
    check_classes(train, val)
    mean, std = data.mean, data.std
    if not mean and data.channels == 3 and data.statistics == "default":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif not mean:
        mean, std = estimate_statistics(train, data.channels, config.run.seed)
    return Images(train, val, mean, std, deep)


def is_deep(source: Source, channels: int) -> bool:
    """Whether the first image that can be read has more than 8 bits a channel.

    Raises:
        UserError: it has not the channels asked for, or none of the first hundred can be read.
    """
    reason = ""
    for i in range(min(100, len(source))):
        try:
            return decode(source.read(i)[0], channels).dtype != torch.uint8
        except BadImage as error:
            reason = reason or f"{source.name(i)}: {error}"
    raise UserError(f"no image of {source.spec} can be read, the first is {reason}")


@dataclass
class Session:
    """A run put together: what is trained, on what, and how it is watched."""

    name: str
    config: PretrainConfig[Any]
    out: Path
    images: Images
    method: Method
    order: Order
    trainer: Trainer
    parallel: Parallel

    def info(self) -> EncoderInfo:
        """What the encoder file says of itself, now."""
        encoder = self.method.exported_encoder()
        return EncoderInfo(
            config=encoder.config,
            channels=encoder.channels,
            mean=self.images.mean,
            std=self.images.std,
            method=self.name,
            step=self.trainer.step,
        )

    def views(self) -> ViewSpec:
        """The crops the method sees of an image."""
        return self.method.views(self.config.method, self.method.encoder)

    def untrained_encoder(self) -> Encoder:
        """The encoder as it was before the first step."""
        return initial_method(type(self.method), self.config).exported_encoder()

    def watch(self) -> Watch:
        """How the encoder is looked at: bounded numbers of training and held-out images."""
        run, images = self.config.run, self.images
        encoder = self.method.exported_encoder()
        view = View(encoder.image_size, encoder.channels, images.mean, images.std)
        return Watch(
            train=bounded(images.train, run.probe_images, run.seed),
            val=bounded(images.val, run.probe_images, run.seed),
            view=view,
            device=self.parallel.device,
            precision=self.trainer.precision,
            workers=self.config.data.workers,
            seed=run.seed,
            # Without held-out images each would find itself among its neighbours.
            labelled=images.held_out
            and images.train.labels is not None
            and images.val.labels is not None,
            pooling=self.method.pooling,
        )


def initial_method(kind: type[Method], config: PretrainConfig[Any]) -> Method:
    """The method with its first weights, a function of the options and the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return kind(config.method, config.encoder, config.data.channels)


def build(name: str, kind: type[Method], config: PretrainConfig[Any]) -> Session:
    """Put a run together; nothing is written yet.

    Raises:
        UserError: options that do not fit together, or images that are not there.
    """
    method = initial_method(kind, config)
    images = open_images(config)
    parallel = start_parallel(config.run.device)
    optim, n = config.optim, len(images.train)
    parts = parallel.world * optim.accumulate
    check(
        optim.batch_size % parts == 0,
        f"--optim.batch-size is {optim.batch_size}; it must be divisible by "
        f"{parallel.world} processes x {optim.accumulate} parts",
    )
    check(
        optim.batch_size <= n,
        f"--optim.batch-size is {optim.batch_size}; {images.train.spec} has {n} images",
    )
    order = Order(
        n, optim.batch_size, config.run.seed, optim.accumulate, parallel.rank, parallel.world
    )
    schedule = Schedule(config.run, optim, order.steps_per_epoch)
    precision = resolve_precision(config.run.precision, parallel.device)
    choose_attention(method, parallel.device)
    method.to(parallel.device)
    if config.run.compile:
        compile_blocks(method)
    normalize = Normalize(images.mean, images.std, bounded=not images.deep).to(parallel.device)
    trainer = Trainer(method, config.run, optim, schedule, normalize, parallel, precision)
    return Session(name, config, Path(config.run.out), images, method, order, trainer, parallel)


def prepare_folder(session: Session) -> None:
    """Begin or resume: set the trainer to its first step and the folder to match."""
    run, out, trainer = session.config.run, session.out, session.trainer
    start = starting_point(run, out)
    if start is not None:
        own = start.parent == out / "checkpoints"
        if own:
            check_same_run(session.config, out)
        load_into(trainer, start, session.images.fingerprint() if own else None)
    statistics = zlib.crc32(str(session.images.fingerprint()).encode())
    session.parallel.check_agreement("the step to start from", trainer.step)
    session.parallel.check_agreement("the training set (a hash of it)", statistics)
    if not session.parallel.main:
        return
    if run.resume == "never" and out.exists() and any(out.iterdir()):
        move_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    Checkpoints(out / "checkpoints", run.keep).clean()
    # Going on with this file must not start anew again.
    resume = "auto" if run.resume == "never" else run.resume
    text = to_yaml(replace(session.config, run=replace(run, resume=resume)))
    write_text_atomically(out / CONFIG_FILE, text)
    file = out / ENCODER_FILE
    if trainer.step and (not file.is_file() or read_info(file).step != trainer.step):
        # Killed between a checkpoint and its encoder file, which then is of an earlier step.
        save_encoder(file, session.method.exported_encoder(), session.info())


def train(session: Session) -> bool:
    """Run the loop with its hooks; false when a signal stopped it."""
    run, trainer, out = session.config.run, session.trainer, session.out
    data, order, per_epoch = session.config.data, session.order, session.order.steps_per_epoch
    images = TrainImages(
        session.images.train,
        session.views(),
        data.channels,
        run.seed,
    )
    device = session.parallel.device
    workers, pin = loader_workers(data.workers, device), device.type == "cuda"
    batches = train_batches(images, order, trainer.step, trainer.schedule.total, workers, pin)
    checkpoints = Checkpoints(out / "checkpoints", run.keep)
    watch = session.watch()
    with RunLog(
        out,
        start=trainer.step,
        total=trainer.schedule.total,
        every=run.log_every,
        images_per_step=order.batch_size,
        main=session.parallel.main,
        spoken=session.method.spoken,
    ) as runlog:

        def save(step: int) -> None:
            if session.parallel.main:
                images = session.images.fingerprint()
                checkpoints.save(step, session.method, trainer.optimizer, images)
                save_encoder(out / ENCODER_FILE, session.method.exported_encoder(), session.info())

        def look(step: int) -> None:
            if session.parallel.main:
                session.method.eval()
                runlog.write(step, watch.look(session.method.exported_encoder()), "probe")
                for name, picture in watch.paint(session.method.panels, out).items():
                    runlog.picture(step, name, picture)

        hooks = [
            Hook(every(run.save_every, "--run.save-every", per_epoch), save, when_stopped=True),
            Hook(every(run.probe_every, "--run.probe-every", per_epoch), look),
        ]
        bad = BadImages(session.images.train, data.max_bad)
        return trainer.train(batches, bad, runlog, hooks)


def every(text: str, option: str, steps_per_epoch: int) -> int:
    """An interval in steps, at least one."""
    return max(1, Length.parse(text, option).steps(steps_per_epoch))
