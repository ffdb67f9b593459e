"""Detection command: ``python -m ssl_vit.evaluate detect --encoder RUN --data.train coco:...``."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from ssl_vit.commands.detect_options import PROG, DetectConfig, read_options
from ssl_vit.commands.running import carry_out
from ssl_vit.commands.tuning import Tuning, show_results
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.reading import beside
from ssl_vit.common.task import Task
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.coco import coco_of, has_objects, object_counts
from ssl_vit.data.coco_images import JitteredObjects
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.jitter import Jitter
from ssl_vit.evaluators.detect import Detect
from ssl_vit.evaluators.start import Start, for_channels, open_start
from ssl_vit.evaluators.tuned_detector import TunedDetector, check_annotated, detector_of
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import counted
from ssl_vit.weights.own_files import DETECTOR_FILE

CARD_FILE = "detect.json"
_ENLARGED = 4.0  # from this factor on a warning says so


def parse_options(argv: list[str]) -> tuple[DetectConfig, Start]:
    """Options (defaults < the encoder's channels < YAML < command line), and the opened encoder.

    Raises:
        UserError: a mistake in the options, or the encoder cannot be opened.
    """
    first = read_options(argv)
    start = open_start(first.encoder, EncoderConfig(), first.data.channels, first.run.seed)
    config = read_options(argv, start.channels)
    data = config.data
    start = for_channels(start, data.channels, "mean")
    if not data.mean and data.statistics == "default":
        config = replace(config, data=replace(data, mean=start.mean, std=start.std))
    if not config.run.out:
        out = str(start.default_folder("detect", data.train))
        config = replace(config, run=replace(config.run, out=out))
    return config, start


def annotated_images(config: DetectConfig, start: Start) -> Images:
    """Images of a run.

    Raises:
        UserError: they are of another kind, none is held out, there is no object to learn from or
            to score, or training and validation have other classes.
    """
    for option in ("train", "val"):
        spec = getattr(config.data, option)
        rule = "objects are read from coco:ROOT or coco:IMAGES:ANNOTATIONS.json"
        check(beside(spec) == "coco" or not spec, f"--data.{option} is {spec!r}; {rule}")
    own = Given(f"--encoder {config.encoder}", start.mean, start.std)
    images = open_images(config.data, config.run.seed, own)
    check(images.held_out, "--data.val is missing, and --data.holdout holds no image out")
    train, val = images.train, images.val
    coco_of(train, "--data.train")  # of another kind it raises
    check_annotated(train, val)
    check(has_objects(train), f"{train.spec} has no object to learn from")
    images.warnings += enlarged(train, config.detect.frame)
    if config.detect.head == "detr":
        images.warnings += crowded(train, config.detect.queries)
    return images


def enlarged(train: Source, frame: tuple[int, int]) -> tuple[str, ...]:
    """Warning of images that are far smaller than the frame: they cost as much as large ones."""
    coco, rows = coco_of(train, "--data.train")
    sizes = coco.sizes[rows]
    factor = float(np.median((np.array(frame) / sizes).min(1)))
    if factor < _ENLARGED:
        return ()
    median, size = ("x".join(f"{n:.0f}" for n in side) for side in (np.median(sizes, 0), frame))
    text = f"the images of {train.spec} are around {median} pixels, and are enlarged to {size}"
    return (f"{text}, which costs time and shows no more: give a smaller --detect.image-size",)


def crowded(train: Source, queries: int) -> tuple[str, ...]:
    """Warning of images with more objects than DETR has queries."""
    most = int(object_counts(train).max())
    if most <= queries:
        return ()
    text = f"an image of {train.spec} has {most} objects, more than --detect.queries, {queries}"
    return (f"{text}: those that are left over are not learned from",)


class Detection(Tuning):
    """Detection run: a detector trained on an encoder."""

    task: Detect
    card_file, model_file = CARD_FILE, DETECTOR_FILE

    def __init__(self, config: DetectConfig, start: Start) -> None:
        images, options = annotated_images(config, start), config.detect
        self.start, self.classes = start, images.train.classes or ()
        self.masks = options.head != "detr" and wants_masks(options.masks, images)
        seed = config.run.seed
        network = detector_of(start, options, len(self.classes), self.masks, seed)
        self.jitter = Jitter(options.frame, options.jitter, options.flip)
        views = ViewSpec((Crop(options.frame, flip=options.flip),))
        task = Detect(network, options.layer_decay)
        super().__init__("detect", config, task, views, images)
        self.evaluate_at(options.frame, TunedDetector.at_once)

    def tuned(self, task: Detect) -> TunedDetector:
        """The detector of a task."""
        options = self.config.detect
        return TunedDetector(task.network, self.view, self.classes, self.masks, options)

    def training_images(self) -> JitteredObjects:
        """Images with their objects, by large-scale jitter."""
        channels, seed = self.config.data.channels, self.config.run.seed
        return JitteredObjects(self.images.train, self.jitter, channels, seed, self.masks)

    def describe_views(self) -> str:
        """View in a line."""
        size, (low, high) = "x".join(map(str, self.jitter.size)), self.jitter.scales
        return f"1 of {size} px, large-scale jitter {low:g} to {high:g}"

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the images, their annotations and the encoder."""
        labels = [
            coco_of(s, "")[0].annotations_sha256() for s in (self.images.train, self.images.val)
        ]
        return {
            **self.images.fingerprint,
            "labels": " ".join(labels),
            "weights": self.start.weights,
        }

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training, on a bounded number of held-out images."""
        assert isinstance(whole, Detect)
        judged = self.judge(whole, self.looked_at())
        numbers: dict[str, float] = {}
        for score in judged.scores:
            prefix = "val_" if score.features == "boxes" else "val_mask_"
            missing = score.details["without_objects"]  # of so few images perhaps all
            known = {n: value for n, value in score.metrics.items() if n not in missing}
            numbers |= {f"{prefix}{name}": value for name, value in known.items()}
        if numbers:
            log.write(step, numbers, "probe")
        for name, picture in judged.pictures.items():
            log.picture(step, name, picture)

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the detector."""
        options, backbone = self.config.detect, self.task.backbone
        strides = ", ".join(f"{s:g}" for s in backbone.strides)
        kind, on = self.tuned(self.task).title, f"levels at strides {strides}"
        new = "pyramid and heads"
        if options.head == "detr":
            on = f"{options.queries} queries of tokens at stride {strides}; boxes only, no masks"
            new = "decoder and heads"
        windows = f", windows of {options.windows} patches" if options.windows else ""
        rates = f"layer decay {options.layer_decay:g}, drop path {options.drop_path:g}"
        objects = int(object_counts(self.images.train).sum())
        return [
            ("detector", f"{kind}, {len(self.classes)} classes, {on}"),
            ("encoder", f"{self.start.identity['given']}{windows}"),
            ("trained", f"{new}; the encoder is frozen" if options.frozen else rates),
            ("parameters", f"{counted(backbone.body)} encoder, {counted(self.task)} in all"),
            ("objects", f"{objects:,} in training"),
        ]


def wants_masks(option: str, images: Images) -> bool:
    """True if masks are predicted as well.

    Raises:
        UserError: they are asked for, and some object has none.
    """
    for name, source in (("data.train", images.train), ("data.val", images.val)):
        there = coco_of(source, f"--{name}")[0].has_masks
        check(
            there or option != "yes",
            f"--detect.masks is 'yes'; some objects of {source.spec} have no segmentation",
        )
        if not there:
            return False
    return option != "no"


def main(argv: list[str]) -> int:
    """Detection command; returns the exit status."""
    config, start = parse_options(argv)
    session = Detection(config, start)
    return carry_out(session, session.about(), show_results, PROG)
