"""Pretrain an encoder: ``python -m ssl_vit.pretrain mae [--config FILE] [--group.option VALUE ...]``."""

from __future__ import annotations

import logging
import re
import shlex
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ssl_vit.cli import find_recipe, layered, recipes, run_door, show_table, split_config
from ssl_vit.config import (
    DataConfig,
    EncoderConfig,
    Length,
    OptimConfig,
    RunConfig,
    UserError,
    check,
    to_yaml,
)
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Normalize
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.loader import BadImages, TrainImages, estimate_statistics, train_batches
from ssl_vit.data.order import Order
from ssl_vit.data.sources import Source, open_source, split_holdout
from ssl_vit.encoder import choose_attention, parameter_count
from ssl_vit.evaluators.features import View, pixels, pooled, ready
from ssl_vit.evaluators.watch import Watch, bounded, write_table
from ssl_vit.files import write_atomically
from ssl_vit.methods.base import Method, find_method, method_names
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.loop import Hook, Trainer
from ssl_vit.training.metrics import RunLog, duration
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, loader_workers, resolve_precision, start_parallel
from ssl_vit.training.resume import (
    CONFIG_FILE,
    check_same_run,
    load_into,
    move_aside,
    starting_point,
)
from ssl_vit.weights.exchange import ENCODER_FILE, EncoderInfo, random_like, read_info, save_encoder

log = logging.getLogger("ssl_vit")
M = TypeVar("M")
_PROG = "python -m ssl_vit.pretrain"
_ABOUT = """Pretrain a Vision Transformer. --config FILE reads options from a YAML file, or a recipe
by its name in configs/; options on the command line win. Without --config and --data.train, the
method's recipe for the handwritten digits inside scikit-learn is used."""


@dataclass(frozen=True)
class PretrainConfig(Generic[M]):
    """All options of a pretraining run."""

    method: M
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def read_config(argv: list[str]) -> tuple[str, type[Method], PretrainConfig[Any]]:
    """The method's name and class, and the options: defaults < method < YAML < command line."""
    names = method_names()
    if not argv or argv[0].startswith("-"):
        raise UserError(f"usage: {_PROG} METHOD [options]; METHOD is one of {', '.join(names)}")
    name, (configs, flags) = argv[0], split_config(argv[1:])
    method = find_method(name)
    given = any(f.split("=")[0] == "--data.train" for f in flags)
    if not configs and not given and f"{name}_digits" in recipes():
        configs = [f"{name}_digits"]
        if "--help" not in flags and "-h" not in flags:
            log.info("no --config and no --data.train: using the recipe %s", configs[0])
    groups = {"run": RunConfig, "data": DataConfig, "encoder": EncoderConfig, "optim": OptimConfig}
    shared = {g: kind(**method.defaults.get(g, {})) for g, kind in groups.items()}
    default = PretrainConfig(method=method.Config(), **shared)
    kind = PretrainConfig[method.Config]  # type: ignore[name-defined]
    files = [find_recipe(c) for c in configs]
    config = layered(default, files, flags, f"{_PROG} {name}", _ABOUT, kind)
    if not config.run.out:
        out = f"runs/{name}-{slug(config.data.train)}"
        config = replace(config, run=replace(config.run, out=out))
    return name, method, config


def slug(spec: str) -> str:
    """A short name for a data set, fit for a folder: its last part that has a letter."""
    parts = [re.sub(r"[^A-Za-z0-9]+", "-", p).strip("-") for p in re.split(r"[:/]", spec)]
    named = [p for p in parts if re.search("[A-Za-z]", p) and p not in ("train", "val", "test")]
    return named[-1] if named else "data"


