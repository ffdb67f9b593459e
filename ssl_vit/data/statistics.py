"""Pixel statistics: what a sample of images shows of depth, channels, values and missing pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.data.base import Source, epoch_length
from ssl_vit.data.decode import BadImage, OtherChannels, decode
from ssl_vit.data.draws import Draws
from ssl_vit.data.missing import has_missing, valid_share
from ssl_vit.data.order import permute
from ssl_vit.data.raster import EmptyTile

MANY, FEW = 2000, 16
"""Images of a sample: to estimate statistics from, and for a look at what images they are."""
# Looked at for a readable one; and pixels of an image, of every so many rows and columns.
_TRIED, _PIXELS = 100, 1 << 16
# A float32 distinguishes no smaller deviation from a mean.
_CONSTANT = 1e-7
# Values normalised by statistics of their own have mean 0 and deviation 1. Photographs normalised
# by ImageNet's stay well inside of these, the darkest too.
_FAR, _WIDE, _NARROW = 5.0, 5.0, 0.1


@dataclass
class Survey:
    """A sample of a source's images: those looked at, in the scale in which a network gets them
    (8-bit ones in 0..1).

    ``rows``: for each readable image (3, C) float64: mean, variance and valid share of its
    channels; the first two are 0 where no pixel is valid. ``deep``: how many have more than 8
    bits; ``empty``: how many have no valid pixel. ``reasons``: why others are unreadable, by name;
    ``tiles``: how many of these are tiles without data. ``decoded``: bytes of all of them.
    """

    spec: str
    rows: list[Tensor] = field(default_factory=list)
    deep: int = 0
    empty: int = 0
    reasons: dict[str, BadImage] = field(default_factory=dict)
    tiles: int = 0
    decoded: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, image: Tensor) -> None:
        """Take in a decoded image (C, H, W)."""
        holes = has_missing(image)
        self.rows.append(torch.stack([_moments(channel, holes) for channel in image], 1))
        self.deep += not _eight_bit(image, holes)
        self.empty += holes and not valid_share(image)

    def check(self, owner: str = "", adapts: bool = False, held_out: str = "") -> None:
        """Check that some image is readable.

        Args:
            owner: the option that fixes the channels, if that is not --data.channels.
            adapts: whether it can be given images of other channels by that.
            held_out: of images that were held out, not given: how others are chosen.

        Raises:
            UserError: none is; where all have other channels, it names the option to give.
        """
        if self.rows:
            return
        others = [error for error in self.reasons.values() if isinstance(error, OtherChannels)]
        if not others or len(others) < len(self.reasons):
            name, error = next(iter(self.reasons.items()))
            what = f"{held_out and 'held-out '}images of {self.spec}"
            remedy = f"; {held_out}" if held_out else ""
            tried = f"none of {len(self.reasons)} {what} can be read"
            raise UserError(f"{tried}, the first is {name}: {error}{remedy}")
        has = " or ".join(map(str, sorted({error.has for error in others})))
        asked = f"--data.channels is {others[0].asked}: give --data.channels {others[0].has}"
        fewer = f"choose {others[0].asked} by --data.bands"
        many = others[0].has > others[0].asked
        asked += f", or {fewer}" if many else ""
        if owner:
            asked = f"{owner} takes images of {others[0].asked}"
            if adapts:
                asked += f": give --data.channels {others[0].has} to adapt it"
            asked += f"{', or' if adapts else ':'} {fewer}" if many else ""
        some = "channel" if has == "1" else "channels"
        raise UserError(f"the images of {self.spec} have {has} {some}{others[0].more}; {asked}")

    @property
    def constant(self) -> list[float]:
        """The value of each image that has the same one everywhere, of those with data."""
        rows = torch.stack(self.rows)
        flat = (rows[:, 1] == 0).all(1) & (rows[:, 2] > 0).all(1)
        flat &= (rows[:, 0] == rows[:, 0, :1]).all(1)
        return rows[flat, 0, 0].tolist()

    @property
    def missing(self) -> float:
        """Share of all values that are missing, images weighing equally."""
        return 1 - float(torch.stack(self.rows)[:, 2].mean())

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and valid share (C,) of each channel, float64.

        An image weighs as the share of its pixels that are valid, independent of its size; where no
        pixel of a channel is, its mean and deviation are 0.
        """
        means, variances, weights = torch.stack(self.rows).unbind(1)
        total = weights.sum(0).clamp(min=1e-12)
        mean = (means * weights).sum(0) / total
        # Within images and between them: no difference of large squares.
        variance = ((variances + (means - mean).square()) * weights).sum(0) / total
        return mean, variance.sqrt(), weights.mean(0)

    def misfit(self, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
        """Misfit of these images to a normalisation, with numbers of the worst channel; empty if
        they fit."""
        own, spread, valid = self.moments()
        by, scale = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        at, wide = (own - by) / scale, spread / scale
        odd = torch.maximum((at.abs() / _FAR), torch.maximum(wide / _WIDE, _NARROW / wide))
        # A constant channel, or one without data, gives no reason to.
        odd = torch.where((valid > 0) & ~_constant(own, spread), odd, 0)
        worst = int(odd.argmax())
        if odd[worst] <= 1:
            return ""
        channel = f" in channel {worst} (the first is 0)" if len(mean) > 1 else ""
        return (
            f"have mean {own[worst]:.4g} and deviation {spread[worst]:.4g}{channel}, but are "
            f"normalised by mean {mean[worst]:.4g} and deviation {std[worst]:.4g}: the encoder is "
            f"given values around {_short(at[worst])} with deviation {_short(wide[worst])}, where "
            "0 and 1 are usual"
        )


def survey(source: Source, channels: int, seed: int, count: int) -> Survey:
    """Survey of ``count`` random images of a source, by the seed; of many, every pixel counts. Of
    mixed sources they are drawn as in an epoch.

    Unreadable images are left out; while none of a few is readable, more are tried.
    """
    n = epoch_length(source)
    tried = min(n, count if count > FEW else _TRIED)
    found = Survey(source.spec)
    chosen = permute(np.arange(tried, dtype=np.int64), n, fold(seed))
    if source.mix is not None and not source.mix.even:
        chosen = Draws(source.mix, seed).at(0, chosen)
    for index in chosen.tolist():
        if len(found) == count or (len(found) and len(found) + len(found.reasons) >= count):
            break
        try:
            image = decode(source.read(index)[0], channels, source.reading)
        except BadImage as error:
            found.reasons[source.name(index)] = error
            found.tiles += isinstance(error, EmptyTile)
            continue
        found.add(image if count > FEW else _thinned(image))
        found.decoded += image.nbytes
    return found


def survey_of(images: Tensor, spec: str) -> Survey:
    """Survey of these images (B, C, H, W), as decoded."""
    found = Survey(spec)
    for image in images:
        found.add(_thinned(image))
    return found


def _thinned(image: Tensor) -> Tensor:
    """Every so many rows and columns of an image, so that at most some 2 ** 16 pixels are left."""
    step = math.ceil(math.sqrt(image[0].numel() / _PIXELS))
    return image[:, ::step, ::step]


def _moments(channel: Tensor, holes: bool) -> Tensor:
    """Mean, variance and valid share (3,) of the pixels of a channel; uint8 is scaled to 0..1."""
    values = channel.double().flatten()
    share = 1.0
    if holes:
        values = values[~values.isnan()]
        share = values.numel() / channel.numel()
        if not share:
            return torch.zeros(3, dtype=torch.float64)
    if channel.dtype == torch.uint8:
        values /= 255
    variance, mean = torch.var_mean(values, correction=0)
    return torch.stack([mean, variance, mean.new_tensor(share)])


def _eight_bit(image: Tensor, holes: bool) -> bool:
    """True if an image has 8 bits: uint8 or, with missing pixels, floats that are such values over
    255."""
    if image.dtype == torch.uint8 or not holes:
        return image.dtype == torch.uint8
    levels = image[~image.isnan()] * 255
    whole = bool(((levels - levels.round()).abs() < 1e-3).all())
    return whole and bool(((levels > -0.5) & (levels < 255.5)).all())


def _constant(mean: Tensor, std: Tensor) -> Tensor:
    return std <= _CONSTANT * mean.abs()


def _short(value: Tensor) -> str:
    """A number of three digits, with commas."""
    number = float(value)
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2g}"


