"""Photometric augmentation of DINO: workers draw its parameters, the device applies them."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.transfer import without_wait

WIDTH = 10
"""Number of parameters of one crop, as listed by ``Photometric.draw``."""

# Possible orders of brightness, contrast, saturation and hue.
_ORDERS = list(itertools.permutations(range(4)))
# Rec. 601 luma, as in torchvision and PIL.
_LUMA = (0.2989, 0.587, 0.114)
# Number of values of which a few copies fit in a CPU's second-level cache.
_IN_CACHE = 2**17


@dataclass(frozen=True)
class Photometric:
    """Photometric options: probabilities and strengths of DINO's operations, in this order.

    ``jitter``: probability of colour jitter, of the strengths ``brightness``, ``contrast``,
    ``saturation`` (factors uniform in 1 - strength .. 1 + strength, at least 0) and ``hue`` (shift
    uniform in -strength .. strength turns), the four in random order; ``gray``: of grayscale;
    ``blur``: of a Gaussian blur of standard deviation uniform in ``blur_sigma`` (pixels);
    ``solarize``: of inverting all values of at least 128/255. Strengths are those of Caron et al.
    2021 (section 3.2), who follow Grill et al. 2020 (appendix B); the probabilities differ from
    crop to crop. The original blurs with PIL's repeated box filter, which continues the pixels of
    the edge; this is the Gaussian itself, and mirrors the image.

    Raises:
        UserError: a probability outside 0..1, a negative strength or sigma, a hue above 0.5.
    """

    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter", "gray", "blur", "solarize"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"probability of {name} is {value}; allowed: 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            check(value >= 0, f"strength of {name} is {value}; allowed: 0 and more")
        check(0 <= self.hue <= 0.5, f"strength of hue is {self.hue}; allowed: 0 to 0.5 turns")
        least, most = self.blur_sigma
        check(
            0 < least <= most,
            f"blur sigma is from {least} to {most} pixels; allowed: above 0, the smaller first",
        )

    def draw(self, rng: random.Random) -> list[float]:
        """Draw the ``WIDTH`` parameters of one crop.

        Factors of brightness, contrast, saturation (1: none); hue shift in turns (0: none); how
        many places after hue each of the three comes (negative: before); grayscale (1 or 0); sigma
        of the blur in pixels (0: none); solarise (1 or 0). The number of draws from the generator
        does not depend on the options.
        """
        jitter = rng.random() < self.jitter
        place = _ORDERS[int(rng.random() * len(_ORDERS))]
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
        hue = rng.uniform(-self.hue, self.hue)
        gray, blur = rng.random() < self.gray, rng.random() < self.blur
        sigma = rng.uniform(*self.blur_sigma)
        solarize = rng.random() < self.solarize
        colour = [*factors, hue] if jitter else [1.0, 1.0, 1.0, 0.0]
        places = [float(p - place[3]) for p in place[:3]]
        return [*colour, *places, float(gray), sigma if blur else 0.0, float(solarize)]


def left_out(spec: Photometric, channels: int, bounded: bool) -> list[str]:
    """Operations in ``spec`` that are impossible for this number of channels.

    Colour needs three channels; solarise needs a known range (``bounded``: 8-bit images).
    """
    colour = {
        "saturation": spec.jitter * spec.saturation,
        "hue": spec.jitter * spec.hue,
        "grayscale": spec.gray,
    }
    names = [name for name, wanted in colour.items() if wanted and channels != 3]
    return names + (["solarise"] if spec.solarize and not bounded else [])


def photometric(
    images: Float[Tensor, "b c h w"], parameters: Float[Tensor, "b p"], bounded: bool
) -> Float[Tensor, "b c h w"]:
    """Apply the drawn operations to images: jitter, grayscale, blur, solarise.

    ``images``: values in 0..1 if ``bounded``, which keeps them there (to rounding), else of any
    range (then there is no solarise); three channels are RGB, any other number has neither
    saturation, hue nor grayscale, and contrast about each channel's own mean. The tensor may be
    overwritten. ``parameters``: a row of ``Photometric.draw`` for each image, on the images' device
    or the CPU, by which only images that an operation is drawn for are computed. Operations are
    defined as those of torchvision on float images. There is no host synchronization.
    """
    rgb = images.shape[1] == 3
    away = 1 - parameters[:, :3]
    if not rgb:
        away = F.pad(away[:, :2], (0, 1))
    hue, places = parameters[:, 3], parameters[:, 4:7]
    gray, sigma, solarize = parameters[:, 7:].unbind(1)
    for place in range(-3, 4):
        if place:
            images = _mix_some(images, torch.where(places == place, away, 0), bounded)
        elif rgb:
            images = change_where(hue != 0, images, _shift_hue, hue)
    if rgb:
        images = _mix_some(images, F.pad(gray[:, None], (2, 0)), bounded)
    images = change_where(sigma > 0, images, _blur, sigma)
    return change_where(solarize > 0, images, _solarize) if bounded else images


def change_where(
    mask: Bool[Tensor, " b"],
    images: Float[Tensor, "b c h w"],
    change: Callable[..., Tensor],
    *per_sample: Tensor,
) -> Float[Tensor, "b c h w"]:
    """Apply ``change`` to the masked images; it takes their rows of ``per_sample``.

    Where the host has the mask, nothing else is computed, wherever the images are.
    """
    way = _subset if mask.device.type == "cpu" else _masked
    return way(mask, images, change, *per_sample)


def _masked(
    mask: Tensor, images: Tensor, change: Callable[..., Tensor], *per_sample: Tensor
) -> Tensor:
    """Change all images and select the masked ones: needs no host synchronization."""
    return torch.where(mask[:, None, None, None], change(images, *per_sample), images)


def _subset(
    mask: Tensor, images: Tensor, change: Callable[..., Tensor], *per_sample: Tensor
) -> Tensor:
    """Change only the masked images, in place; on a CPU in chunks that fit into its cache."""
    rows, device = masked_rows(mask), images.device
    on_cpu = device.type == "cpu"
    if not len(rows):
        return images
    if len(rows) == len(images) and not on_cpu:
        return change(images, *(without_wait(p, device) for p in per_sample))
    at_once = max(1, _IN_CACHE // images[0].numel()) if on_cpu else len(rows)
    for some in rows.split(at_once):
        there = without_wait(some, device)
        own = (without_wait(p[some], device) for p in per_sample)
        # Several times faster than images[some], both reading and writing.
        images.index_copy_(0, there, change(images.index_select(0, there), *own))
    return images


def masked_rows(mask: Bool[Tensor, " b"]) -> Int64[Tensor, " k"]:
    """Rows of a mask that the host has."""
    return mask.nonzero().flatten()


def _mix_some(
    images: Float[Tensor, "b c h w"], weights: Float[Tensor, "b 3"], bounded: bool
) -> Float[Tensor, "b c h w"]:
    """Mix the images that have any non-zero weight."""
    return change_where((weights != 0).any(1), images, lambda x, w: _mix(x, w, bounded), weights)


def _mix(
    images: Float[Tensor, "b c h w"], weights: Float[Tensor, "b 3"], bounded: bool
) -> Float[Tensor, "b c h w"]:
    """Mix each image with black, its mean, and its gray version, by these weights.

    These are brightness, contrast and saturation, each with the weight 1 - factor; and grayscale.
    """
    keep = 1 - weights.sum(1)[:, None, None, None]
    _, to_mean, to_gray = weights[:, :, None, None, None].unbind(1)
    if images.shape[1] == 3:
        gray = images[:, :1] * _LUMA[0]
        gray.add_(images[:, 1:2], alpha=_LUMA[1]).add_(images[:, 2:], alpha=_LUMA[2])
        other = torch.addcmul(gray.mean((2, 3), keepdim=True) * to_mean, gray, to_gray)
    else:
        other = images.mean((2, 3), keepdim=True) * to_mean
    mixed = torch.addcmul(other, images, keep)
    return mixed.clamp_(0, 1) if bounded else mixed


def _shift_hue(
    images: Float[Tensor, "b 3 h w"], turns: Float[Tensor, " b"]
) -> Float[Tensor, "b 3 h w"]:
    """Shift the hue by ``turns``, keeping value and saturation (of HSV).

    With M the largest and m the smallest of a pixel's r, g, b, its hue H in sixths of a turn has
    |H| = (M - r + g + b - 2 m) / (M - m), from 0 at red to 3 opposite, and the sign of g - b. A
    channel is M - (M - m) * clamp(2 - |H - F|, 0, 1), where F, the hue farthest from the channel's
    own, is 3, 5, 7 for r, g, b, and differences are taken around the circle. (Equal to the usual
    distinction of cases, which is slower on CPUs.)
    """
    r, g, b = images.split(1, 1)
    most, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = most - least
    hue = (most - r).add_(g).add_(b).sub_(least, alpha=2)
    # Gray has a span of zero, which will multiply its arbitrary hue.
    hue.div_(span.clamp(min=torch.finfo(span.dtype).tiny)).copysign_(g - b)
    hue.add_(turns[:, None, None, None] * 6)
    farthest = torch.arange(3, 8, 2, device=images.device, dtype=images.dtype)
    apart = hue - farthest.view(1, 3, 1, 1)
    apart.sub_((apart * (1 / 6)).round_(), alpha=6).abs_()
    return torch.addcmul(most, span, apart.neg_().add_(2).clamp_(0, 1), value=-1)


def _blur(images: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Gaussian blur of ``sigma`` pixels, with reflection padding."""
    height, width = images.shape[2:]
    down = _blur_matrix(height, sigma)
    right = down if width == height else _blur_matrix(width, sigma)
    rows = images.flatten(1, 2) @ right.transpose(1, 2)
    return down[:, None] @ rows.view_as(images)


def _blur_matrix(n: int, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b {n} {n}"]:
    """Blur matrix for a line of ``n`` pixels; the kernel reaches n - 1 pixels each way."""
    apart = torch.arange(1 - n, n, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (apart / sigma.clamp(min=0.01)[:, None]) ** 2)
    # Negligible in float32, and denormal numbers would slow down the products on CPUs.
    kernel = F.threshold(kernel, 1e-12, 0.0)
    kernel = kernel / kernel.sum(1, keepdim=True)
    # Row k has the kernel from its k-th weight on; it is centred on pixel n - 1 - k.
    shifted = F.pad(kernel, (0, n - 1)).unfold(1, n, 1)
    matrix = shifted[:, :n].flip(1)
    # Beyond either end the line is reflected, without repeating the last pixel.
    before = shifted[:, n - 1 :]
    matrix[:, :, 1:] += before[:, :, 1:]
    matrix[:, :, :-1] += before.flip(1, 2)[:, :, :-1]
    return matrix


def _solarize(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Solarise: invert values of at least 128/255."""
    # On CPUs torch.where is several times slower.
    return torch.addcmul(images, images.clone().ge_(128 / 255), 1 - 2 * images)
