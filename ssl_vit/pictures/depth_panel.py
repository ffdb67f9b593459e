"""Depth panel: image, true depth, predicted depth and error, in colours of one scale."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.common.figures import heat, picture_rows

_NONE = np.uint8(128)
_WORST = 0.5
_SIDE = 256


def depth_panel(
    images: UInt8[np.ndarray, "n h w 3"],
    true: Float[Tensor, "n h w"],
    predicted: Float[Tensor, "n h w"],
) -> UInt8[np.ndarray, "height width 3"]:
    """Depth panel: a row per image; pixels whose true depth is 0 are gray but for the prediction.

    Depths of all images are in the same colours, from 0 to the greatest of them; errors are shares
    of the true depth, up to a half.
    """
    step = -(-max(images.shape[1:3]) // _SIDE)
    images = images[:, ::step, ::step]
    depth, guess = (np.asarray(x.cpu().float())[:, ::step, ::step] for x in (true, predicted))
    known = depth > 0
    most = float(max(depth.max(), guess.max()))
    error = np.abs(guess - depth) / np.where(known, depth, 1.0)
    columns = {
        "image": images,
        "depth": _shown(heat(depth / most), known),
        "predicted": heat(guess / most),
        "error": _shown(heat(np.minimum(error / _WORST, 1.0)), known),
    }
    caption = (
        f"Depth: black is 0, pale yellow {most:.3g}. Error, as a share of the depth: black is 0, "
        f"pale yellow {100 * _WORST:g} % and more. Gray: no valid depth."
    )
    return picture_rows(columns, caption)


def _shown(
    colours: UInt8[np.ndarray, "n h w 3"], known: np.ndarray
) -> UInt8[np.ndarray, "n h w 3"]:
    """Colours where something is known, gray elsewhere."""
    return np.where(known[..., None], colours, _NONE)
