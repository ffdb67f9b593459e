"""Levels: brightness, contrast, dropped channels and noise, for any number of channels and any kind
of number. Workers draw their parameters, the device applies them to normalised images."""

import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold_keys, uniform
from ssl_vit.data.photometric import change_where

LEVELS_WIDTH = 7
"""Number of parameters of one crop, as listed by ``Levels.draw``."""

# Of one key: what is drawn for each channel, and for each pixel.
_CHANNELS, _NOISE = 0, 1
_KEY_BITS = 24  # float32 holds such integers exactly
_AT_ONCE = 2**22  # values of noise


@dataclass(frozen=True)
class Levels:
    """Options of what is done to normalised images, of mean 0 and deviation 1 over the data set.

    Colour jitter scales values about 0, which is black in photographs and an accident in degrees or
    decibels; these operations are the same for the same images in other units.

    ``together``: probability that all channels of a crop have another contrast and brightness:
    times a factor uniform in 1 - ``gain`` .. 1 + ``gain`` about the data set's mean, and a summand
    uniform in -``shift`` .. ``shift`` deviations. ``each``: that every channel has its own.
    ``drop``: probability of each channel to become its mean; one stays, whichever. ``noise``: the
    standard deviation of Gaussian noise is uniform in 0 .. ``noise``.

    Raises:
        UserError: a probability outside 0..1, a gain above 1, a negative shift or noise.
    """

    together: float = 0.0
    each: float = 0.0
    drop: float = 0.0
    noise: float = 0.0
    gain: float = 0.4
    shift: float = 0.5

    def __post_init__(self) -> None:
        for name in ("together", "each", "drop", "gain"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} of levels is {value}; allowed: 0 to 1")
        for name in ("noise", "shift"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"{name} of levels is {value}; allowed: 0 and more")

    @property
    def on(self) -> bool:
        """True if any of the operations is on."""
        return any((self.together, self.each, self.drop, self.noise))

    def draw(self, rng: random.Random) -> list[float]:
        """Draw the ``LEVELS_WIDTH`` parameters of one crop.

        Factor (1: none) and summand (0: none) of all channels; greatest distance from 1 and from 0
        of each channel's own (0: none); probability that a channel is dropped; deviation of the
        noise; and a key, an integer, from which the device draws the rest. The number of draws
        from the generator does not depend on the options.
        """
        together, each = rng.random() < self.together, rng.random() < self.each
        gain, shift = (
            rng.uniform(1 - self.gain, 1 + self.gain),
            rng.uniform(-self.shift, self.shift),
        )
        noise, key = rng.uniform(0.0, self.noise), rng.getrandbits(_KEY_BITS)
        own = [self.gain, self.shift] if each else [0.0, 0.0]
        return [*([gain, shift] if together else [1.0, 0.0]), *own, self.drop, noise, float(key)]


def levels(
    images: Float[Tensor, "b c h w"], parameters: Float[Tensor, "b p"]
) -> Float[Tensor, "b c h w"]:
    """Apply the drawn operations to normalised images: contrast and brightness, noise, dropping.

    The tensor may be overwritten. ``parameters``: a row of ``Levels.draw`` for each image, on the
    images' device or the CPU, by which only images that something is drawn for are computed. There
    is no host synchronization. Values are not held within any range.
    """
    gain, shift, noise = of_channels(parameters, images.shape[1])
    changed = ((gain != 1) | (shift != 0)).any(1)
    images = change_where(changed, images, _scale_and_shift, gain, shift)
    keys = fold_keys(parameters[:, 6].long(), _NOISE)
    return change_where((noise > 0).any(1), images, _add_noise, noise, keys)


def of_channels(
    parameters: Float[Tensor, "b p"], channels: int
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Factor, summand and noise of each channel, where ``parameters`` are; a dropped one has 0."""
    gain, shift, own_gain, own_shift, drop, noise = parameters[:, :6, None].unbind(1)
    keys = fold_keys(parameters[:, 6].long(), _CHANNELS)
    first, second, third = uniform(keys, 3 * channels).to(parameters.dtype).chunk(3, 1)
    # The largest stays, so that never all are dropped.
    kept = ((third >= drop) | (third == third.amax(1, keepdim=True))).to(parameters.dtype)
    gain = gain * (1 + own_gain * (2 * first - 1))
    shift = shift + own_shift * (2 * second - 1)
    return gain * kept, shift * kept, noise * kept


def _scale_and_shift(
    images: Float[Tensor, "b c h w"], gain: Float[Tensor, "b c"], shift: Float[Tensor, "b c"]
) -> Float[Tensor, "b c h w"]:
    return torch.addcmul(shift[:, :, None, None], images, gain[:, :, None, None])


def _add_noise(
    images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c"], keys: Int64[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Overwrites ``images``, some at a time: numbers take several times their memory."""
    values = images[0].numel()
    at_once = max(1, _AT_ONCE // values)
    parts = (x.split(at_once) for x in (images, noise, keys))
    for some, deviation, own in zip(*parts, strict=True):
        some.addcmul_(normal(own, values).view_as(some), deviation[:, :, None, None])
    return images


def normal(keys: Int64[Tensor, " b"], n: int) -> Float[Tensor, "b n"]:
    """Standard normal numbers, ``n`` for each key (Box and Muller 1958), to rounding the same on
    every device."""
    radius, angle = uniform(keys, 2 * -(-n // 2)).chunk(2, 1)
    radius = radius.neg().log1p_().mul_(-2).sqrt_()
    angle = angle * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]
