"""Depth metrics of Eigen et al. 2014 (section 4.2): of each image, and their means over images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ssl_vit.evaluators.intervals import mean_interval

_FACTOR = 1.25
# In percent, but for the last two.
NAMES = ("delta1", "delta2", "delta3", "abs_rel", "rmse", "log10")
_PERCENT = torch.tensor([100.0, 100.0, 100.0, 100.0, 1.0, 1.0], dtype=torch.float64)


def image_metrics(depth: Float[Tensor, " p"], truth: Float[Tensor, " p"]) -> Float64[Tensor, " 6"]:
    """Metrics of the valid pixels of one image, in the order of ``NAMES``.

    delta k: share of pixels with max(d / t, t / d) < 1.25 ** k; abs_rel: mean |d - t| / t; rmse:
    root of the mean (d - t) ** 2, in the unit of depth; log10: mean |log10 d - log10 t|. Shares and
    abs_rel in %.
    """
    d, t = depth.double(), truth.double()
    ratio = torch.maximum(d / t, t / d)
    shares = [(ratio < _FACTOR**k).double().mean() for k in (1, 2, 3)]
    errors = [
        ((d - t).abs() / t).mean(),
        (d - t).square().mean().sqrt(),
        (d.log10() - t.log10()).abs().mean(),
    ]
    return torch.stack(shares + errors).cpu() * _PERCENT


@dataclass(frozen=True)
class DepthErrors:
    """Metrics of images, (n, 6), and the images' ``groups``, where they are known."""

    images: Float64[Tensor, "n 6"]
    groups: Int64[Tensor, " n"] | None = None

    def metrics(self) -> dict[str, float]:
        """Mean over images of each metric, as AdaBins and BTS do; not over all pixels together."""
        return dict(zip(NAMES, self.images.mean(0).tolist(), strict=True))

    def interval(self, seed: int) -> tuple[float, float]:
        """95% interval of delta1, in %: a bootstrap over images, or over their groups."""
        groups = None if self.groups is None else self.groups.numpy()
        return mean_interval(self.images[:, 0].numpy(), seed, groups)
