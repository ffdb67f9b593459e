"""Fine-tuning command: ``python -m ssl_vit.evaluate finetune --encoder RUN --data.train ...``."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import replace
from typing import Any

import torch

from ssl_vit.commands import dense_tuning as dense
from ssl_vit.commands.evaluating import with_labels
from ssl_vit.commands.finetune_options import PROG, first_options, read_options
from ssl_vit.commands.running import carry_out
from ssl_vit.commands.tuning import Tuning, show_results
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.task import Task
from ssl_vit.data.base import Numbered
from ssl_vit.data.groups import group_count
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.evaluators.classifier import Classifier, classifier
from ssl_vit.evaluators.finetune import FineTune, tuning_views
from ssl_vit.evaluators.options import FinetuneConfig, dense_recipe, recipe
from ssl_vit.evaluators.score import LAST
from ssl_vit.evaluators.scores import accuracy, check_labels
from ssl_vit.evaluators.selection import outputs_of, quality
from ssl_vit.evaluators.start import Start, for_channels, open_start
from ssl_vit.evaluators.tuned_classes import TunedClasses, labels_of
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import counted

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
        kind = f"finetune-{config.dense}" if config.dense else "finetune"
        out = str(start.default_folder(kind, data.train))
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


class Finetuning(Tuning):
    """Fine-tuning run: a classifier trained from an encoder's weights, or from scratch."""

    task: FineTune
    card_file = CARD_FILE

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
        self.evaluate_at(self.made.size, TunedClasses.at_once)

    def tuned(self, task: FineTune) -> TunedClasses:
        """The evaluated network of a task."""
        made, train = self.made, self.images.train
        setting = "average weights" if self.config.tune.ema else LAST
        known = made.call, self.classes, train.targets is not None, setting, made.encoder
        return TunedClasses(task.evaluated, self.view, train.classes, *known)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the images, their labels and the encoder."""
        digest = hashlib.sha256()
        for source in (self.images.train, self.images.val):
            digest.update(repr(source.classes).encode())
            digest.update(b"none" if source.labels is None else source.labels.tobytes())
        return {
            **self.images.fingerprint,
            "labels": digest.hexdigest(),
            "weights": self.start.weights,
        }

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training: accuracy on held-out images, or mean average precision."""
        assert isinstance(whole, FineTune)
        guesses, found = self.tuned(whole).guess(self.looked_at(), self.machine)
        if found.labels.ndim == 1:
            scores = {f"val_top{n}": accuracy(guesses, found.labels, top=n) for n in (1, 5)}
        else:
            precision = quality(guesses, found.labels)
            scores = {} if math.isnan(precision) else {"val_map": precision}
        log.write(step, scores, "probe")

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


def main(argv: list[str]) -> int:
    """Fine-tuning command; returns the exit status."""
    config, start = parse_options(argv)
    kind = dense.DenseTuning if config.dense else Finetuning
    session: Tuning = kind(config, start)
    return carry_out(session, session.about(), show_results, PROG)
