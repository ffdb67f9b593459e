"""What the doors that train share, and a pretraining run put together from its options."""

from __future__ import annotations

import functools
import logging
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from ssl_vit.commands.cli import GO_ON, show_table
from ssl_vit.common.config import DataConfig, EncoderConfig, InitConfig, OptimConfig, RunConfig
from ssl_vit.common.task import Task
from ssl_vit.data.images import Images, open_images
from ssl_vit.data.view import View
from ssl_vit.evaluators.watch import Watch, bounded
from ssl_vit.methods.base import Method
from ssl_vit.model.encoder import Encoder
from ssl_vit.records.status import by_signal, recorded
from ssl_vit.training.metrics import RunLog, duration, note_outcome
from ssl_vit.training.resume import CONFIG_FILE
from ssl_vit.training.session import Session, counted, prepare_folder, train
from ssl_vit.weights.exchange import (
    ENCODER_FILE,
    EncoderInfo,
    encoder_writer,
    read_info,
    resample_positions,
)
from ssl_vit.weights.official import open_weights, weights_info

log = logging.getLogger("ssl_vit")
M = TypeVar("M")
S = TypeVar("S", bound=Session)


def carry_out(
    session: S,
    about: list[tuple[str, str]],
    results: Callable[[S], dict[str, float]],
    command: str,
) -> int:
    """Begin or resume, say what will run, train, and show what came of it; the exit status.

    It is the same in every process: 0; stopped and saved, 130 by Ctrl-C and ``GO_ON`` by another
    signal.

    Args:
        about: rows of the plan on what is trained.
        results: the closing words, said by the main process; it returns the scores by name.
        command: the door, to which ``--config FILE`` is added to go on after a stop.
    """
    started = time.perf_counter()
    prepare_folder(session)
    if session.parallel.main:
        show_table(f"{session.name}: {session.out}", session.plan(about))
    with recorded(session, command) as note:
        stopped = train(session) if session.trainer.step < session.trainer.schedule.total else 0
        if stopped:
            note("stopped", by_signal(stopped))
            again = f"{command} --config {shlex.quote(str(session.out / CONFIG_FILE))}"
            log.info("stopped at step %d, saved; go on with: %s", session.trainer.step, again)
            return 130 if stopped == signal.SIGINT else GO_ON
        session.task = session.trainer.whole()
        if session.parallel.main:
            outcome = results(session)
            if note.writes:
                note_outcome(session.out, session.trainer.step, session.options(), outcome)
            note("finished")
            log.info("done in %s", duration(time.perf_counter() - started))
    session.parallel.any(False)  # all leave together: a launcher may end those that are left
    return 0


@dataclass(frozen=True)
class PretrainConfig(Generic[M]):
    """All options of a pretraining run."""

    method: M
    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins. Without
    this and --data.train: the method's recipe for the digits inside scikit-learn."""
    dry_run: bool = False
    """Build everything, take two steps, and say what the run needs: memory, time, what looks wrong.
    Nothing is written."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
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


class Pretraining(Session):
    """A method learning its encoder, which is exported and looked at."""

    task: Method

    def info(self) -> EncoderInfo:
        """What the encoder file says of itself, now."""
        encoder = self.task.exported_encoder()
        return EncoderInfo(
            config=encoder.config,
            channels=encoder.channels,
            mean=self.images.mean,
            std=self.images.std,
            method=self.name,
            step=self.trainer.step,
        )

    def export(self, whole: Task) -> Callable[[], object]:
        """Take the encoder as it is now; what is returned writes its file."""
        assert isinstance(whole, Method)
        return encoder_writer(self.out / ENCODER_FILE, whole.exported_encoder(), self.info())

    def exported_step(self) -> int | None:
        """The step of the encoder file."""
        file = self.out / ENCODER_FILE
        return read_info(file).step if file.is_file() else None

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Health, k-NN and pictures."""
        assert isinstance(whole, Method)
        watch, encoder = self.watch, whole.exported_encoder()
        numbers, held_out = watch.probe(encoder)
        log.write(step, numbers, "probe")
        for name, picture in watch.paint(whole.panels, encoder, held_out).items():
            log.picture(step, name, picture)
        log.projection(step, *watch.projection(held_out))

    def about(self) -> list[tuple[str, str]]:
        """Rows of the plan on the encoder."""
        encoder = self.task.exported_encoder()
        size = "x".join(map(str, encoder.image_size))
        return [
            ("encoder", f"{encoder.config.arch}, {size} px, patch {encoder.patch_size}"),
            ("parameters", f"{counted(encoder)} encoder, {counted(self.task)} in all"),
        ]

    def untrained_encoder(self) -> Encoder:
        """The encoder as it was before the first step."""
        kind = type(self.trainer.blank)  # that of a sharded task is FSDP's
        assert issubclass(kind, Method)
        return initial_method(kind, self.config).exported_encoder()

    @functools.cached_property
    def watch(self) -> Watch:
        """How the encoder is looked at: bounded numbers of training and held-out images."""
        run, images = self.config.run, self.images
        encoder = self.task.exported_encoder()
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
            pooling=self.task.pooling,
        )


def initial_method(kind: type[Method], config: PretrainConfig[Any]) -> Method:
    """The method with its first weights, a function of the options, the seed and ``init.encoder``.

    Raises:
        UserError: the weights to begin with cannot be had, or do not match.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = kind(config.method, config.encoder, config.data.channels)
    if config.init.encoder:
        given = open_weights(config.init.encoder)
        own = method.encoder
        state = resample_positions(given.encoder.vit.state_dict(), given.encoder, own)
        if own.config.positions == given.encoder.config.positions == "sincos":
            state = {**state, "pos_embed": own.vit.pos_embed}  # a formula, for any size
        method.begin_with(state, f"--init.encoder {config.init.encoder}")
        log.info("beginning with %s: %s, %s", given.path, given.format, given.report)
    return method


def with_weights(default: PretrainConfig[Any], name: str) -> PretrainConfig[Any]:
    """Options as an encoder to begin with has them: architecture, channels and statistics.

    Raises:
        UserError: no such encoder.
    """
    info = weights_info(name)[0]
    encoder = replace(info.config, drop_path=default.encoder.drop_path)
    data = replace(default.data, channels=info.channels, mean=info.mean, std=info.std)
    return replace(default, encoder=encoder, data=data)


def build(name: str, kind: type[Method], config: PretrainConfig[Any]) -> Pretraining:
    """Put a pretraining run together; nothing is written yet.

    Raises:
        UserError: options that do not fit together, or images that are not there.
    """
    method = initial_method(kind, config)
    images: Images = open_images(config.data, config.run.seed)
    views = method.view_spec(config.method, method.encoder)
    return Pretraining(name, config, method, views, images)