@dataclass
class Images:
    """The images of a run: sources, and how a pixel becomes a number."""

    train: Source
    val: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_images(config: PretrainConfig[Any]) -> Images:
    """Open the sources, hold some out, look at an image's channels, and settle the statistics."""
    data = config.data
    train = open_source(data.train)
    if data.val:
        val = open_source(data.val)
    else:
        train, val = split_holdout(train, data.holdout, config.run.seed)
        val = val if len(val) else train
    check_channels(train, data.channels)
    mean, std = data.mean, data.std
    if not mean and data.channels == 3 and data.statistics == "default":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif not mean:
        mean, std = estimate_statistics(train, data.channels, config.run.seed)
    return Images(train, val, mean, std)


def check_channels(source: Source, channels: int) -> None:
    """The first image that can be read must have the channels asked for.

    Raises:
        UserError: it has others, or none of the first hundred can be read.
    """
    reason = ""
    for i in range(min(100, len(source))):
        try:
            decode(source.read(i)[0], channels)
            return
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
            labelled=images.train.classes is not None and images.val.classes is not None,
        )


def build(name: str, kind: type[Method], config: PretrainConfig[Any]) -> Session:
    """Put a run together; nothing is written yet.

    Raises:
        UserError: options that do not fit together, or images that are not there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = kind(config.method, config.encoder, config.data.channels)
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
    normalize = Normalize(images.mean, images.std).to(parallel.device)
    trainer = Trainer(method, config.run, optim, schedule, normalize, parallel, precision)
    return Session(name, config, Path(config.run.out), images, method, order, trainer, parallel)


def prepare_folder(session: Session) -> None:
    """Begin or resume: set the trainer to its first step and the folder to match."""
    run, out, trainer = session.config.run, session.out, session.trainer
    start = starting_point(run, out)
    if start is not None and start.parent == out / "checkpoints":
        check_same_run(session.config, out)
    if start is not None:
        load_into(trainer, start)
    if not session.parallel.main:
        return
    if run.resume == "never" and out.exists() and any(out.iterdir()):
        move_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    Checkpoints(out / "checkpoints", run.keep).clean()
    text = to_yaml(session.config)
    write_atomically(out / CONFIG_FILE, lambda path: path.write_text(text))
    file = out / ENCODER_FILE
    if trainer.step and (not file.is_file() or read_info(file).step != trainer.step):
        # Killed between a checkpoint and its encoder file, which then is of an earlier step.
        save_encoder(file, session.method.exported_encoder(), session.info())


def show_plan(session: Session) -> None:
    """The table before the first step: what will run, with every derived number resolved."""
    trainer, optim, order = session.trainer, session.config.optim, session.order
    encoder, schedule = session.method.exported_encoder(), session.trainer.schedule
    device, per_epoch = session.parallel.device, order.steps_per_epoch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = "x".join(map(str, encoder.image_size))
    rate = f"{optim.peak_lr:.4g}"
    rate += "" if optim.lr is not None else f" = {optim.base_lr:g} x {optim.batch_size} / 256"
    warmup = f"{schedule.warmup} steps"
    if schedule.shortened:
        warmup += f" (half the run; --optim.warmup asks for {schedule.shortened})"
    split = f"{session.parallel.world} processes x {optim.accumulate} parts x "
    split += str(optim.batch_size // (session.parallel.world * optim.accumulate))
    show_table(
        f"{session.name}: {session.out}",
        [
            ("device", f"{name}, {torch.get_num_threads()} threads"),
            ("precision", str(trainer.precision).removeprefix("torch.")),
            ("encoder", f"{encoder.config.arch}, {size} px, patch {encoder.patch_size}"),
            ("parameters", f"{counted(encoder)} encoder, {counted(session.method)} in all"),
            ("images", f"{order.n:,} train, {len(session.images.val):,} held out"),
            ("effective batch", f"{optim.batch_size} = {split}"),
            ("learning rate", rate),
            ("steps", f"{schedule.total:,} = {schedule.total / per_epoch:g} epochs x {per_epoch}"),
            ("warm-up", warmup),
        ],
    )


def counted(module: torch.nn.Module) -> str:
    """A module's weights in millions."""
    return f"{parameter_count(module) / 1e6:.2f} M"


