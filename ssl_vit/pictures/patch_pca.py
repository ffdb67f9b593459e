"""Patch PCA: the first principal components of patch features as colours of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.figures import enlarged, heat, picture_rows, squares

_PERCENT = (2.0, 98.0)
_NOTHING = 1e-24  # share of the sum of squares attributed to rounding


@dataclass(frozen=True)
class PatchPCA:
    """Patch PCA: principal components of patch features, in float64 on the CPU.

    ``mean`` (d,); ``components`` (k, d), orthonormal, by decreasing variance; ``explained`` (k,),
    the share of the total variance of each.
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    explained: Float[Tensor, " k"]

    def project(self, patches: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Project patches onto the components."""
        return (patches.detach().to(self.mean) - self.mean) @ self.components.T


def fit_pca(patches: Float[Tensor, "b n d"], k: int = 3) -> PatchPCA:
    """Fit the first ``k`` principal components of the patches of all images together.

    With fewer than ``k`` features there are as many components as features; a direction without
    variance (few or identical patches) explains 0. Signs are fixed: the entry of largest magnitude
    is positive.

    Raises:
        UserError: no patches, or non-finite features.
    """
    x = patches.detach().to("cpu", torch.float64).flatten(0, 1)
    check(len(x) > 0, "no patches to find the principal components of")
    check(bool(x.isfinite().all()), "the encoder's patch features are not finite")
    mean = x.mean(0)
    centred = x - mean
    # By the covariance, not an SVD of the patches: there are many, and few components are needed.
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, components = values.flip(0)[:k].clamp(min=0), vectors.T.flip(0)[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    total = centred.square().sum()
    some = total > _NOTHING * x.square().sum()
    explained = values / total if some else torch.zeros_like(values)
    return PatchPCA(mean, components * largest.sign(), explained)


def foreground(
    first: Float[Tensor, "b n"], grid: tuple[int, int]
) -> tuple[Bool[Tensor, "b n"], int]:
    """Foreground patches, and the sign of the first component there, 1 or -1.

    Oquab et al. (2023, section 7.5) threshold the first component of all images at zero. The
    sign of a component is arbitrary, so a rule decides which side is the foreground: the one with a
    smaller share of the patches at the images' borders than of the inner ones; where neither has,
    or all patches are at borders, the positive one.
    """
    positive = first > 0
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    inner = (rows > 0) & (rows < grid[0] - 1) & (columns > 0) & (columns < grid[1] - 1)
    at_border, inside = positive[:, ~inner.flatten()], positive[:, inner.flatten()]
    outer = inside.numel() > 0 and at_border.double().mean() > inside.double().mean()
    return (first < 0, -1) if outer else (positive, 1)


def pca_panel(
    images: UInt8[np.ndarray, "b h w 3"],
    patches: Float[Tensor, "b n d"],
    grid: tuple[int, int],
) -> UInt8[np.ndarray, "height width 3"]:
    """Patch PCA panel: patch features as colours, after Oquab et al. (2023, arXiv 2304.07193, 7.5).

    Cells: the image; its patches' first three principal components as red, green and blue; the
    first as a heat map; the foreground patches (see :func:`foreground`) by a PCA of their own, dark
    elsewhere. Components are of all images together: equal colours in two images mean similar
    features. Each component is scaled by its percentiles 2 to 98.

    Raises:
        UserError: as :func:`fit_pca`.
    """
    shown = enlarged(images)
    size = (shown.shape[1], shown.shape[2])
    pca = fit_pca(patches)
    scores = pca.project(patches)
    kept, sign = foreground(scores[..., 0], grid)
    scores[..., 0] *= sign
    # No foreground: all patches are equal.
    own = fit_pca(patches[kept.to(patches.device)][None]) if kept.any() else None
    colours = np.zeros((*kept.shape, 3), np.uint8)
    if own is not None:
        chosen = patches[kept.to(patches.device)]
        colours[kept.numpy()] = _colours(own.project(chosen))
    here = squares(kept.numpy()[..., None], grid, size)
    columns = {
        "image": shown,
        "components 1-3": squares(_colours(scores), grid, size),
        "component 1": squares(heat(_scaled(scores[..., :1])[..., 0]), grid, size),
        "foreground": np.where(here, squares(colours, grid, size), _dark(shown)),
    }
    return picture_rows(columns, _caption(pca, own, float(kept.double().mean())))


def _caption(pca: PatchPCA, own: PatchPCA | None, share: float) -> str:
    """Caption: the meaning of the colours, and the share of variance they show."""
    shown = (
        "PCA of the patch features of all images together: components 1, 2, 3 in red, green, blue, "
        f"with {_percents(pca)} of the variance. "
    )
    side = (
        "Foreground: the patches on that side of component 1's mean which holds the smaller share "
        f"of the patches at the images' borders; light in its map. It is {100 * share:.0f} % of "
        "all patches. "
    )
    if own is None:
        return shown + "Foreground: none, all patches are alike."
    return shown + side + f"Its colours: a PCA of these patches alone, {_percents(own)}."


def _percents(pca: PatchPCA) -> str:
    shares = [f"{100 * share:.1f}" for share in pca.explained.tolist()]
    return ", ".join(shares) + " %"


def _scaled(scores: Float[Tensor, "*b k"]) -> Float[np.ndarray, "*b k"]:
    """Components scaled to 0..1 by their percentiles 2 and 98; a constant one is 0.5."""
    values = scores.numpy()
    flat = values.reshape(-1, values.shape[-1])
    low, high = np.percentile(flat, _PERCENT, axis=0)
    least, most = flat.min(0), flat.max(0)
    # Where nearly all patches are equal, percentiles would hide the few others.
    low, high = np.where(high > low, low, least), np.where(high > low, high, most)
    width = high - low
    even = width <= 1e-9 * np.abs(flat).max(initial=1e-300)
    scaled = ((values - low) / np.where(even, 1, width)).clip(0, 1)
    return np.where(even, 0.5, scaled)


def _colours(scores: Float[Tensor, "*b k"]) -> UInt8[np.ndarray, "*b 3"]:
    """Colours: three components as red, green and blue; a missing one is 0.5."""
    scaled = _scaled(scores[..., :3])
    missing = [(0, 0)] * (scaled.ndim - 1) + [(0, 3 - scaled.shape[-1])]
    return (np.pad(scaled, missing, constant_values=0.5) * 255).round().astype(np.uint8)


def _dark(images: UInt8[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Pictures in dark gray, as background for the coloured patches."""
    gray = images.mean(-1, keepdims=True).repeat(3, -1)
    return (gray * 0.18).round().astype(np.uint8)
