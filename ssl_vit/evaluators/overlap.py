"""How well predicted masks cover the true ones: intersection over union, with its uncertainty."""

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
    """Pixels by (true class, guessed class); true classes outside ``classes`` do not count."""
    judged = (truth >= 0) & (truth < classes)
    pairs = truth[judged] * classes + guess[judged]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def counts(table: Int64[Tensor, "c c"]) -> Int64[Tensor, "3 c"]:
    """Of each class the pixels that are it and were guessed so, that are it, that were guessed."""
    return torch.stack([table.diagonal(), table.sum(1), table.sum(0)])


def iou(pixels: Float[Tensor, "*draws 3 c"]) -> Float[Tensor, "*draws c"]:
    """Intersection over union by class, from ``counts``; NaN where neither truth nor guess is."""
    both, truth, guess = pixels.unbind(-2)
    return both / (truth + guess - both)


@dataclass(frozen=True)
class Overlap:
    """Judged masks: ``table`` (C, C) of pixels, and ``images`` (n, 3, C) counts of each image."""

    table: Int64[Tensor, "c c"]
    images: Int64[Tensor, "n 3 c"]

    @property
    def by_class(self) -> Float[Tensor, " c"]:
        """Intersection over union of all images' pixels together, 0 to 1 or NaN."""
        return iou(counts(self.table).double())

    def metrics(self) -> dict[str, float]:
        """Mean over classes of intersection over union and of accuracy, and pixel accuracy, in %.

        A class that is neither in the truth nor guessed has no part in the first, one that is not
        in the truth none in the second.
        """
        both, truth, _ = counts(self.table).double()
        return {
            "miou": 100 * float(self.by_class.nanmean()),
            "pixel_accuracy": 100 * float(both.sum() / truth.sum()),
            "class_accuracy": 100 * float((both / truth).nanmean()),
        }

    def interval(self, seed: int) -> tuple[float, float]:
        """Where 95% of the mean intersection over union lies when images are drawn anew, in %.

        A percentile bootstrap over images (Efron 1979): pixels of one image are not independent.
        """
        n = len(self.images)
        generator = torch.Generator().manual_seed(fold(seed))
        flat = self.images.flatten(1).double()
        found = []
        for _ in range(_DRAWS):
            drawn = torch.randint(n, (n,), generator=generator)
            times = torch.bincount(drawn, minlength=n).double()
            found.append(iou((times @ flat).view(3, -1)).nanmean())
        ends = torch.quantile(torch.stack(found), torch.tensor([0.025, 0.975], dtype=torch.double))
        return 100 * float(ends[0]), 100 * float(ends[1])
