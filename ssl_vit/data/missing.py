"""Missing pixels: NaN in float images, per channel; how they are found, and what resizing does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.decode import BadImage

# Less of its weight than this has no data: a resized pixel is missing.
_HALF = 0.5


def has_missing(images: Tensor) -> bool:
    """True if any pixel is missing (NaN); only floats can tell, so uint8 costs nothing.

    A sum is NaN if a value is, and several times faster than a look at each.
    """
    if not images.is_floating_point() or not bool(images.sum().isnan()):
        return False
    return bool(images.isnan().any())  # infinities of both signs have such a sum, too


def valid_share(image: Tensor) -> float:
    """Share of the pixels of a (C, H, W) image that have data in any channel."""
    return float((~image.isnan()).any(0).float().mean())


def with_data(image: Tensor, what: str = "") -> Tensor:
    """The image itself; ``what``: what it is, if not the whole of one.

    Raises:
        BadImage: all of its pixels are missing.
    """
    if has_missing(image) and not valid_share(image):
        raise BadImage(f"{what} holds no data".lstrip())
    return image


def missing_in(crops: list[Tensor]) -> list[Tensor]:
    """``Views.missing`` of crops: empty where none of their pixels is missing."""
    return [c.isnan() for c in crops] if any(has_missing(c) for c in crops) else []


def resized(image: Tensor, size: tuple[int, int], missing: bool | None = None) -> Tensor:
    """A (C, H, W) image at another size, bicubically, antialiased; uint8 stays so.

    Missing pixels give nothing to others: each pixel is the mean of the valid ones around it, by
    the weights that resizing gives them (normalised convolution: Knutsson and Westin 1993). It is
    missing where less than half of its weight is valid. ``missing``: whether there are any; None:
    to be looked up.
    """
    if tuple(image.shape[1:]) == size:
        return image
    if not (has_missing(image) if missing is None else missing):
        return _interpolated(image, size)
    gone = image.isnan()
    values = _interpolated(image.masked_fill(gone, 0), size)
    weights = _interpolated((~gone).to(image.dtype), size)
    return torch.where(weights < _HALF, torch.nan, values / weights)


def _interpolated(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resizing as torchvision's ``resize``, but that an image laid out pixel by pixel is
    taken as such, a batch of one, and stays so: a quarter faster, and nothing is transposed."""
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size, mode="bicubic", antialias=True)[0]
