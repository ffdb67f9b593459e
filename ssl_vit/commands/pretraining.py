"""Pretraining run: a method training its encoder, and its setup from options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ssl_vit.commands.beginning import Looks, with_choice
from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.common.checks import flag
from ssl_vit.common.errors import check
from ssl_vit.common.task import Task
from ssl_vit.data.base import Source, known_labels
from ssl_vit.data.description import far_from_black
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.view import View
from ssl_vit.evaluators.watch import Watch, bounded, labelled_only, why_no_knn
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import Session, counted
from ssl_vit.weights.exchange import EncoderInfo, encoder_writer, read_info, sha256
from ssl_vit.weights.official import weights_info
from ssl_vit.weights.own_files import BEST_FILE, ENCODER_FILE


class Pretraining(Session):
    """Pretraining run: a method training its encoder, which is exported and monitored."""

    task: Method

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the images and of the files of ``--init.encoder`` and the method's
        encoders."""
        names = {"init.encoder": self.config.init.encoder}
        method = self.config.method
        names |= {
            f"{method.prefix}.{option}": getattr(method, option) for option in self.task.encoders
        }
        paths = {option: weights_info(name)[1] for option, name in names.items() if name}
        weights = {option: sha256(path) for option, path in paths.items() if path}
        return {**self.images.fingerprint, "weights": weights}

    def info(self) -> EncoderInfo:
        """Metadata of the encoder file, now."""
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
        """Snapshot of the encoder; the returned function writes its file."""
        assert isinstance(whole, Method)
        return encoder_writer(self.out / ENCODER_FILE, whole.exported_encoder(), self.info())

    def exported_step(self) -> int | None:
        """Step of the encoder file; None: there is no file."""
        file = self.out / ENCODER_FILE
        return read_info(file).step if file.is_file() else None

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training: health, k-NN, pictures and the feature projection."""
        assert isinstance(whole, Method)
        watch, encoder = self.watch, whole.exported_encoder()
        given, news = bool(self.config.init.encoder), ""
        look = watch.look(encoder, select=given)
        numbers, held_out = look.numbers, look.held_out
        if given:
            numbers = numbers | self.looks.add(step, look)
            news = self.looks.news()
            self._keep_best(step, encoder)
        log.write(step, numbers, "probe")
        if news:
            log.warn(step, news)
        for name, picture in watch.paint(whole.panels, encoder, held_out).items():
            log.picture(step, name, picture)
        log.projection(step, *watch.projection(held_out))

    @functools.cached_property
    def looks(self) -> Looks:
        """Looks at an encoder that began with given weights, up to the present step."""
        return Looks.read(self.out, self.trainer.step)

    def looks_at_once(self, due: bool) -> bool:
        """True at given weights before they are trained; and where a kill came before the probe
        did."""
        step = self.trainer.step
        late = due and self.watch.labelled and not self.looks.has(step)
        return bool(self.config.init.encoder) and (step == 0 or late)

    def _keep_best(self, step: int, encoder: Encoder) -> None:
        """Write the encoder if it is the best so far; before its row, which says that it is."""
        best = self.looks.best
        if best is not None and best["step"] == step:
            self.guard()
            encoder_writer(self.out / BEST_FILE, encoder, self.info())()

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the encoder."""
        encoder = self.task.exported_encoder()
        size = "x".join(map(str, encoder.image_size))
        rows = [
            ("encoder", f"{encoder.config.arch}, {size} px, patch {encoder.patch_size}"),
            ("parameters", f"{counted(encoder)} encoder, {counted(self.task)} in all"),
        ]
        given, near = bool(self.config.init.encoder), self.config.init.keep_near
        rows += [("kept near the start", f"x {near:g}")] if near else []
        if self.task.adapters is not None:
            said = f"rank {self.config.init.lora}, {counted(self.task.adapters)}, in its place"
            rows += [("trained of the encoder", said)]
        reason = self.why_no_knn() if given or known_labels(self.images.train).any() else ""
        unseen = ", so that nothing shows whether the given weights get worse" if given else ""
        if given and not reason:
            why = f": {self.images.no_choice}" if self.images.no_choice else ""
            rows.append(("best encoder", f"chosen by {self.chosen_by}{why}"))
        said = f"not measured while training: {reason}{unseen}"
        return rows + ([("k-NN", said)] if reason else [])

    @property
    def chosen_by(self) -> str:
        """Selection criterion of the best encoder, in words."""
        if self.choice is None:
            return "leave-one-out k-NN of training images"
        return f"k-NN of {len(self.choice):,} images held out for this alone"

    def untrained_encoder(self) -> Encoder:
        """Encoder with its weights before the first step."""
        kind = type(self.trainer.blank)  # the type of a sharded task is changed by FSDP
        assert issubclass(kind, Method)
        return initial_method(kind, self.config).exported_encoder()

    def why_no_knn(self) -> str:
        """Reason why no k-NN is measured while training; empty if it is."""
        if not self.images.held_out:  # each image would be its own nearest neighbour
            return "no image is held out"
        return why_no_knn(*self.watched)

    @functools.cached_property
    def watched(self) -> tuple[Source, Source]:
        """Training images, with a label if any have, and held-out ones, to probe the encoder on."""
        count, seed = self.config.run.probe_images, self.config.run.seed
        train = bounded(labelled_only(self.images.train), count, seed)
        return train, bounded(self.images.val, count, seed)

    @functools.cached_property
    def choice(self) -> Source | None:
        """Images that the best encoder is chosen by, those with a label; None: training images."""
        images, run = self.images.choice, self.config.run
        if images is None:
            return None
        return bounded(labelled_only(images), run.probe_images, run.seed)

    @functools.cached_property
    def watch(self) -> Watch:
        """Monitor of the encoder, on bounded numbers of training and held-out images."""
        run, images = self.config.run, self.images
        encoder = self.task.exported_encoder()
        view = View(encoder.image_size, encoder.channels, images.mean, images.std)
        return Watch(
            train=self.watched[0],
            val=self.watched[1],
            view=view,
            device=self.parallel.device,
            precision=self.trainer.precision,
            workers=self.config.data.workers,
            seed=run.seed,
            labelled=not self.why_no_knn(),
            choice=self.choice,
            pooling=self.task.pooling,
        )


def build(name: str, config: PretrainConfig[Any]) -> Pretraining:
    """Pretraining run built from its options; nothing is written yet.

    Raises:
        UserError: options contradict each other, or images do not exist.
    """
    method, given = initial_method(find_method(name), config), None
    if config.init.encoder:
        info = weights_info(config.init.encoder, config.encoder.image_size)[0]
        given = Given(f"--init.encoder {config.init.encoder}", info.mean, info.std)
    images: Images = open_images(config.data, config.run.seed, given)
    if config.init.encoder:
        images = with_choice(images, config.data, config.optim.batch_size, config.run.seed)
    method.set_statistics(images.mean, images.std)
    views = method.view_spec(config.method, method.encoder)
    images.warnings += tuple(far_from_black(views.last, images.mean, images.std))
    made = Pretraining(name, config, method, views, images)
    check(
        not (config.init.lora and made.parallel.sharded),
        f"{flag(config.init, 'lora')} is {config.init.lora}; adapters are not sharded: give "
        "--run.parallel ddp",
    )
    return made
