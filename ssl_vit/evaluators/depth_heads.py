"""Depth heads on feature maps, frozen or trained, and their loss.

Both heads end in bins as those of DINOv2 (Oquab et al. 2023, section 7.4; AdaBins, Bhat et al.
2021, with bins that are not learned): 256 depths, evenly spaced over the range, of which each
place takes a weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.evaluators.patch_heads import upsampled

BINS = 256
CHANNELS = 64
_LEAST_WEIGHT = 0.1
# Predictions per place of the finest map, and side; and their largest number.
_FINE, _LARGEST = 4, 160 * 160
# Of the loss: weight of the squared mean, of the gradient term, and its scales.
_LAMBDA, _GRADIENT, _SCALES = 0.15, 0.5, (1, 2, 4, 8)
_EPSILON = 1e-8


def fine_grid(rows: int, columns: int) -> tuple[int, int]:
    """Grid of predictions from a finest map of this size: 4 x 4 per place, or 2 x 2 or 1 where
    that would be above 160 x 160 in all."""
    zoom = next((f for f in (_FINE, 2) if rows * columns * f * f <= _LARGEST), 1)
    return zoom * rows, zoom * columns


class Standardised(nn.Module):
    """Map standardised by fixed statistics of its channels; at first it is left as it is."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, 1, 1))
        self.register_buffer("std", torch.ones(width, 1, 1))

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return (x - self.mean) / self.std


class Bins(nn.Module):
    """Depth from logits of bins: the mean of the bins' depths, weighted by relu(logit) + 0.1.

    In single precision also where the head is trained in half: no matrix product.
    """

    depths: Tensor

    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.register_buffer("depths", torch.linspace(least, most, BINS))

    def forward(self, logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b h w"]:
        weights = logits.float().relu() + _LEAST_WEIGHT
        depth = (weights * self.depths[:, None, None]).sum(1) / weights.sum(1)
        return depth.clamp(self.depths[0], self.depths[-1])  # but for rounding it lies there


class DepthHead(nn.Module):
    """Depth head: maps (b, D, h, w), the finest first, to depth (b, rows, columns).

    rows and columns are ``fine_grid`` of the finest map. ``widths``: channels of the maps;
    ``least`` and ``most``: the range of depth.
    """

    def __init__(self, widths: Sequence[int], least: float, most: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(map(Standardised, widths))
        self.bins = Bins(least, most)

    def standardise(self, statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Standardise maps by these means and deviations of their channels, each (D,)."""
        for norm, (mean, std) in zip(self.norms, statistics, strict=True):
            assert isinstance(norm, Standardised)
            norm.mean.copy_(mean[:, None, None])
            norm.std.copy_(std[:, None, None])

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "b rows columns"]:
        raise NotImplementedError


class LinearDepth(DepthHead):
    """Linear depth head: logits of bins from each place, joined over maps by their sum.

    A linear layer on maps resized to one grid and concatenated is the sum of a layer on each,
    resized: interpolation is linear, too.
    """

    def __init__(self, widths: Sequence[int], least: float, most: float) -> None:
        super().__init__(widths, least, most)
        self.layers = nn.ModuleList(nn.Conv2d(width, BINS, 1) for width in widths)

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "b rows columns"]:
        size = fine_grid(maps[0].shape[2], maps[0].shape[3])
        made = [
            upsampled(layer(norm(x)), size)
            for layer, norm, x in zip(self.layers, self.norms, maps, strict=True)
        ]
        return self.bins(torch.stack(made).sum(0) if len(made) > 1 else made[0])


class Residual(nn.Module):
    """Residual unit: relu, convolution, relu, convolution, added to what goes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.second(self.first(x.relu()).relu())


class DptDepth(DepthHead):
    """Small DPT head (Ranftl et al. 2021): reassembles maps as a pyramid, and fuses it upwards.

    Level i of the pyramid is 2 ** i coarser than the predictions. Differs from DPT in: 64 channels
    instead of 256, resizing by interpolation and not by (transposed) convolutions, no readout of
    [CLS], and bins at the end.
    """

    def __init__(
        self, widths: Sequence[int], least: float, most: float, channels: int = CHANNELS
    ) -> None:
        super().__init__(widths, least, most)
        self.reduce = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        # The coarsest level is fused with nothing.
        self.enter = nn.ModuleList(Residual(channels) for _ in widths[:-1])
        self.leave = nn.ModuleList(
            nn.Sequential(Residual(channels), nn.Conv2d(channels, channels, 1)) for _ in widths
        )
        self.predict = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, BINS, 1)
        )

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "b rows columns"]:
        rows, columns = fine_grid(maps[0].shape[2], maps[0].shape[3])
        fused: Tensor | None = None
        for i in reversed(range(len(maps))):
            size = max(1, rows >> i), max(1, columns >> i)
            level = self.smooth[i](upsampled(self.reduce[i](self.norms[i](maps[i])), size))
            if fused is not None:
                level = upsampled(fused, size) + self.enter[i](level)
            fused = self.leave[i](level)
        return self.bins(self.predict(fused))


HEADS: dict[str, type[DepthHead]] = {
    "linear": LinearDepth,
    "linear4": LinearDepth,
    "dpt": DptDepth,
}
MAPS = {"linear": 1, "linear4": 4, "dpt": 4}
"""Number of maps that each of ``HEADS`` takes, spread over the encoder's depth."""


def depth_loss(depth: Float[Tensor, "b h w"], target: Float[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Loss of depths above 0, over pixels whose target is above 0: of each image, 0 where it has no
    such pixels, and the mean over images, so that a batch may be cut into parts.

    With g = log(depth) - log(target): sqrt(var(g) + 0.15 mean(g) ** 2), scale-invariant up to the
    second part (Eigen et al. 2014, as AdaBins has it), and 0.5 times the mean over pixels of
    |difference of g to the next pixel right and below|, summed over every 1st, 2nd, 4th and 8th
    pixel (Li and Snavely 2018).
    """
    known = target > 0
    g = torch.where(known, depth.log() - torch.where(known, target, 1.0).log(), 0.0)
    n = known.sum((1, 2)).clamp(min=1)
    mean = g.sum((1, 2)) / n
    spread = torch.where(known, g - mean[:, None, None], 0.0).square().sum((1, 2)) / n
    # Not at 0 itself, where the root has no slope.
    level = (spread + _LAMBDA * mean.square() + _EPSILON).sqrt()
    rough = torch.stack([_roughness(g[:, ::s, ::s], known[:, ::s, ::s]) for s in _SCALES]).sum(0)
    there = known.any(2).any(1)
    return (there * (level + _GRADIENT * rough)).mean()


def _roughness(g: Float[Tensor, "b h w"], known: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Sum of |differences| of neighbours that are both known, by the number of known pixels."""
    down = (g[:, 1:] - g[:, :-1]).abs() * (known[:, 1:] & known[:, :-1])
    right = (g[:, :, 1:] - g[:, :, :-1]).abs() * (known[:, :, 1:] & known[:, :, :-1])
    n = known.sum((1, 2)).clamp(min=1)
    return (down.sum((1, 2)) + right.sum((1, 2))) / n
