"""Dense fine-tuning: ``evaluate finetune`` of images with masks or depth maps beside them."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from ssl_vit.commands.tuning import Tuning
from ssl_vit.common.errors import check
from ssl_vit.common.reading import beside
from ssl_vit.common.task import Task
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.dense import DenseImages
from ssl_vit.data.depths import DepthPairs
from ssl_vit.data.images import Given, open_images
from ssl_vit.data.pairs import pairs_of, whole_pairs
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.dense_kinds import Kind
from ssl_vit.evaluators.dense_tune import DenseTune, train_what_counts
from ssl_vit.evaluators.depth_kind import DepthKind
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.evaluators.segment_kind import SegmentKind
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.tuned_pixels import TunedPixels, check_sizes, dense_network
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import counted

CARD_FILE = "finetune.json"


def check_options(config: FinetuneConfig) -> None:
    """Check that options of classes of images are not given for pixels.

    Raises:
        UserError: one is.
    """
    tune, spec = config.tune, config.data.train
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "randaugment": "none"}
    off |= {"ema": 0.0, "pooling": "mean"}
    for option, none in off.items():
        given = getattr(tune, option)
        flag = f"--tune.{option.replace('_', '-')}"
        check(given == none, f"{flag} is {given}; of {spec} pixels are learned: leave it out")
    check(not config.data.labels, f"--data.labels is not for {spec}, of which pixels are learned")
    val = config.data.val
    right = not val or beside(val) == config.dense
    check(right, f"--data.val is {val!r}; --data.train is {config.dense}:: both must be")


class DenseTuning(Tuning):
    """Dense fine-tuning run: an encoder and a head on its feature maps, trained together."""

    task: DenseTune
    card_file = CARD_FILE

    def __init__(self, config: FinetuneConfig, start: Start) -> None:
        own = Given(f"--encoder {config.encoder}", start.mean, start.std)
        given = None if config.encoder == "none" else own
        images = open_images(config.data, config.run.seed, given)
        check(images.held_out, "--data.val is missing, and --data.holdout holds no image out")
        self.start, tune, size = start, config.tune, config.tune.image_size
        self.kind = kind_of(config, images.train, images.val)
        self.size = (size[0], size[-1]) if size else start.size
        seed = config.run.seed
        network = dense_network(start, self.kind, self.size, tune.drop_path, seed)
        train_what_counts(network, self.size, config.data.channels)
        crop = Crop(
            self.size,
            scale=tune.crop_scale,
            ratio=self.kind.ratio,
            flip=tune.flip,
            vertical_flip=tune.vertical_flip,
            quarter_turns=tune.quarter_turns,
            relative=True,
        )
        task = DenseTune(network, self.kind.loss, tune.layer_decay)
        super().__init__("finetune", config, task, ViewSpec((crop,)), images)
        self.evaluate_at(self.size, TunedPixels.at_once)

    def tuned(self, task: DenseTune) -> TunedPixels:
        """The network of a task."""
        return TunedPixels(task.network, self.kind, self.view)

    def training_images(self) -> DenseImages:
        """Training crops with their targets."""
        images, kind, seed = self.images, self.kind, self.config.run.seed
        shared = images.train, self.views, self.config.data.channels, seed
        return DenseImages(*shared, kind.prepare, kind.unknown, images.cache)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the images, their maps and the encoder."""
        digest = hashlib.sha256()
        for source in (self.images.train, self.images.val):
            digest.update(content_sha256(pairs_of(source).masks).encode())
        return {
            **self.images.fingerprint,
            "labels": digest.hexdigest(),
            "weights": self.start.weights,
        }

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training, on a bounded number of held-out images."""
        assert isinstance(whole, DenseTune)
        judged = self.judge(whole, self.looked_at())
        numbers = self.tuned(whole).numbers(judged.scores)
        log.write(step, {f"val_{name}": value for name, value in numbers.items()}, "probe")
        for name, picture in judged.pictures.items():
            log.picture(step, name, picture)

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the network and its recipe."""
        tune, maps = self.config.tune, self.task.network.maps
        weights = "trained on" if self.start.pretrained else "random"
        strides = ", ".join(map(str, maps.strides))
        return [
            ("head", f"{self.kind.about()}; on maps of strides {strides}"),
            ("weights", f"{self.start.identity['given']}: {weights}"),
            ("parameters", f"{counted(maps)} encoder, {counted(self.task)} in all"),
            ("rates", f"layer decay {tune.layer_decay:g}, drop path {tune.drop_path:g}"),
        ]


def kind_of(config: FinetuneConfig, train: Source, val: Source) -> Kind:
    """Kind of dense fine-tuning of these images.

    Raises:
        UserError: they do not allow it.
    """
    for source in (train, val):
        whole = whole_pairs(source)
        if isinstance(whole, DepthPairs):
            whole.scale = config.depth.scale  # before any part of them is taken
    ours, theirs = pairs_of(train), pairs_of(val)
    for pairs in (ours, theirs):
        check_sizes(pairs, config.data.channels)
    if config.dense == "pairs":
        return SegmentKind.of(config.segment, ours, theirs)
    assert isinstance(ours, DepthPairs)
    assert isinstance(theirs, DepthPairs)
    return DepthKind.of(config.depth, ours, theirs)
