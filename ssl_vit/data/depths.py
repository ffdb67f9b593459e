"""Images and depth maps: what a map's numbers mean, which of its pixels are valid, and crops.

Maps are PNG (8 or 16 bits), TIFF or NPY. A pixel that is not finite, or not above 0, has no depth:
so are holes marked in NYU Depth v2, KITTI and what sensors write.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.decode import BadImage, read_npy
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.map_values import png_values, tiff_values
from ssl_vit.data.pairs import Beside, Pairs, coupled
from ssl_vit.data.raster import check_pixels, nodata_value, reason
from ssl_vit.data.tiff import open_tiff

DEPTHS = Beside("depth", "depth", "depth map")
_FORMATS = ("PNG", "TIFF", "NPY")
_GRAY = ("L", "I", "I;16", "I;16B")
_KINDS = "iuf"
_NODATA = 42113  # GDAL_NODATA
# Rows from, to, columns from, to. Shares of height and width, rounded down: Godard et al. 2017
# (monodepth, evaluate_kitti) for Eigen et al. 2014, and Garg et al. 2016.
_SHARES = {
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
# Pixels of maps of 480 x 640: Eigen et al. 2014 for NYU Depth v2, as BTS and AdaBins score it.
_NYU, _NYU_SIZE = (45, 471, 41, 601), (480, 640)


class DepthPairs(Pairs):
    """Images with depth maps of equal size; their paths differ only in the extension.

    ``scale``: the depth of the value 1 in a file.
    """

    beside = DEPTHS
    scale: float = 1.0

    def decoded(self, raw: bytes, name: str) -> Float32[Tensor, "h w"]:
        return decode_depth(raw, name, self.scale)


def open_depths(spec: str, reading: ReadConfig | None = None, scale: float = 1.0) -> DepthPairs:
    """Open ``depth:IMAGES:DEPTHS`` or ``depth:ROOT``, which has ``images`` and ``depth``.

    Raises:
        UserError: not of this form, no such folder, or an image or a map has no counterpart.
    """
    pairs = DepthPairs(*coupled(spec, DEPTHS, reading), spec)
    pairs.classes, pairs.scale = None, scale
    return pairs


def open_depths_source(spec: str, rest: str, reading: ReadConfig | None = None) -> DepthPairs:
    """Open images with depth maps as a source of images, for ``open_source``."""
    return open_depths(spec, reading)


def decode_depth(raw: bytes, name: str, scale: float) -> Float32[Tensor, "h w"]:
    """Decode a depth map: the values of a file times ``scale``; 0 where there is no depth.

    Raises:
        BadImage: truncated, corrupt or too large.
        UserError: a file of another format, of several channels, or of no numbers.
    """
    kind = format_of(raw[:HEAD])
    allowed = f"a depth map must be {', '.join(_FORMATS)}"
    check(kind in _FORMATS or not kind, f"{name} is a {kind} file; {allowed}")
    try:
        values = _values(raw, kind)
    except Exception as error:  # decoders raise all kinds
        raise BadImage(f"depth map {name}: {reason(error)}") from error
    if isinstance(values, str):
        raise UserError(f"{name} {values}; a depth map must have one channel, of numbers")
    wide = values.astype(np.float64)
    known = np.isfinite(wide) & (wide > 0)
    return torch.from_numpy((np.where(known, wide, 0) * scale).astype(np.float32))


def _values(raw: bytes, kind: str) -> np.ndarray | str:
    """Values as stored, (h, w); or what the file has that is no depth."""
    if kind == "PNG":
        return png_values(raw, _GRAY)
    if kind == "NPY":
        return _npy_values(raw)
    if kind != "TIFF":
        raise ValueError(f"is no {', '.join(_FORMATS)} file")
    values = tiff_values(raw, _KINDS)
    if isinstance(values, str):
        return values
    with open_tiff(io.BytesIO(raw)) as file:
        text = str(file.pages.first.tags.valueof(_NODATA) or "")
    missing = nodata_value(text, values.dtype) if text else None
    return values if missing is None else np.where(values == missing, 0, values)


def _npy_values(raw: bytes) -> np.ndarray | str:
    values = read_npy(raw)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or not values.size:
        return f"has the shape {'x'.join(map(str, values.shape))}"
    check_pixels(values.size)
    return values if values.dtype.kind in _KINDS else f"holds {values.dtype}"


def in_range(depth: Float32[Tensor, "*shape"], least: float, most: float) -> Bool[Tensor, "*shape"]:
    """Mask of pixels with a depth from ``least`` to ``most``."""
    return (depth > 0) & (depth >= least) & (depth <= most)


def crop_mask(crop: str, size: tuple[int, int], name: str) -> Bool[Tensor, "h w"]:
    """Pixels that a published rule scores; ``none``: all.

    ``eigen``, ``garg``: of KITTI, shares of height and width; ``nyu``: of maps of 480 x 640.

    Raises:
        UserError: the rule is not for maps of this size; ``name``: of the image.
    """
    if crop == "none":
        return torch.ones(size, dtype=torch.bool)
    if crop == "nyu":
        wanted, has = (" x ".join(map(str, shape)) for shape in (_NYU_SIZE, size))
        text = f"--crop nyu is for maps of {wanted} pixels; that of {name} has {has}"
        check(size == _NYU_SIZE, text)
        top, bottom, left, right = _NYU
    else:
        ends = zip(_SHARES[crop], (size[0], size[0], size[1], size[1]), strict=True)
        top, bottom, left, right = (int(share * length) for share, length in ends)
    scored = torch.zeros(size, dtype=torch.bool)
    scored[top:bottom, left:right] = True
    return scored
