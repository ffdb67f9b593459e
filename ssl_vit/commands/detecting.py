"""Detection command: ``python -m ssl_vit.evaluate detect --encoder RUN --data.train coco:...``."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from torchvision.models.detection import FasterRCNN

from ssl_vit.commands.cli import show_table
from ssl_vit.commands.detect_options import PROG, DetectConfig, read_options
from ssl_vit.commands.pretraining import carry_out
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.figures import save_png
from ssl_vit.common.reading import beside
from ssl_vit.common.task import Task
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source, check_classes
from ssl_vit.data.coco import coco_of, has_objects
from ssl_vit.data.coco_images import JitteredObjects
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.jitter import Jitter
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.classifier import saved_step
from ssl_vit.evaluators.detect import Detect, Detections, detect
from ssl_vit.evaluators.detect_pictures import picture_of
from ssl_vit.evaluators.detect_scores import score_detections
from ssl_vit.evaluators.detector import HeadSizes, build_detector
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.protocol import protocol_card, split_card, write_card
from ssl_vit.evaluators.pyramid import backbone_of
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.start import Start, for_channels, open_start
from ssl_vit.evaluators.watch import bounded
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import Session, counted
from ssl_vit.weights.exchange import contiguous_state, sha256, write_own

CARD_FILE, MODEL_FILE, PICTURE_FILE = "detect.json", "detector.safetensors", "detections.png"
_AT_ONCE = 8  # images of a batch in evaluation
_SHOWN = 4


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
    for option, source in (("--data.train", train), ("--data.val", val)):
        coco_of(source, option)  # of another kind it raises
    check_classes(images.train, images.val)
    names = images.train.classes or ()
    more = len(images.val.classes or ()) - len(names)
    check(more <= 0, f"--data.val has {more} classes more than --data.train has")
    check(has_objects(train), f"{train.spec} has no object to learn from")
    said = f"the validation set, {len(val):,} images of {val.spec}, has no object to score"
    check(has_objects(val), said)
    return images


class Detection(Session):
    """Detection run: a detector trained on an encoder."""

    task: Detect

    def __init__(self, config: DetectConfig, start: Start) -> None:
        images, options = annotated_images(config, start), config.detect
        self.start, self.classes = start, images.train.classes or ()
        self.masks = wants_masks(options.masks, images)
        backbone = backbone_of(
            start,
            options.frame,
            options.width,
            options.windows,
            options.global_blocks,
            options.drop_path,
            options.frozen,
            config.run.seed,
        )
        heads = HeadSizes(proposals=options.proposals, detections=options.detections)
        seed = config.run.seed
        network = build_detector(
            backbone, len(self.classes), options.frame, self.masks, heads, seed
        )
        self.jitter = Jitter(options.frame, options.jitter, options.flip)
        views = ViewSpec((Crop(options.frame, flip=options.flip),))
        task = Detect(network, options.layer_decay)
        super().__init__("detect", config, task, views, images)
        channels = config.data.channels
        self.view = View(options.frame, channels, images.mean, images.std)
        precision, workers = self.trainer.precision, config.data.workers
        self.machine = Machine(self.parallel.device, precision, workers, _AT_ONCE)

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
        """That of the images and their annotations, and the encoder."""
        labels = [
            coco_of(s, "")[0].annotations_sha256() for s in (self.images.train, self.images.val)
        ]
        return {
            **self.images.fingerprint,
            "labels": " ".join(labels),
            "weights": self.start.weights,
        }

    def export(self, whole: Task) -> Callable[[], object]:
        """Snapshot of the detector; the returned function writes its file."""
        assert isinstance(whole, Detect)
        about = {
            "mean": self.images.mean,
            "std": self.images.std,
            "classes": self.classes,
            "masks": self.masks,
            "options": asdict(self.config.detect),
            "encoder": self.start.identity,
            "step": self.trainer.step,
        }
        tensors, path = contiguous_state(whole.network), self.out / MODEL_FILE
        return lambda: write_own(path, tensors, {"about": about})

    def exported_step(self) -> int | None:
        """Step of the detector's file; None: there is no file."""
        return saved_step(self.out / MODEL_FILE)

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training, on a bounded number of held-out images."""
        assert isinstance(whole, Detect)
        run = self.config.run
        source = bounded(self.images.val, run.probe_images, run.seed)
        found = self.find(whole.network, source)
        numbers: dict[str, float] = {}
        for score in self.scores(found, source):
            prefix = "val_" if score.features == "boxes" else "val_mask_"
            missing = score.details["without_objects"]  # of so few images perhaps all
            known = {n: value for n, value in score.metrics.items() if n not in missing}
            numbers |= {f"{prefix}{name}": value for name, value in known.items()}
        if numbers:
            log.write(step, numbers, "probe")
        log.picture(step, "detections", self.picture(found, source))

    def find(self, network: FasterRCNN, source: Source) -> Detections:
        """Detections in all images of a source."""
        return detect(network, source, self.view, self.machine)

    def scores(self, found: Detections, source: Source) -> list[Score]:
        """Score of the boxes and, with masks, of these."""
        kinds = ["boxes", *["masks"] * self.masks]
        seed, setting = self.config.run.seed, "last weights"
        return [score_detections(found, source, kind, setting, seed) for kind in kinds]

    def picture(self, found: Detections, source: Source) -> np.ndarray:
        """Picture of the first images, annotated and as the detector sees them."""
        return picture_of(found, source, self.view, _SHOWN, self.classes)

    def card(self, found: Detections) -> dict[str, Any]:
        """Protocol card of the score."""
        train, val, path = self.images.train, self.images.val, self.out / MODEL_FILE
        splits = {}
        for name, source, other in (("train", train, None), ("val", val, train)):
            own = split_card(source, None, content_sha256(source), other)
            digest = coco_of(source, "")[0].annotations_sha256()
            splits[name] = own | {"annotations_sha256": digest}
        splits["val"] |= {"images": len(found.images), "unreadable": found.unreadable}
        card = protocol_card(
            "detect",
            self.start.identity,
            self.view,
            splits,
            options=asdict(self.config),
            detector={
                "kind": "Mask R-CNN" if self.masks else "Faster R-CNN",
                "scores": "pycocotools, IoU 0.50 to 0.95, at most 100 detections an image",
                "strides": self.task.backbone.strides,
            },
            model={"file": str(path), "sha256": sha256(path)},
            step=self.trainer.step,
            **self.machine.card(),
        )
        card["transform"]["crop_ratio"] = None
        card["transform"]["placement"] = "whole, as large as fits, top left in the size"
        card["versions"]["pycocotools"] = version("pycocotools")
        return card

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the detector."""
        options, backbone = self.config.detect, self.task.backbone
        kind = "Mask R-CNN" if self.masks else "Faster R-CNN"
        levels = ", ".join(f"{s:g}" for s in backbone.strides)
        windows = f", windows of {options.windows} patches" if options.windows else ""
        rates = f"layer decay {options.layer_decay:g}, drop path {options.drop_path:g}"
        coco, rows = coco_of(self.images.train, "")
        objects = sum(len(coco.objects(int(row)).boxes) for row in rows)
        return [
            ("detector", f"{kind}, {len(self.classes)} classes, levels at strides {levels}"),
            ("encoder", f"{self.start.identity['given']}{windows}"),
            ("trained", "pyramid and heads; the encoder is frozen" if options.frozen else rates),
            ("parameters", f"{counted(backbone.body)} encoder, {counted(self.task)} in all"),
            ("objects", f"{objects:,} in training"),
        ]


