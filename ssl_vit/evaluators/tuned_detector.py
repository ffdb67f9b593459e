"""Detector as a tuned network: built, saved, reopened, scored, and used on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ssl_vit.common.config import from_json
from ssl_vit.common.errors import check
from ssl_vit.data.base import Source, check_classes
from ssl_vit.data.coco import coco_of, has_objects
from ssl_vit.data.coco_images import framed_whole
from ssl_vit.data.view import View
from ssl_vit.evaluators.detect import Detections, Detector, detect, detect_pixels
from ssl_vit.evaluators.detect_options import DetectOptions
from ssl_vit.evaluators.detect_pictures import picture_of
from ssl_vit.evaluators.detect_scores import score_detections
from ssl_vit.evaluators.detector import HeadSizes, build_detector
from ssl_vit.evaluators.detector_body import DetectorBody, body_of, checked
from ssl_vit.evaluators.detr import DetrSizes, build_detr
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.pyramid import backbone_of
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.start import Start, rebuilt
from ssl_vit.evaluators.tuned import Judged, Remembered, Row, Tuned, view_of
from ssl_vit.weights.exchange import contiguous_state, load_strictly, read_safetensors, write_own

_SHOWN = 4
_BODY = "backbone.body.network.vit."


def detector_of(
    start: Start, options: DetectOptions, classes: int, masks: bool, seed: int
) -> Detector:
    """Detector on an encoder, whose weights are copied; all others are a function of ``seed``.

    Raises:
        UserError: an option that the encoder does not allow, or a library is missing.
    """
    if options.head == "detr":
        return _detr_of(start, options, classes, seed)
    backbone = backbone_of(
        start,
        options.frame,
        options.width,
        options.windows,
        options.global_blocks,
        options.drop_path,
        options.frozen,
        seed,
    )
    heads = HeadSizes(proposals=options.proposals, detections=options.detections)
    return build_detector(backbone, classes, options.frame, masks, heads, seed)


def _detr_of(start: Start, options: DetectOptions, classes: int, seed: int) -> Detector:
    """DETR on the last map of an encoder."""
    attention = options.windows, options.global_blocks
    body = body_of(start, options.frame, 1, *attention, options.drop_path, options.frozen)
    backbone = DetectorBody(body, options.frozen)
    checked(backbone, start.channels, options.frame)
    sizes = DetrSizes(options.width, options.queries, options.detections)
    return build_detr(backbone, classes, options.frame, sizes, seed)


class TunedDetector(Tuned):
    """Trained detector; ``masks``: whether it finds masks, too."""

    kind, at_once = "detect", 8
    transform: ClassVar[dict[str, Any]] = {
        "crop_ratio": None,
        "placement": "whole, as large as fits, top left in the size",
    }
    network: Detector
    names: tuple[str, ...]

    def __init__(
        self,
        network: Detector,
        view: View,
        names: tuple[str, ...],
        masks: bool,
        options: DetectOptions,
    ) -> None:
        super().__init__(network, view, names)
        self.masks, self.options = masks, options
        self.packages = ("pycocotools", *(["transformers"] if options.head == "detr" else []))

    @property
    def title(self) -> str:
        """Name of the detector's architecture."""
        if self.options.head == "detr":
            return "DETR"
        return "Mask R-CNN" if self.masks else "Faster R-CNN"

    def writer(self, path: Path, start: Start, step: int) -> Callable[[], None]:
        own = {"masks": self.masks, "options": asdict(self.options), "body": start.body}
        about = self.about(start, step) | own
        tensors = contiguous_state(self.network)
        return lambda: write_own(path, tensors, {"about": about})

    def matched(self, source: Source) -> Source:
        check_annotated(Remembered(self.where, self.names, len(self.names)), source)
        return source

    def digest(self, source: Source) -> dict[str, str]:
        return {"annotations_sha256": coco_of(source, source.spec)[0].annotations_sha256()}

    def judge(self, source: Source, machine: Machine, seed: int) -> Judged:
        self.ready(machine.device)
        return self.scored(detect(self.network, source, self.view, machine), source, seed)

    def scored(self, found: Detections, source: Source, seed: int) -> Judged:
        """Score of detections; masks are scored where every object has one."""
        kinds = ["boxes"]
        if self.masks and coco_of(source, source.spec)[0].has_masks:
            kinds.append("masks")
        scores = [score_detections(found, source, kind, self.setting, seed) for kind in kinds]
        detector = {
            "kind": self.title,
            "scores": "pycocotools, IoU 0.50 to 0.95, at most 100 detections an image",
            "strides": self.network.backbone.strides,
        }
        split = {"images": len(found.images), "unreadable": found.unreadable}
        picture = picture_of(found, source, self.view, _SHOWN, self.names)
        return Judged(scores, split, {"detector": detector}, {"detections": picture})

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Objects of each image, best first, as torchvision's detectors give them, but for classes
        that count from 0, as ``names`` do, and masks (k, H, W) that are bool."""
        views = framed_whole(images, range(len(images)), self.view.size)
        return detect_pixels(self.network, self.normalize(views.to(self.device)))

    def table(self, scores: Sequence[Score]) -> tuple[str, Row, list[Row]]:
        header = ("of", "AP", "95%", "AP50", "AP75", "small", "medium", "large")
        return "in %", header, [_row(score) for score in scores]

    def numbers(self, scores: Sequence[Score]) -> dict[str, float]:
        return {f"{s.features}_{n}": v for s in scores for n, v in s.metrics.items()}


def _row(score: Score) -> Row:
    """Row of the table; a metric of no object is a dash."""
    names = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    rest = [f"{score.metrics[n]:.2f}" if n in score.metrics else "-" for n in names]
    low, high = score.interval
    return (score.features, f"{score.value:.2f}", f"{low:.2f} to {high:.2f}", *rest)


def check_annotated(train: Source, val: Source) -> None:
    """Check that a detector of the classes of ``train`` can be scored on the objects of ``val``.

    Raises:
        UserError: it cannot: other classes, or no object.
    """
    coco_of(val, "--data.val")  # of another kind it raises
    check_classes(train, val)
    more = len(val.classes or ()) - len(train.classes or ())
    check(more <= 0, f"--data.val has {more} classes more than {train.spec} has")
    said = f"the validation set, {len(val):,} images of {val.spec}, has no object to score"
    check(has_objects(val), said)


def open_detector(path: Path, content: dict[str, Any]) -> TunedDetector:
    """Detector of a file; ``content``: its metadata.

    Raises:
        UserError: its tensors do not match.
    """
    about = content["about"]
    options = from_json(DetectOptions, about["options"])
    names, masks = tuple(map(str, about["classes"])), bool(about["masks"])
    view, state = view_of(about), read_safetensors(path)[0]
    own = {k.removeprefix(_BODY): v for k, v in state.items() if k.startswith(_BODY)}
    start = rebuilt(about["body"], own, str(path), view)
    network = detector_of(start, options, len(names), masks, seed=0)
    load_strictly(network, state, str(path))
    return TunedDetector(network, view, names, masks, options)