def estimate_statistics(
    found: Survey,
) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    """Mean and standard deviation of each channel of a survey, and warnings.

    A channel that is constant, or without data, is left as it is but for its mean: its deviation is
    taken to be 1, or more where values are large, since photometric operations scale channels and
    mix them.

    Raises:
        UserError: all channels are constant, or without data.
    """
    mean, std, valid = found.moments()
    dead = _constant(mean, std)
    if bool(dead.all()):
        raise UserError(
            f"all of {len(found)} images of {found.spec} looked at are constant, at "
            f"{mean.tolist()}: there is nothing to learn"
        )
    warnings = []
    for i in dead.nonzero()[:, 0].tolist():
        what = f"is constant, {mean[i]:.6g}" if valid[i] else "holds no data"
        warnings.append(
            f"channel {i} (the first is 0) of {found.spec} {what} in all {len(found)} images "
            "looked at: its values are not scaled, and teach nothing"
        )
    large = torch.maximum(mean.abs(), std[~dead].max()).clamp(min=1)
    digits = [_digits(v) for v in std.tolist()]
    scale = torch.where(dead, large, std).tolist()
    rounded = [tuple(map(round, v, digits)) for v in (mean.tolist(), scale)]
    return rounded[0], rounded[1], warnings


def _digits(std: float) -> int:
    """Decimals to write of a channel: six, or more where its deviation is small."""
    return 6 if std == 0 else max(6, 2 - math.floor(math.log10(std)))
