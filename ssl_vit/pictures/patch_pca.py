"""What patch features tell apart: their first principal components as colours of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ssl_vit.common.config import check
from ssl_vit.common.figures import enlarged, heat, picture_rows

_PERCENT = (2.0, 98.0)
_NOTHING = 1e-24  # a share of the sum of squares that is only what rounding leaves


@dataclass(frozen=True)
class PatchPCA:
    """Principal components of patch features, in float64 on the CPU.

    ``mean`` (d,); ``components`` (k, d), orthonormal, the one that explains most first;
    ``explained`` (k,), the share of the total variance of each.
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    explained: Float[Tensor, " k"]

    def project(self, patches: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """The patches' coordinates along the components."""
        return (patches.detach().to(self.mean) - self.mean) @ self.components.T


def fit_pca(patches: Float[Tensor, "b n d"], k: int = 3) -> PatchPCA:
    """The first ``k`` principal components of the patches of all images together.

    Of fewer than ``k`` features there are as many components as features; a direction without
    variance explains 0, as where there are few patches or all are the same. Signs are fixed: the
    entry of largest magnitude is positive.

    Raises:
        UserError: no patch, or features that are not finite.
    """
    x = patches.detach().to("cpu", torch.float64).flatten(0, 1)
    check(len(x) > 0, "no patches to find the principal components of")
    check(bool(x.isfinite().all()), "the encoder's patch features are not finite")
    mean = x.mean(0)
    centred = x - mean
    # Of a covariance, not of the patches: these are many, and a few components are wanted.
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
    """The patches of the foreground, and the sign of the first component there, 1 or -1.

    Oquab et al. (2023, section 7.5) threshold the first component of all images at zero. A
    component has no sign of its own, so which side is the foreground is decided by a rule: the one
    that holds a smaller share of the patches at the images' borders than of the inner ones. Where
    neither does, or all patches are at borders, the positive one.
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
    """Patch features as colours, after Oquab et al. (2023, arXiv 2304.07193, section 7.5).

    Cells: the image; its patches' first three principal components as red, green and blue; the
    first as a heat map; the patches of the foreground, as :func:`foreground` finds them, by the
    components of their own, dark elsewhere. Components are of all images together: what has one
    colour in two images is alike to the encoder. Each is scaled by its percentiles 2 to 98.

    Raises:
        UserError: as :func:`fit_pca`.
    """
    shown = enlarged(images)
    size = (shown.shape[1], shown.shape[2])
    pca = fit_pca(patches)
    scores = pca.project(patches)
    kept, sign = foreground(scores[..., 0], grid)
    scores[..., 0] *= sign
    # An empty side: all patches are alike.
    own = fit_pca(patches[kept.to(patches.device)][None]) if kept.any() else None
    colours = np.zeros((*kept.shape, 3), np.uint8)
    if own is not None:
        chosen = patches[kept.to(patches.device)]
        colours[kept.numpy()] = _colours(own.project(chosen))
    here = _squares(kept.numpy()[..., None], grid, size)
    columns = {
        "image": shown,
        "components 1-3": _squares(_colours(scores), grid, size),
        "component 1": _squares(heat(_scaled(scores[..., :1])[..., 0]), grid, size),
        "foreground": np.where(here, _squares(colours, grid, size), _dark(shown)),
    }
    return picture_rows(columns, _caption(pca, own, float(kept.double().mean())))


def _caption(pca: PatchPCA, own: PatchPCA | None, share: float) -> str:
    """What the colours mean, and how much of the variance they show."""
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
    """Each component in 0..1, its percentiles 2 and 98 at the ends; a flat one is 0.5."""
    values = scores.numpy()
    flat = values.reshape(-1, values.shape[-1])
    low, high = np.percentile(flat, _PERCENT, axis=0)
    least, most = flat.min(0), flat.max(0)
    # Nearly all patches alike, a few apart: percentiles would hide these.
    low, high = np.where(high > low, low, least), np.where(high > low, high, most)
    width = high - low
    even = width <= 1e-9 * np.abs(flat).max(initial=1e-300)
    scaled = ((values - low) / np.where(even, 1, width)).clip(0, 1)
    return np.where(even, 0.5, scaled)


def _colours(scores: Float[Tensor, "*b k"]) -> UInt8[np.ndarray, "*b 3"]:
    """Three components as red, green and blue; one that is not there is 0.5."""
    scaled = _scaled(scores[..., :3])
    missing = [(0, 0)] * (scaled.ndim - 1) + [(0, 3 - scaled.shape[-1])]
    return (np.pad(scaled, missing, constant_values=0.5) * 255).round().astype(np.uint8)


def _squares(
    values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "b height width c"] | Bool[np.ndarray, "b height width c"]:
    """Patches (b, n, c) as squares of images of this size, each of one value."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(size, grid, strict=True))
    return values.reshape(len(values), *grid, -1)[:, rows][:, :, columns]


def _dark(images: UInt8[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b h w 3"]:
    """The pictures in gray, and dark, so that colours stand out and their place is seen."""
    gray = images.mean(-1, keepdims=True).repeat(3, -1)
    return (gray * 0.18).round().astype(np.uint8)
