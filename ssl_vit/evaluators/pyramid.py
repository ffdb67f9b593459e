"""Feature pyramids of an encoder: ViTDet's simple pyramid, or an FPN on a network's own stages."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from ssl_vit.common.errors import UserError, check
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.maps import FeatureMaps, freeze_unused, with_drop_path
from ssl_vit.evaluators.start import Start
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.windows import use_windows

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


class PyramidBackbone(nn.Module):
    """Backbone of a detector, as torchvision wants it: images to levels by name, ``0`` finest.

    ``pool`` is of the last level, every second pixel, for proposals alone. A ``frozen`` body stays
    in evaluation mode and gets no gradient; so do BatchNorm layers of any other.

    Attributes:
        strides: of the levels in pixels, that of ``pool`` included.
    """

    def __init__(
        self, body: FeatureMaps, neck: SimplePyramid | StagePyramid, channels: int, frozen: bool
    ) -> None:
        super().__init__()
        self.body, self.neck, self.frozen = body, neck, frozen
        self.out_channels = channels
        self.strides: tuple[float, ...] = (*neck.strides, 2 * neck.strides[-1])
        self.body.requires_grad_(not frozen)
        for part in self.norms():
            part.requires_grad_(False)

    def norms(self) -> list[nn.Module]:
        """BatchNorm layers, whose statistics are those of pretraining."""
        return [p for p in self.body.modules() if isinstance(p, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Training mode of what is trained."""
        super().train(mode)
        for part in [self.body] if self.frozen else self.norms():
            part.eval()
        return self

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Levels by name."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.body(images)
        levels = self.neck(maps)
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
    given = start.identity["given"]
    if isinstance(start.module, Encoder):
        encoder = with_drop_path(start.module, 0.0 if frozen else drop_path)
        patch = encoder.patch_size
        check_patches("--detect.image-size", size, patch)
        if windows:
            grid = size[0] // patch, size[1] // patch
            use_windows(encoder, grid, windows, global_blocks)
        body = FeatureMaps(encoder)
    else:
        check(not windows, f"--detect.windows is {windows}; it is for plain ViTs, not {given}")
        body = _of_network(start, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        neck = _neck(body, channels)
    made = PyramidBackbone(body, neck, channels, frozen)
    _check_levels(made, start.channels, size)
    if not frozen:
        freeze_unused(body, start.channels, size)
    return made


def _neck(body: FeatureMaps, channels: int) -> SimplePyramid | StagePyramid:
    """Pyramid on these maps, with random weights."""
    if len(body.strides) > 1:
        return StagePyramid(body.widths, body.strides, channels)
    return SimplePyramid(body.widths[0], body.strides[0], channels)


def _of_network(start: Start, size: tuple[int, int]) -> FeatureMaps:
    """Maps of a network of timm that is no plain ViT: of its last stages or, where there are too
    few, of its last one alone.

    Raises:
        UserError: it gives none, or does not take the size.
    """
    network, given = copy.deepcopy(start.module), start.identity["given"]
    set_image_size(network, size, "--detect.image-size", given)
    try:
        last = FeatureMaps(network)
    except UserError as error:
        raise UserError(f"--encoder is {given!r}: {error}") from None
    try:
        found = FeatureMaps(network, LEVELS)
    except UserError:
        return last
    return found if len(set(found.strides)) == LEVELS else last


def set_image_size(network: Any, size: tuple[int, int], option: str, given: str) -> None:
    """Set the image size of a network of timm that is built for one; windows of attention stay as
    they are, where the network says them.

    Raises:
        UserError: the network, ``given`` by the user, does not take the size that ``option`` has.
    """
    if not hasattr(network, "set_input_size"):
        return
    own = [getattr(part, "window_size", None) for part in network.modules()]
    windows = next((w for w in own if isinstance(w, tuple) and len(w) == 2 and min(w) > 0), None)
    try:
        try:
            network.set_input_size(img_size=size, window_size=windows)
        except TypeError:
            network.set_input_size(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        shown, why = "x".join(map(str, size)), " ".join(str(error).split())[:120]
        raise UserError(f"{option} is {shown}; {given} does not take it: {why}") from None


def _check_levels(backbone: PyramidBackbone, channels: int, size: tuple[int, int]) -> None:
    """Check that images of this size fill a pixel of each level.

    Below the coarsest stride some networks, which round up, still do; so it is tried, on the meta
    device, which computes nothing.

    Raises:
        UserError: they do not.
    """
    coarsest = backbone.neck.strides[-1]
    if min(size) >= coarsest:
        return
    blank = copy.deepcopy(backbone).to("meta").eval()
    try:
        with torch.no_grad():
            blank(torch.zeros(1, channels, *size, device="meta"))
    except RuntimeError:
        shown = "x".join(map(str, size))
        raise UserError(
            f"--detect.image-size is {shown}; both must be {coarsest:g} or more, the stride of the "
            "coarsest level"
        ) from None
