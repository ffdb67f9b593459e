"""Detection: a detector on an encoder as a task of the loop, and what it finds in images."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Normalize
from ssl_vit.data.base import Source
from ssl_vit.data.coco_images import WholeImages, unpacked
from ssl_vit.data.view import View
from ssl_vit.data.workers import load
from ssl_vit.evaluators.detector import Target, detection_losses
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.maps_task import MapsTask
from ssl_vit.evaluators.pyramid import PyramidBackbone
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


class Detect(MapsTask):
    """Detection task: the sum of a detector's losses, each of which is logged, too."""

    progress = ("class", "box")

    def __init__(self, network: FasterRCNN, layer_decay: float) -> None:
        super().__init__()
        self.network = network
        self.train_encoder(self.backbone.body, "network.backbone.body", layer_decay)

    @property
    def backbone(self) -> PyramidBackbone:
        """The encoder with its pyramid."""
        found: PyramidBackbone = self.network.backbone
        return found

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Losses of a batch of ``data.coco_images.JitteredObjects``."""
        images = views.crops[0]
        found = detection_losses(self.network, list(images), targets_of(views), views.keys)
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
def detect(network: FasterRCNN, source: Source, view: View, machine: Machine) -> Detections:
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


def detect_batch(network: FasterRCNN, views: Views) -> list[Found]:
    """Detections in a batch of ``WholeImages``; ``network`` in evaluation mode."""
    scaled, original = (views.drawn[name].tolist() for name in ("scaled", "original"))
    inner = [image[:, :h, :w] for image, (h, w) in zip(views.crops[0], scaled, strict=True)]
    results = network(inner)
    sizes = zip(views.keys.tolist(), scaled, original, results, strict=True)
    return [_in_image(key, *rest) for key, *rest in sizes]


def _in_image(index: int, scaled: list[int], original: list[int], result: Target) -> Found:
    """Detections in pixels of the image itself."""
    (height, width), (h, w) = original, scaled
    boxes = result["boxes"].float()
    boxes = boxes * boxes.new_tensor([width / w, height / h, width / w, height / h])
    masks = None
    if "masks" in result:
        masks = [
            _run_lengths(m, b, height, width) for m, b in zip(result["masks"], boxes, strict=True)
        ]
    scores, classes = result["scores"].float().cpu(), result["labels"].cpu() - 1
    return Found(index, boxes.cpu(), scores, classes, masks)


def _run_lengths(mask: Tensor, box: Tensor, height: int, width: int) -> dict[str, Any]:
    """Run lengths of a mask of its box (1, m, m), in the whole image; one at a time, as each is as
    large as the image."""
    from pycocotools import mask as library

    whole = paste_masks_in_image(mask[None].float(), box[None], (height, width))[0, 0] >= _HALF
    return dict(library.encode(whole.cpu().numpy().astype("uint8", order="F")))
