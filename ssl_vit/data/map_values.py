"""Values of maps beside images, as files hold them: masks, and other files of one channel."""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from PIL import Image
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.decode import BadImage
from ssl_vit.data.raster import check_pixels, reason
from ssl_vit.data.tiff import check_page, open_tiff

# Modes in which Pillow returns the file's values; of P, a palette, the indices are used.
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_WHITE_IS_ZERO = 0
_LARGEST = 65535
_KINDS = "bui"  # of a TIFF's numbers


def decode_mask(raw: bytes, name: str) -> Integer[Tensor, "h w"]:
    """Decode a mask: the values of a PNG or TIFF file, uint8 or int32; of a palette, its indices.

    Raises:
        BadImage: truncated, corrupt or too large.
        UserError: colours instead of classes, a lossy format, or numbers that cannot be classes.
    """
    check(
        raw[:2] != b"\xff\xd8",
        f"{name} is a JPEG, which does not keep classes; a mask must be PNG or TIFF",
    )
    try:
        tiff = raw[:2] in (b"II", b"MM")
        values = tiff_values(raw, _KINDS) if tiff else png_values(raw, _MODES)
    except Exception as error:  # decoders raise all kinds
        raise BadImage(f"mask {name}: {reason(error)}") from error
    if isinstance(values, str):
        raise UserError(f"{name} {values}; a mask must have one channel (or a palette), of classes")
    low, high = int(values.min()), int(values.max())
    check(
        low >= 0 and high <= _LARGEST,
        f"{name} has values from {low} to {high}; a mask's classes are 0 to {_LARGEST}",
    )
    return torch.from_numpy(values.astype(np.uint8 if high < 256 else np.int32))


def png_values(raw: bytes, modes: tuple[str, ...]) -> np.ndarray | str:
    """Values of a PNG as stored, int32 (h, w); or what it has that is not among Pillow's ``modes``.

    Raises all kinds of errors, as its decoder does.
    """
    with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
        if image.mode not in modes:
            return f"has the mode {image.mode}"
        bits, gray = raw[24], raw[25] == 0  # of the first chunk
        scale = 255 // (2**bits - 1) if gray and bits in (2, 4) else 1  # which Pillow applies
        return np.asarray(np.asarray(image).astype(np.int32) // scale)


def tiff_values(raw: bytes, kinds: str) -> np.ndarray | str:
    """Values of the first page of a TIFF as stored, (h, w), numbers of these ``kinds`` (numpy's
    letters); or what it has that is none of them.

    Raises all kinds of errors, as its decoder does.
    """
    with open_tiff(io.BytesIO(raw)) as file:
        page = file.pages.first
        if page.samplesperpixel != 1 or page.imagedepth != 1:
            return f"has {page.samplesperpixel} channels in {page.imagedepth} planes"
        if page.dtype is None or page.dtype.kind not in kinds:
            return f"holds {page.dtype}"
        if page.photometric == _WHITE_IS_ZERO:
            return "counts from white"
        check_pixels(page.imagelength * page.imagewidth)
        check_page(page, file.filehandle)
        return np.asarray(page.asarray(maxworkers=1))


def nearest_mask(mask: Shaped[Tensor, "h w"], size: tuple[int, int]) -> Shaped[Tensor, "r s"]:
    """Resize a mask by nearest neighbour: each new pixel has the value at its centre."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]
