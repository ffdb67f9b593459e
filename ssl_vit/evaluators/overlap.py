"""Segmentation metrics: intersection over union, Dice, accuracy, and a bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.common.seeds import fold

_DRAWS = 1000


def confusion_matrix(
    truth: Int64[Tensor, " p"], guess: Int64[Tensor, " p"], classes: int
) -> Int64[Tensor, "c c"]:
    """Confusion matrix: pixels by (true, predicted) class, without classes out of range."""
    valid = (truth >= 0) & (truth < classes)
    pairs = truth[valid] * classes + guess[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def counts(table: Int64[Tensor, "c c"]) -> Int64[Tensor, "3 c"]:
    """Pixel counts of each class: correct, true, and predicted."""
    return torch.stack([table.diagonal(), table.sum(1), table.sum(0)])


def iou(pixels: Float[Tensor, "*draws 3 c"]) -> Float[Tensor, "*draws c"]:
    """Intersection over union by class, from ``counts``; NaN where neither true nor predicted."""
    both, truth, guess = pixels.unbind(-2)
    return both / (truth + guess - both)


def dice(pixels: Float[Tensor, "*draws 3 c"]) -> Float[Tensor, "*draws c"]:
    """Dice coefficient by class from ``counts``; NaN where neither true nor predicted."""
    both, truth, guess = pixels.unbind(-2)
    return 2 * both / (truth + guess)


@dataclass(frozen=True)
class Overlap:
    """Overlap of masks: ``table`` (C, C) of pixels, ``images`` (n, 3, C) counts by image, and their
    ``groups`` (n,), where they are known."""

    table: Int64[Tensor, "c c"]
    images: Int64[Tensor, "n 3 c"]
    groups: Int64[Tensor, " n"] | None = None

    @property
    def by_class(self) -> Float[Tensor, " c"]:
        """Intersection over union by class, over all images' pixels, 0 to 1 or NaN."""
        return iou(counts(self.table).double())

    @property
    def dice_by_class(self) -> Float[Tensor, " c"]:
        """Dice by class, over all images' pixels, 0 to 1 or NaN."""
        return dice(counts(self.table).double())

    @property
    def dice_by_image(self) -> Float[Tensor, " c"]:
        """Dice by class of each image, or group, alone: mean over those with the class, true or
        predicted, as is usual of medical images; NaN where none has it."""
        return dice(self._units().unflatten(1, (3, -1))).nanmean(0)

    def metrics(self) -> dict[str, float]:
        """Metrics in %: mean over classes of IoU, of Dice and of accuracy, and pixel accuracy.

        Mean IoU and Dice exclude classes that are neither true nor predicted anywhere, class
        accuracy those without true pixels.
        """
        both, truth, _ = counts(self.table).double()
        return {
            "miou": 100 * float(self.by_class.nanmean()),
            "dice": 100 * float(self.dice_by_class.nanmean()),
            "pixel_accuracy": 100 * float(both.sum() / truth.sum()),
            "class_accuracy": 100 * float((both / truth).nanmean()),
        }

    def interval(self, seed: int) -> tuple[float, float]:
        """95% interval of the mean intersection over union, in %.

        A percentile bootstrap over images (Efron 1979): pixels of one image are not independent,
        nor are images of one group.
        """
        generator = torch.Generator().manual_seed(fold(seed))
        flat = self._units()
        n = len(flat)
        found = []
        for _ in range(_DRAWS):
            drawn = torch.randint(n, (n,), generator=generator)
            times = torch.bincount(drawn, minlength=n).double()
            found.append(iou((times @ flat).view(3, -1)).nanmean())
        ends = torch.quantile(torch.stack(found), torch.tensor([0.025, 0.975], dtype=torch.double))
        return 100 * float(ends[0]), 100 * float(ends[1])

    def _units(self) -> Float[Tensor, "n flat"]:
        """Counts of each image, or of each group where they are known, with 3 C columns."""
        flat = self.images.flatten(1).double()
        if self.groups is None:
            return flat
        group = self.groups.unique(return_inverse=True)[1]
        return flat.new_zeros(int(group.max()) + 1, flat.shape[1]).index_add(0, group, flat)
