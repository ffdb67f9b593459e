"""Kinds of dense fine-tuning: what is learned of each pixel, by which head, loss and score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.task import at_least_fp32
from ssl_vit.data.base import check_classes
from ssl_vit.data.decode import BadImage
from ssl_vit.data.depths import DepthPairs
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.pairs import CLASSES_FILE, Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.dense_tune import DenseNetwork
from ssl_vit.evaluators.depth_heads import HEADS, MAPS, DepthHead, depth_loss
from ssl_vit.evaluators.depth_options import DepthHeadOptions
from ssl_vit.evaluators.depth_scores import depth_score, draw, score_depths, valid_depth
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.map_material import MapExtractor
from ssl_vit.evaluators.options import SegmentHeadOptions
from ssl_vit.evaluators.patch_heads import upsampled
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.segment import count_mask_classes, segment_score
from ssl_vit.evaluators.segment_heads import HeadModules, segmentation_head
from ssl_vit.evaluators.segment_scores import known, score_masks
from ssl_vit.evaluators.tokens import TokenExtractor, joined
from ssl_vit.pictures.boundaries import boundaries_panel

Scored = tuple[Score, dict[str, int], dict[str, np.ndarray]]
"""Score, counts for the card, and pictures by name."""
_SETTING = "last weights"


class Kind(ABC):
    """Kind of dense fine-tuning.

    Attributes:
        maps: number of feature maps that the head takes; ``spread``: over the depth.
        unknown: target of pixels of which nothing is known.
        ratio: of a crop's sides, as factors of the image's own.
    """

    name: ClassVar[str]
    spread: ClassVar[bool]
    unknown: ClassVar[float | int]
    ratio: ClassVar[tuple[float, float]]
    maps: int

    @abstractmethod
    def head(self, widths: tuple[int, ...]) -> nn.Module:
        """Head for maps of these widths, with random weights."""

    def together(self, maps: list[Tensor]) -> Any:
        """What the head takes, of the maps."""
        return maps

    @abstractmethod
    def prepare(self, values: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "h w"]:
        """Targets of a crop, of its part of a map."""

    @abstractmethod
    def loss(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Scalars, among them ``loss``, of what the head makes of a batch (b, ...) and the targets
        (b, H, W)."""

    @abstractmethod
    def score(
        self, network: DenseNetwork, pairs: Pairs, view: View, machine: Machine, seed: int
    ) -> Scored:
        """Score of a network in evaluation mode on all images."""

    @abstractmethod
    def about(self) -> str:
        """Head, and what it predicts, in words."""