def wants_masks(option: str, images: Images) -> bool:
    """Whether masks are found, too.

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


def show_results(session: Detection) -> dict[str, float]:
    """Print the scores of the final weights and the files of the run; returns the scores."""
    val = session.images.val
    found = session.find(session.task.network, val)
    scores, card = session.scores(found, val), session.card(found)
    session.guard()
    write_card(session.out / CARD_FILE, card, scores)
    save_png(session.out / PICTURE_FILE, session.picture(found, val))
    title = f"detect: {session.config.encoder}, {len(found.images):,} evaluation and "
    title += f"{len(session.images.train):,} training images, in %"
    header = ("of", "AP", "95%", "AP50", "AP75", "small", "medium", "large")
    show_table(title, [row_of(score) for score in scores], header=header)
    print(f"detector: {session.out / MODEL_FILE}")
    print(f"pictures: {session.out / PICTURE_FILE}")
    print(f"protocol and scores: {session.out / CARD_FILE}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(session.out))}")
    return {f"final/{s.features}_{n}": v for s in scores for n, v in s.metrics.items()}


def row_of(score: Score) -> tuple[str, ...]:
    """Row of the table; a metric of no object is a dash."""
    names = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    rest = [f"{score.metrics[n]:.2f}" if n in score.metrics else "-" for n in names]
    low, high = score.interval
    return (score.features, f"{score.value:.2f}", f"{low:.2f} to {high:.2f}", *rest)


def main(argv: list[str]) -> int:
    """Detection command; returns the exit status."""
    config, start = parse_options(argv)
    session = Detection(config, start)
    return carry_out(session, session.about(), show_results, PROG)
