"""Detector: torchvision's Faster or Mask R-CNN on an encoder's feature pyramid.

Heads as in ViTDet (Li et al. 2022, after He et al. 2017): two convolutions for proposals; four
convolutions with LayerNorm and one hidden layer for boxes; four convolutions with LayerNorm for
masks. What torchvision draws at random, which anchors and which proposals are learned from, is a
function of each image's key here, so that it is the same however a batch is split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from ssl_vit.common.distributed import all_reduce_mean
from ssl_vit.common.seeds import fold_keys, uniform
from ssl_vit.common.task import at_least_fp32
from ssl_vit.evaluators.pyramid import LEVELS, PyramidBackbone

Target = dict[str, Tensor]
_RATIOS = (0.5, 1.0, 2.0)
_ANCHOR = 8  # side of an anchor, in strides of its level: 32 pixels at stride 4
_POOLED, _POOLED_MASK = 7, 14


class Anchors(AnchorGenerator):
    """Anchors at the pyramid's own strides, which need not be whole numbers, in float32."""

    def __init__(self, strides: tuple[float, ...]) -> None:
        sizes = tuple((_ANCHOR * stride,) for stride in strides)
        super().__init__(sizes, (_RATIOS,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, the same for all: (left, top, right, bottom)."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        grids = [list(level.shape[-2:]) for level in feature_maps]
        found = torch.cat(self.grid_anchors(grids, steps))
        return [found] * len(image_list.image_sizes)


class KeyedSampler:
    """Sampler of anchors or proposals to learn from: at most ``size`` of an image, of which at most
    a share is positive; which, is a function of the image's key and, of proposals, of where they
    are: of their order, which changes with the last bits of nearly equal scores, it is not.

    Attributes:
        keys: of the images at hand.
        boxes: of their proposals, image by image; None: of anchors, which have an order.
        sampled, positive: how many were taken of all images together, the last time.
    """

    keys: Int64[Tensor, " b"]
    boxes: list[Tensor] | None = None
    sampled: Tensor
    positive: Tensor

    def __init__(self, size: int, share: float) -> None:
        self.size, self.share = size, share

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Positive and negative ones of each image, as masks of its anchors; ``matched``: 1 or more
        for positive ones, 0 for negative ones."""
        keys = self.keys.split(1)
        draws = (
            [uniform(key, len(m))[0] for key, m in zip(keys, matched, strict=True)]
            if self.boxes is None
            else [_by_place(key, boxes) for key, boxes in zip(keys, self.boxes, strict=True)]
        )
        pairs = [self._choose(d, m) for d, m in zip(draws, matched, strict=True)]
        self.positive = torch.stack([p.sum() for p, _ in pairs]).sum()
        self.sampled = self.positive + torch.stack([n.sum() for _, n in pairs]).sum()
        return [p for p, _ in pairs], [n for _, n in pairs]

    def _choose(self, draws: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        positive = _first(draws, matched >= 1, int(self.size * self.share))
        negative = _first(draws, matched == 0, self.size - positive.sum())
        return positive.byte(), negative.byte()


def _by_place(key: Int64[Tensor, " 1"], boxes: Tensor) -> Tensor:
    """Draw for each box, a function of the key and of its corners, to half a pixel."""
    code = key.expand(len(boxes))
    for corner in (2 * boxes).round().long().unbind(1):
        code = fold_keys(code + corner, 0)
    return uniform(code, 1)[:, 0]


def _first(draws: Tensor, allowed: Tensor, most: int | Tensor) -> Tensor:
    """Mask of the ``most`` allowed ones with the lowest draws."""
    order = torch.where(allowed, draws, 2.0).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return allowed & (rank < most)


class Framed(nn.Module):
    """Framing in place of torchvision's transform, which would normalise and resize once more:
    images are put into the top left corner of a frame of ``size``, and nothing else."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """The images in one batch, with their own sizes; targets as they are."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = self.size
        framed = [
            F.pad(i, (0, width - w, 0, height - h)) for i, (h, w) in zip(images, sizes, strict=True)
        ]
        return ImageList(torch.stack(framed), sizes), targets

    def postprocess(self, found: list[Target], *sizes: Any) -> list[Target]:
        """Detections in pixels of the frame, as they are."""
        return found


class _Heads(RoIHeads):
    """Heads whose sampler knows the proposals."""

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], *truth: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        self.fg_bg_sampler.boxes = proposals
        found: tuple[list[Tensor], list[Tensor]] = super().assign_targets_to_proposals(
            proposals, *truth
        )
        return found


class _Proposing(RPNHead):
    """RPN head whose results are float32: boxes are made of them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [at_least_fp32(t) for t in logits], [at_least_fp32(t) for t in deltas]


class _Boxes(FastRCNNPredictor):
    """Classes and boxes in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return at_least_fp32(scores), at_least_fp32(deltas)


class _Masks(MaskRCNNPredictor):
    """Masks in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return at_least_fp32(super().forward(x))


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of a detector's heads: boxes of an image that proposals and classes are learned from,
    detections of an image, and hidden features, in units of the pyramid's channels."""

    anchors: int = 256
    proposals: int = 512
    detections: int = 100
    hidden: int = 4


def build_detector(
    backbone: PyramidBackbone,
    classes: int,
    size: tuple[int, int],
    masks: bool,
    heads: HeadSizes,
    seed: int,
) -> FasterRCNN:
    """Faster R-CNN or, with ``masks``, Mask R-CNN, of ``classes`` classes beside the background,
    for images within a frame of ``size``. The heads are random, a function of ``seed``."""
    c = backbone.out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = heads.hidden * c
        options: dict[str, Any] = {
            "rpn_anchor_generator": Anchors(backbone.strides),
            "rpn_head": _Proposing(c, len(_RATIOS), conv_depth=2),
            "box_roi_pool": _pool(backbone, _POOLED),
            "box_head": FastRCNNConvFCHead(
                (c, _POOLED, _POOLED), [c] * 4, [hidden], norm_layer=LayerNorm2d
            ),
            "box_predictor": _Boxes(hidden, classes + 1),
            "box_detections_per_img": heads.detections,
        }
        kind: type[FasterRCNN] = FasterRCNN
        if masks:
            kind = MaskRCNN
            options |= {
                "mask_roi_pool": _pool(backbone, _POOLED_MASK),
                "mask_head": MaskRCNNHeads(c, [c] * 4, 1, norm_layer=LayerNorm2d),
                "mask_predictor": _Masks(c, c, classes + 1),
            }
        made = kind(backbone, **options)
    made.transform = Framed(size)
    made.rpn.fg_bg_sampler = KeyedSampler(heads.anchors, 0.5)
    made.roi_heads.__class__ = _Heads
    made.roi_heads.fg_bg_sampler = KeyedSampler(heads.proposals, 0.25)
    return made


def _pool(backbone: PyramidBackbone, side: int) -> MultiScaleRoIAlign:
    """Pooling of boxes at the pyramid's own strides; a box of 224 pixels is of stride 16."""
    made = MultiScaleRoIAlign([str(n) for n in range(LEVELS)], side, sampling_ratio=2)
    strides = backbone.strides[:LEVELS]
    first = round(math.log2(strides[0]))
    made.scales = [1 / s for s in strides]
    made.map_levels = initLevelMapper(first, first + LEVELS - 1)
    return made


def detection_losses(
    network: FasterRCNN, images: list[Tensor], targets: list[Target], keys: Int64[Tensor, " b"]
) -> dict[str, Tensor]:
    """Losses of torchvision by name, in training mode; ``keys``: of the images.

    Each is a mean over what was sampled of all images of all processes: torchvision's own is over
    those of this process, and images differ in how much can be sampled of them.
    """
    samplers = [network.rpn.fg_bg_sampler, network.roi_heads.fg_bg_sampler]
    for number, sampler in enumerate(samplers, start=1):
        sampler.keys = fold_keys(keys, number)
    found: dict[str, Tensor] = network(images, targets)
    anchors, proposals = samplers
    counts = torch.stack([anchors.sampled, proposals.sampled, proposals.positive]).float()
    of_anchors, of_proposals, of_masks = counts / all_reduce_mean(counts).clamp(min=1e-6)
    shares = {
        "loss_objectness": of_anchors,
        "loss_rpn_box_reg": of_anchors,
        "loss_classifier": of_proposals,
        "loss_box_reg": of_proposals,
        "loss_mask": of_masks,
    }
    return {name: loss * shares[name] for name, loss in found.items()}