class SegmentKind(Kind):
    """Segmentation: the class of each pixel."""

    name, spread, unknown, ratio = "segment", False, -1, (3 / 4, 4 / 3)

    def __init__(self, options: SegmentHeadOptions, train: Pairs, val: Pairs) -> None:
        """Count the classes: those that are named or, in all training masks, those that occur.

        Raises:
            UserError: pairs that do not fit together, or fewer than two classes.
        """
        check_classes(train, val)
        self.options, self.maps = options, options.blocks
        self.names = train.classes or val.classes or ()
        if not self.names:
            present = sorted({value for values in _all(train, _values) for value in values})
            count = count_mask_classes(present, train.spec, 0, options.ignore)
            self.names = tuple(map(str, range(count)))
        seen = {value for values in _all(val, _values) for value in values} - {options.ignore}
        highest, most = max(seen, default=0), len(self.names) - 1
        check(
            highest <= most,
            f"a mask of {val.spec} has class {highest}, those of training go up to {most}; name "
            f"all classes in {CLASSES_FILE} beside the masks",
        )

    def head(self, widths: tuple[int, ...]) -> nn.Module:
        return segmentation_head(self.options.head, sum(widths), len(self.names))

    def together(self, maps: list[Tensor]) -> Float[Tensor, "b d h w"]:
        return joined(maps)

    def prepare(self, values: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "h w"]:
        target = known(values.int(), self.options.ignore)
        highest, most = int(target.max()), len(self.names)
        if highest >= most:
            raise UserError(
                f"a training mask has class {highest}; the classes are 0 to {most - 1}, as "
                f"{CLASSES_FILE} or the masks have them: correct either, or --segment.ignore"
            )
        return target

    def loss(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, mean over each image's pixels that have a class, and over
        images: of one without such pixels 0, so that a batch may be cut into parts."""
        logits = upsampled(at_least_fp32(made), (target.shape[1], target.shape[2]))
        target, there = target.long(), target >= 0
        count = there.sum((1, 2)).clamp(min=1)
        each = F.cross_entropy(logits, target, ignore_index=-1, reduction="none").sum((1, 2))
        right = ((logits.argmax(1) == target) & there).sum((1, 2))
        return {"loss": (each / count).mean(), "pixel_accuracy": (right / count).mean()}

    def score(
        self, network: DenseNetwork, pairs: Pairs, view: View, machine: Machine, seed: int
    ) -> Scored:
        maps, width = network.maps, sum(network.maps.widths)
        ones = torch.ones(width, device=machine.device)
        heads = HeadModules(0 * ones, ones, (network.head,), len(self.names))
        grid = (view.size[0] // maps.strides[0], view.size[1] // maps.strides[0])
        extractor = TokenExtractor("", lambda images: joined(maps(images)), grid, view, machine)
        scored = score_masks(heads, extractor, pairs, self.options)
        overlap = scored.overlap
        score = segment_score(overlap, self.names, "pixels' classes", _SETTING, seed, {})
        count = {"val": len(overlap.images), "val_unreadable": scored.bad}
        picture = boundaries_panel(pairs, view, scored.samples)
        return score, count, {"boundaries": picture}

    def about(self) -> str:
        return f"{self.options.head}, {len(self.names)} classes of pixels"


class DepthKind(Kind):
    """Depth: the distance of each pixel."""

    name, spread, unknown, ratio = "depth", True, 0.0, (1.0, 1.0)

    def __init__(self, options: DepthHeadOptions, train: DepthPairs, val: DepthPairs) -> None:
        """Find the greatest depth: as given, or that of all training maps, in which
        ``options.scale`` is already.

        Raises:
            UserError: no training map has a depth in the range.
        """
        self.options, self.maps = options, MAPS[options.head]
        self.most = options.max_depth or max(_all(train, lambda depth: float(depth.max())))
        found = self.most > options.min_depth
        least = f"{options.min_depth:g}, in the unit of --depth.scale"
        check(found, f"{train.spec}: no pixel of its depth maps is deeper than {least}")

    def head(self, widths: tuple[int, ...]) -> nn.Module:
        return HEADS[self.options.head](widths, self.options.min_depth, self.most)

    def prepare(self, values: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "h w"]:
        return valid_depth(values, self.options, self.most)

    def loss(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``depth_loss`` at the resolution of the predictions, and the mean relative error."""
        size = (made.shape[1], made.shape[2])
        coarse = torch.stack([nearest_mask(depth, size) for depth in target])
        depth, there = at_least_fp32(made), coarse > 0
        error = torch.where(there, (depth - coarse).abs() / coarse.clamp(min=1e-6), 0.0)
        relative = error.sum() / there.sum().clamp(min=1)
        return {"loss": depth_loss(depth, coarse), "abs_rel": relative.detach()}

    def score(
        self, network: DenseNetwork, pairs: Pairs, view: View, machine: Machine, seed: int
    ) -> Scored:
        extractor, head = MapExtractor(network.maps, view, machine), network.head
        assert isinstance(head, DepthHead)
        assert isinstance(pairs, DepthPairs)
        errors, count = score_depths(head, extractor, pairs, self.options, self.most)
        score = depth_score(errors, "pixels' depths", _SETTING, seed, {})
        picture = draw(head, extractor, pairs, self.options, self.most)
        count = {"val": len(errors.images)} | count
        return score, count, {} if picture is None else {"depths": picture}

    def about(self) -> str:
        least, most = self.options.min_depth, self.most
        return f"{self.options.head}, depths from {least:g} to {most:g}"


def _all(pairs: Pairs, of: Callable[[Tensor], Any]) -> Iterator[Any]:
    """What ``of`` makes of every readable map, by threads.

    Raises:
        UserError: none can be read.
    """

    def read(i: int) -> Any:
        try:
            return of(pairs.target(i))
        except BadImage:
            return None

    with ThreadPoolExecutor() as pool:
        found = [made for made in pool.map(read, range(len(pairs))) if made is not None]
    check(bool(found), f"no map beside the images of {pairs.spec} can be read")
    return iter(found)


def _values(mask: Tensor) -> list[int]:
    values: list[int] = mask.unique().tolist()
    return values