def train(session: Session) -> bool:
    """Run the loop with its hooks; false when a signal stopped it."""
    run, trainer, out = session.config.run, session.trainer, session.out
    data, order, per_epoch = session.config.data, session.order, session.order.steps_per_epoch
    images = TrainImages(
        session.images.train,
        session.method.views(session.config.method, session.method.encoder.image_size),
        data.channels,
        run.seed,
    )
    workers = loader_workers(data.workers)
    pin = session.parallel.device.type == "cuda"
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
    ) as runlog:

        def save(step: int) -> None:
            if session.parallel.main:
                checkpoints.save(step, session.method, trainer.optimizer)
                save_encoder(out / ENCODER_FILE, session.method.exported_encoder(), session.info())

        def look(step: int) -> None:
            if session.parallel.main:
                session.method.eval()
                runlog.write(step, watch.look(session.method.exported_encoder()), "probe")
                for name, picture in watch.paint(session.method.panels, out).items():
                    runlog.picture(step, name, picture)

        hooks = [
            Hook(every(run.save_every, "--run.save-every", per_epoch), save),
            Hook(every(run.probe_every, "--run.probe-every", per_epoch), look),
        ]
        bad = BadImages(session.images.train, data.max_bad)
        return trainer.train(batches, bad, runlog, hooks)


def every(text: str, option: str, steps_per_epoch: int) -> int:
    """An interval in steps, at least one."""
    return max(1, Length.parse(text, option).steps(steps_per_epoch))


def show_results(session: Session) -> None:
    """The closing table: raw pixels, the random encoder and this one, by the same protocol."""
    watch, out = session.watch(), session.out
    encoder, command = session.method.exported_encoder(), f"{_PROG} {session.name}"
    config = shlex.quote(str(out / CONFIG_FILE))
    if watch.labelled:
        random = random_like(session.info(), session.config.run.seed)
        for module in (random, encoder):
            ready(module, session.parallel.device)
        entries = {"raw pixels": pixels, "random encoder": pooled(random)}
        table = watch.compare(entries | {f"{session.name} encoder": pooled(encoder)})
        rows = [
            (name, f"{row['knn'].top1:.1f}", f"{row['linear'].top1:.1f}")
            for name, row in table.items()
        ]
        k = next(iter(table.values()))["knn"].setting
        title = f"{len(watch.val):,} held-out images, accuracy in % ({len(watch.train):,} to learn from)"
        show_table(title, rows, header=("features", f"k-NN {k}", "linear"))
        about = {"step": session.trainer.step, "view": asdict(watch.view)}
        write_table(out / "results.json", table, about)
    print(f"encoder:  {out / ENCODER_FILE}")
    for picture in sorted(out.glob("*.png")):
        print(f"picture:  {picture}")
    data = session.config.data
    val = f" --data.val {shlex.quote(data.val)}" if data.val else ""
    print("next:")
    if data.val and watch.labelled:
        train_spec = shlex.quote(data.train)
        print(f"  python -m ssl_vit.evaluate linear --encoder {out} --data.train {train_spec}{val}")
    print(f"  tensorboard --logdir {out}")
    print(f"  {command} --data.train folder:PATH_TO_YOUR_IMAGES")
    log.debug("config: %s", config)


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    started = time.perf_counter()
    name, kind, config = read_config(argv)
    session = build(name, kind, config)
    prepare_folder(session)
    if session.parallel.main:
        show_plan(session)
    finished = session.trainer.step >= session.trainer.schedule.total or train(session)
    if not session.parallel.main:
        return 0
    if not finished:
        again = f"{_PROG} {name} --config {shlex.quote(str(session.out / CONFIG_FILE))}"
        log.info("stopped at step %d, saved; go on with: %s", session.trainer.step, again)
        return 130
    show_results(session)
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
