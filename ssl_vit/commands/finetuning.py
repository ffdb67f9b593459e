"""Fine-tuning command: ``python -m ssl_vit.evaluate finetune --encoder RUN --data.train ...``."""

from __future__ import annotations

import functools
import hashlib
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ssl_vit.commands import dense_tuning as dense
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.evaluating import with_labels
from ssl_vit.commands.finetune_options import PROG, first_options, read_options
from ssl_vit.commands.pretraining import carry_out
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.task import Task
from ssl_vit.data.base import Numbered, Source
from ssl_vit.data.groups import group_count
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.classifier import (
    MODEL_FILE,
    Classifier,
    classifier,
    classifier_writer,
    saved_step,
)
from ssl_vit.evaluators.features import FeatureSet, Machine, extract, ready
from ssl_vit.evaluators.finetune import FineTune, tuning_views
from ssl_vit.evaluators.online import source_targets
from ssl_vit.evaluators.options import FinetuneConfig, dense_recipe, recipe
from ssl_vit.evaluators.protocol import protocol_card, split_card, write_card
from ssl_vit.evaluators.scores import Prediction, accuracy, check_labels, score_predictions
from ssl_vit.evaluators.selection import guesses_of, outputs_of, quality
from ssl_vit.evaluators.start import Start, for_channels, open_start
from ssl_vit.evaluators.watch import bounded
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import Session, counted
from ssl_vit.weights.exchange import EncoderInfo, sha256

CARD_FILE = dense.CARD_FILE


def parse_options(argv: list[str]) -> tuple[FinetuneConfig, Start]:
    """Options (defaults < the encoder's recipe < YAML < command line), and the opened encoder.

    Raises:
        UserError: a mistake in the options, or the encoder cannot be opened.
    """
    first = first_options(argv)  # the default recipe depends on the encoder
    scratch, size = first.encoder == "none", first.tune.image_size
    try:
        start = open_start(first.encoder, first.scratch, first.data.channels, first.run.seed, size)
    except UserError as error:
        message = str(error).replace("--size is", "--tune.image-size is")
        message = message.replace("--encoder.", "--scratch.") if scratch else message
        raise UserError(message) from None
    if first.dense:
        config = read_options(argv, dense_recipe(start.depth, start.channels))
        dense.check_options(config)
    else:
        config = read_options(argv, recipe(start.pretrained, start.depth, start.channels))
    data = config.data
    if start.pretrained or data.channels != start.channels:
        start = for_channels(start, data.channels, config.tune.channels)
    if not data.mean and data.statistics == "default":
        config = replace(config, data=replace(data, mean=start.mean, std=start.std))
    if not config.run.out:
        out = str(start.default_folder("finetune", data.train))
        config = replace(config, run=replace(config.run, out=out))
    return config, start


def count_classes(images: Images) -> int:
    """Number of classes of the training images, or of labels where an image may have several.

    Raises:
        UserError: there is only one class, or the validation set has a class that the training set
            lacks.
    """
    train, val = (labels_of(source) for source in (images.train, images.val))
    names = max(images.train.classes or (), images.val.classes or (), key=len)
    check_labels(train, val, names)
    return outputs_of(train.labels)


def labels_of(source: Source) -> FeatureSet:
    """Labels of all images, without reading an image."""
    return FeatureSet({}, source_targets(source), 0, torch.arange(len(source)))


def labelled_images(config: FinetuneConfig, given: Given | None) -> Images:
    """Images of a run, those with a label.

    ``given``: the encoder that training begins with.

    Raises:
        UserError: there are none, or none is held out.
    """
    images = open_images(config.data, config.run.seed, given)
    few = f": of {groups} groups" if (groups := group_count(images.train)) else ""
    check(images.held_out, f"--data.val is missing, and --data.holdout holds no image out{few}")
    train = with_labels(images.train, "--data.train")
    val = with_labels(images.val, "--data.val" if config.data.val else "held out of")
    return replace(images, train=train if train.targets is None else Numbered(train), val=val)


