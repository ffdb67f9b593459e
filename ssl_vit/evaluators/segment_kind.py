"""Segmentation as a kind of dense fine-tuning: the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.config import from_json
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.task import at_least_fp32
from ssl_vit.data.base import check_classes
from ssl_vit.data.batch import stack
from ssl_vit.data.missing import resized
from ssl_vit.data.pairs import CLASSES_FILE, Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.dense_kinds import Kind, Ready, Scored, of_all
from ssl_vit.evaluators.dense_tune import DenseNetwork
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.options import SegmentHeadOptions, SegmentTuneConfig
from ssl_vit.evaluators.patch_heads import upsampled
from ssl_vit.evaluators.score import LAST
from ssl_vit.evaluators.segment import count_mask_classes, segment_score
from ssl_vit.evaluators.segment_heads import HeadModules, segmentation_head
from ssl_vit.evaluators.segment_scores import guessed, known, score_masks, scored_sizes
from ssl_vit.evaluators.tokens import TokenExtractor, joined
from ssl_vit.pictures.boundaries import boundaries_panel


class SegmentKind(Kind):
    """Segmentation: the class of each pixel."""

    name, spread, unknown, ratio = "segment", False, -1, (3 / 4, 4 / 3)
    pairs = Pairs
    names: tuple[str, ...]

    def __init__(self, options: SegmentHeadOptions, names: tuple[str, ...]) -> None:
        """``names``: of the classes."""
        self.options, self.maps, self.names = options, options.blocks, names

    @classmethod
    def of(cls, options: SegmentHeadOptions, train: Pairs, val: Pairs) -> SegmentKind:
        """Count the classes: those that are named or, in all training masks, those that occur.

        Raises:
            UserError: pairs that do not fit together, or fewer than two classes.
        """
        check_classes(train, val)
        names = train.classes or val.classes or ()
        if not names:
            present = sorted({value for values in of_all(train, _values) for value in values})
            count = count_mask_classes(present, train.spec, 0, options.ignore)
            names = tuple(map(str, range(count)))
        seen = {value for values in of_all(val, _values) for value in values} - {options.ignore}
        highest, most = max(seen, default=0), len(names) - 1
        check(
            highest <= most,
            f"a mask of {val.spec} has class {highest}, those of training go up to {most}; name "
            f"all classes in {CLASSES_FILE} beside the masks",
        )
        return cls(options, names)

    @classmethod
    def remembered(cls, about: dict[str, Any]) -> SegmentKind:
        names = tuple(map(str, about["classes"]))
        return cls(from_json(SegmentTuneConfig, about["options"]), names)

    def learned(self) -> dict[str, Any]:
        return {"classes": self.names}

    @torch.inference_mode()
    def predict(
        self, network: DenseNetwork, images: Sequence[Tensor], size: tuple[int, int], ready: Ready
    ) -> Iterator[Shaped[Tensor, "h w"]]:
        """Class of each pixel, int64."""
        sizes = scored_sizes(size, self.options)
        crops = [ready(stack([resized(i, s) for i in images])) for s in sizes]
        shapes = [(i.shape[1], i.shape[2]) for i in images]
        for guess in guessed(crops, shapes, size, self.options, lambda x: network(x).float()):
            yield guess.cpu()

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
        score = segment_score(overlap, self.names, "pixels' classes", LAST, seed, {})
        count = {"val": len(overlap.images), "val_unreadable": scored.bad}
        picture = boundaries_panel(pairs, view, scored.samples)
        return score, count, {"boundaries": picture}

    def about(self) -> str:
        return f"{self.options.head}, {len(self.names)} classes of pixels"


def _values(mask: Tensor) -> list[int]:
    values: list[int] = mask.unique().tolist()
    return values
