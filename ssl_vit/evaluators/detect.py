"""Detection: a detector on an encoder as a task of the loop, and what it finds in images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.base import Source
from ssl_vit.data.coco_images import WholeImages, unpacked
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.view import View
from ssl_vit.data.workers import load
from ssl_vit.evaluators.detector import Target, detection_losses
from ssl_vit.evaluators.detector_body import DetectorBody
from ssl_vit.evaluators.detr import Detr
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.maps_task import MapsTask
from ssl_vit.training.parallel import autocast, loader_workers

log = logging.getLogger("ssl_vit")
_LOSSES = {
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_box",
    "loss_mask": "mask",
}
_HALF = 0.5  # probability from which a pixel is of a mask

Detector: TypeAlias = FasterRCNN | Detr


class Detect(MapsTask):
    """Detection task: the sum of a detector's losses, each of which is logged, too."""

    progress = ("class", "box")

    def __init__(self, network: Detector, layer_decay: float) -> None:
        super().__init__()
        self.network = network
        self.train_encoder(self.backbone.body, "network.backbone.body", layer_decay)

    @property
    def backbone(self) -> DetectorBody:
        """The encoder, with its pyramid if there is one."""
        found: DetectorBody = self.network.backbone
        return found

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Losses of a batch of ``data.coco_images.JitteredObjects``."""
        images, targets = views.crops[0], targets_of(views)
        if isinstance(self.network, Detr):
            named = self.network.losses(images, views.missing_of(0), targets)
        else:
            found = detection_losses(self.network, list(images), targets, views.keys)
            named = {_LOSSES[name]: loss for name, loss in found.items()}
        return {"loss": torch.stack(list(named.values())).sum(), **named}


def targets_of(views: Views) -> list[Target]:
    """Objects of each image, as torchvision takes them: classes count from 1, as 0 is the
    background."""
    drawn, width = views.drawn, views.crops[0].shape[-1]
    counts = drawn["count"].tolist()
    boxes, classes = (drawn[name].split(counts) for name in ("boxes", "classes"))
    targets = [{"boxes": b, "labels": c + 1} for b, c in zip(boxes, classes, strict=True)]
    if "masks" in drawn:
        for target, packed in zip(targets, drawn["masks"].split(counts), strict=True):
            target["masks"] = unpacked(packed, width)
    return targets


@dataclass
class Found:
    """Detections in an image, best first; ``index``: its place in the source.

    ``boxes``: left, top, right, bottom in pixels of the image itself. ``classes``: from 0.
    ``masks``: run lengths, as pycocotools has them; None of a detector without masks.
    """

    index: int
    boxes: Float[Tensor, "k 4"]
    scores: Float[Tensor, " k"]
    classes: Int64[Tensor, " k"]
    masks: list[dict[str, Any]] | None = None


@dataclass
class Detections:
    """Detections in the readable images of a source, in its order; ``unreadable``: how many others
    there are."""

    images: list[Found]
    unreadable: int


@torch.inference_mode()
def detect(network: Detector, source: Source, view: View, machine: Machine) -> Detections:
    """Detect objects in every readable image of a COCO source, resized to fit into ``view.size``.

    Raises:
        UserError: no image could be read.
    """
    device, workers = machine.device, loader_workers(machine.workers, machine.device)
    images = WholeImages(source, view.size, view.channels)
    batches = BatchSampler(SequentialSampler(source), machine.at_once, drop_last=False)
    normalize = Normalize(view.mean, view.std).to(device)
    network.to(device).eval()
    found: list[Found] = []
    bad: dict[int, str] = {}
    for batch in load(images, batches, workers, device.type == "cuda"):
        bad |= batch.bad
        if batch.views.crops:
            views = normalize(batch.views.to(device))
            with autocast(device, machine.precision):
                found += detect_batch(network, views)
    for reason in list(bad.values())[:5]:
        log.warning("unreadable image skipped: %s", reason)
    if not found:
        raise UserError(f"no image of {source.spec} can be read: {next(iter(bad.values()), '')}")
    return Detections(found, len(bad))


def detect_batch(network: Detector, views: Views) -> list[Found]:
    """Detections in a batch of ``WholeImages``; ``network`` in evaluation mode."""
    found = []
    for key, size, one in zip(views.keys.tolist(), *_in_images(network, views), strict=True):
        masks = None
        if "masks" in one:
            masks = [_run_lengths(mask) for mask in _pasted(one, size)]
        boxes, scores, classes = (one[n].cpu() for n in ("boxes", "scores", "labels"))
        found.append(Found(key, boxes, scores, classes, masks))
    return found


@torch.inference_mode()
def detect_pixels(network: Detector, views: Views) -> list[Target]:
    """Detections as :func:`detect_batch`, of each image ``boxes``, ``labels``, ``scores`` and, of a
    detector with masks, ``masks``, bool (k, H, W); on the CPU."""
    found = []
    for size, one in zip(*_in_images(network, views), strict=True):
        if "masks" in one:
            masks = [mask.cpu() for mask in _pasted(one, size)]
            one["masks"] = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
        found.append({name: value.cpu() for name, value in one.items()})
    return found


def _in_images(
    network: Detector, views: Views
) -> tuple[list[tuple[int, int]], list[dict[str, Tensor]]]:
    """Height and width of each image, and detections in it: boxes in pixels of the image itself,
    classes from 0, masks of their boxes (k, 1, m, m)."""
    scaled, original = (views.drawn[name].tolist() for name in ("scaled", "original"))
    if isinstance(network, Detr):
        found = network.detections(views.crops[0], views.missing_of(0), scaled)
    else:
        inner = [image[:, :h, :w] for image, (h, w) in zip(views.crops[0], scaled, strict=True)]
        found = network(inner)
    for one, (height, width), (h, w) in zip(found, original, scaled, strict=True):
        boxes = one["boxes"].float()
        one["boxes"] = boxes * boxes.new_tensor([width / w, height / h, width / w, height / h])
        one["scores"], one["labels"] = one["scores"].float(), one["labels"] - 1
    return [(height, width) for height, width in original], found


def _pasted(one: dict[str, Tensor], size: tuple[int, int]) -> Iterator[Bool[Tensor, "h w"]]:
    """Masks of the objects of an image in the whole of it; one at a time, as each is as large."""
    for mask, box in zip(one["masks"], one["boxes"], strict=True):
        yield paste_masks_in_image(mask[None].float(), box[None], size)[0, 0] >= _HALF


def _run_lengths(mask: Bool[Tensor, "h w"]) -> dict[str, Any]:
    """Run lengths of a mask."""
    from pycocotools import mask as library

    return dict(library.encode(mask.cpu().numpy().astype("uint8", order="F")))