class Finetuning(Session):
    """Fine-tuning run: a classifier trained from an encoder's weights, or from scratch."""

    task: FineTune

    def __init__(self, config: FinetuneConfig, start: Start) -> None:
        own = Given(f"--encoder {config.encoder}", start.mean, start.std)
        images = labelled_images(config, None if config.encoder == "none" else own)
        self.classes, self.start = count_classes(images), start
        tune, seed = config.tune, config.run.seed
        size, drop_path = tune.image_size, tune.drop_path
        self.made: Classifier = classifier(start, self.classes, tune.pooling, size, drop_path, seed)
        several = images.train.targets
        targets = None if several is None else torch.from_numpy(several)
        task = FineTune(self.made.network, tune, self.classes, targets)
        views = tuning_views(tune, self.made.size, images.mean)
        super().__init__("finetune", config, task, views, images)
        check(
            not tune.mixes or self.part_size % 2 == 0,
            f"--optim.batch-size is {config.optim.batch_size}, in parts of {self.part_size}; mixup "
            "and cutmix need an even number",
        )
        channels = config.data.channels
        self.view = View(self.made.size, channels, images.mean, images.std)
        precision, workers = self.trainer.precision, config.data.workers
        self.machine = Machine(self.parallel.device, precision, workers)

    def about_model(self) -> dict[str, Any]:
        """Metadata of the model file, besides timm's arguments."""
        names, images = self.images.train.classes, self.images
        return {
            "mean": images.mean,
            "std": images.std,
            "size": self.made.size,
            "crop_ratio": self.view.crop_ratio,
            "classes": None if names is None else names[: self.classes],
            "encoder": self.start.identity,
            "step": self.trainer.step,
        }

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """That of the images and their labels, and the encoder."""
        digest = hashlib.sha256()
        for source in (self.images.train, self.images.val):
            digest.update(repr(source.classes).encode())
            digest.update(b"none" if source.labels is None else source.labels.tobytes())
        return {
            **self.images.fingerprint,
            "labels": digest.hexdigest(),
            "weights": self.start.weights,
        }

    def export(self, whole: Task) -> Callable[[], object]:
        """Snapshot of the evaluated network; the returned function writes its file."""
        assert isinstance(whole, FineTune)
        path, call, config = self.out / MODEL_FILE, self.made.call, self.made.encoder
        images, step = self.images, self.trainer.step
        info = None
        if config is not None:
            channels = self.config.data.channels
            info = EncoderInfo(config, channels, images.mean, images.std, self.name, step)
        return classifier_writer(path, whole.evaluated, call, self.about_model(), info)

    def exported_step(self) -> int | None:
        """Step of the model file; None: there is no file."""
        return saved_step(self.out / MODEL_FILE)

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training: accuracy on held-out images, or mean average precision."""
        assert isinstance(whole, FineTune)
        run = self.config.run
        guesses, found = self.guess(whole, bounded(self.images.val, run.probe_images, run.seed))
        if found.labels.ndim == 1:
            scores = {f"val_top{n}": accuracy(guesses, found.labels, top=n) for n in (1, 5)}
        else:
            precision = quality(guesses, found.labels)
            scores = {} if math.isnan(precision) else {"val_map": precision}
        log.write(step, scores, "probe")

    def guess(self, task: FineTune, source: Source) -> tuple[Tensor, FeatureSet]:
        """Predicted classes (n, at most 5), best first, or each label's probability (n, L); and
        features, of the readable images."""
        network = task.evaluated
        ready(network, self.parallel.device)

        def embed(images: Tensor) -> dict[str, Tensor]:
            return {"logits": network(images)}

        found = extract(embed, source, self.view, self.machine)
        return guesses_of(found.parts["logits"], found.labels), found

    def card(self, found: FeatureSet) -> dict[str, Any]:
        """Protocol card of the score."""
        train, val, path = self.images.train, self.images.val, self.out / MODEL_FILE
        return protocol_card(
            "finetune",
            self.start.identity,
            self.view,
            {
                "train": split_card(train, None, content_sha256(train)),
                "val": split_card(val, found, content_sha256(val), train),
            },
            options=asdict(self.config),
            model={"file": str(path), "sha256": sha256(path), "timm": asdict(self.made.call)},
            step=self.trainer.step,
            **self.machine.card(),
        )

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the network and its recipe."""
        tune, made = self.config.tune, self.made
        size = "x".join(map(str, made.size))
        pooling = f", {tune.pooling} pooling" if self.start.depth else ""
        weights = made.loaded if self.start.pretrained else "random"
        augmentation = f"RandAugment {tune.randaugment}, erasing {tune.erasing:g}"
        mixing = f"mixup {tune.mixup:g}, cutmix {tune.cutmix:g}, smoothing {tune.smoothing:g}"
        outputs = "classes" if self.images.train.targets is None else "labels, several an image"
        return [
            ("network", f"{made.call.arch}, {size} px{pooling}, {self.classes} {outputs}"),
            ("weights", f"{self.start.identity['given']}: {weights}"),
            ("parameters", counted(made.network)),
            ("rates", f"layer decay {tune.layer_decay:g}, drop path {tune.drop_path:g}"),
            ("augmentation", augmentation),
            ("mixing", mixing),
            ("average", f"decay {tune.ema:g}" if tune.ema else "none"),
        ]


def show_results(session: Finetuning) -> dict[str, float]:
    """Print the score of the final weights and the files of the run; returns the score."""
    guesses, found = session.guess(session.task, session.images.val)
    weights = "average" if session.config.tune.ema else "last"
    prediction = Prediction("logits", f"{weights} weights", guesses, {})
    names, seed = session.images.train.classes, session.config.run.seed
    score = score_predictions(prediction, found.labels, names, seed, found.groups)
    card = session.card(found)
    session.guard()
    write_card(session.out / CARD_FILE, card, [score])
    n, m = len(guesses), len(session.images.train)
    title = f"finetune: {session.config.encoder}, {n:,} evaluation and {m:,} training images"
    low, high = score.interval
    first, second = (f"{value:.2f}" for value in score.metrics.values())
    row = (score.setting, first, f"{low:.2f} to {high:.2f}", second)
    kinds = ("accuracy", "top-1", "top-5") if "top1" in score.metrics else ("score", "mAP", "AUROC")
    header = ("weights", kinds[1], "95%", kinds[2])
    show_table(f"{title}, {kinds[0]} in %", [row], header=header)
    print(f"model:    {session.out / MODEL_FILE}")
    print(f"protocol and scores: {session.out / CARD_FILE}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(session.out))}")
    return {f"final/{name}": value for name, value in score.metrics.items()}


def main(argv: list[str]) -> int:
    """Fine-tuning command; returns the exit status."""
    config, start = parse_options(argv)
    if config.dense:
        made = dense.DenseTuning(config, start)
        return carry_out(made, made.about(), dense.show_results, PROG)
    session = Finetuning(config, start)
    return carry_out(session, session.about(), show_results, PROG)
