"""Feature pyramids of an encoder: ViTDet's simple pyramid, or an FPN on a network's own stages."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from ssl_vit.evaluators.detector_body import DetectorBody, body_of, checked
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.evaluators.start import Start

LEVELS = 4
"""Levels that objects are pooled from; proposals have one more, of half the last one's size."""
_FINEST = 4  # pixels: the stride of the first level


class SimplePyramid(nn.Module):
    """Simple feature pyramid (Li et al. 2022): levels at strides 4 to 32 from the last map alone.

    Of a map at stride 16: two transposed convolutions with LayerNorm and GELU between them, one,
    none, and max pooling; then a 1x1 and a 3x3 convolution to ``channels``, each with LayerNorm. Of
    another patch size the powers of 2 that come nearest to these strides.
    """

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        finest = round(math.log2(patch / _FINEST))
        factors = [finest - n for n in range(LEVELS)]
        self.strides = tuple(patch / 2.0**f for f in factors)
        self.levels = nn.ModuleList(_level(width, f, channels) for f in factors)

    def forward(self, maps: list[Float[Tensor, "b d h w"]]) -> list[Float[Tensor, "b c _ _"]]:
        """Levels of the last map, finest first."""
        return [level(maps[-1]) for level in self.levels]


def _level(width: int, factor: int, channels: int) -> nn.Sequential:
    """Level of 2^factor times the map's height and width."""
    layers: list[nn.Module] = []
    for n in range(factor):
        layers += [LayerNorm2d(width), nn.GELU()] * (n > 0)
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    layers += [nn.MaxPool2d(2)] * -factor
    for kernel in (1, 3):
        conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
        layers += [conv, LayerNorm2d(channels)]
        width = channels
    return nn.Sequential(*layers)


class StagePyramid(nn.Module):
    """Feature pyramid network (Lin et al. 2017), torchvision's, on maps of different strides."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.strides = tuple(map(float, strides))
        self.fpn = FeaturePyramidNetwork(list(widths), channels)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b c _ _"]]:
        """Levels of the maps, finest first."""
        found = self.fpn(OrderedDict((str(n), one) for n, one in enumerate(maps)))
        return list(found.values())


class PyramidBackbone(DetectorBody):
    """Backbone of a detector, as torchvision wants it: images to levels by name, ``0`` finest.

    ``pool`` is of the last level, every second pixel, for proposals alone.

    Attributes:
        strides: of the levels in pixels, that of ``pool`` included.
    """

    def __init__(
        self, body: FeatureMaps, neck: SimplePyramid | StagePyramid, channels: int, frozen: bool
    ) -> None:
        super().__init__(body, frozen)
        self.neck, self.out_channels = neck, channels
        self.strides = (*neck.strides, 2 * neck.strides[-1])
        self.coarsest = neck.strides[-1]

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Levels by name."""
        levels = self.neck(self.maps(images))
        named = OrderedDict((str(n), level) for n, level in enumerate(levels))
        named["pool"] = F.max_pool2d(levels[-1], 1, 2)
        return named


def backbone_of(
    start: Start,
    size: tuple[int, int],
    channels: int,
    windows: int = 0,
    global_blocks: int = 4,
    drop_path: float = 0.0,
    frozen: bool = False,
    seed: int = 0,
) -> PyramidBackbone:
    """Backbone of an encoder for images of ``size``; its weights are copied, those of the pyramid
    are random, a function of ``seed``.

    A plain ViT gets a simple pyramid, a network with stages of several strides an FPN.

    Raises:
        UserError: a size, windows or stochastic depth that the network does not allow; a size whose
            coarsest level would be empty; or it has no maps.
    """
    body = body_of(start, size, LEVELS, windows, global_blocks, drop_path, frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        neck = _neck(body, channels)
    made = PyramidBackbone(body, neck, channels, frozen)
    checked(made, start.channels, size)
    return made


def _neck(body: FeatureMaps, channels: int) -> SimplePyramid | StagePyramid:
    """Pyramid on these maps, with random weights."""
    if len(body.strides) > 1:
        return StagePyramid(body.widths, body.strides, channels)
    return SimplePyramid(body.widths[0], body.strides[0], channels)
