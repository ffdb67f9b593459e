"""Patch similarity: how like a marked patch all patches of an image are, as heat maps."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.errors import check
from ssl_vit.common.figures import enlarged, heat, picture_rows, squares

_MARKS = 3


def marked_patches(
    cosines: Float[Tensor, "b n n"], count: int = _MARKS
) -> Int64[Tensor, "b marks"]:
    """Patches to mark in each image, by the similarities of all pairs: parts that differ.

    The first is the one most like its image's patches on the whole, each further one the one least
    like those before it (farthest-point sampling); of equal ones the first. There are no more than
    patches.
    """
    chosen = [cosines.mean(-1).argmax(-1)]
    rows = torch.arange(len(cosines), device=cosines.device)
    nearest = cosines[rows, chosen[0]]
    for _ in range(min(count, cosines.shape[1]) - 1):
        # A patch that is chosen already is never the next, even if all are alike.
        nearest = nearest.scatter(1, torch.stack(chosen, 1), torch.inf)
        chosen.append(nearest.argmin(-1))
        nearest = torch.maximum(nearest, cosines[rows, chosen[-1]])
    return torch.stack(chosen, 1)


def similarity_panel(
    images: UInt8[np.ndarray, "b h w 3"],
    patches: Float[Tensor, "b n d"],
    grid: tuple[int, int],
) -> UInt8[np.ndarray, "height width 3"]:
    """Patch similarity panel, after Siméoni et al. (2025, arXiv 2508.10104, figure 1).

    Cells: the image with its marked patches framed (:func:`marked_patches`); for each mark the
    cosine similarity of all patches with it, from the image's least (dark) to 1 (light).

    Raises:
        UserError: no patches, or non-finite features.
    """
    check(patches.shape[1] > 0, "no patches to find similarities of")
    x = patches.detach().to("cpu", torch.float64)
    check(bool(x.isfinite().all()), "the encoder's patch features are not finite")
    unit = F.normalize(x, dim=-1)
    cosines = unit @ unit.mT
    marks = marked_patches(cosines)
    shown = enlarged(images)
    size = (shown.shape[1], shown.shape[2])
    frames = [_frames(marks[:, i], grid, size) for i in range(marks.shape[1])]
    columns = {"image": np.where(np.logical_or.reduce(frames), 255, shown).astype(np.uint8)}
    for i, frame in enumerate(frames):
        own = cosines[torch.arange(len(x)), marks[:, i]]
        low = own.amin(-1, keepdim=True)
        scaled = ((own - low) / (1 - low).clamp(min=1e-12)).clamp(0, 1)
        maps = squares(heat(scaled.numpy()), grid, size)
        columns[f"like patch {i + 1}"] = np.where(frame, 255, maps).astype(np.uint8)
    least = cosines.amin((1, 2)).mean()
    caption = (
        "Cosine similarity of all patches with a marked one, framed in white. Each map runs from "
        "its own least (dark) to 1 (light). Marked: the patch most like its image on the whole, "
        "then each time the one least like those before. The least similarity of two patches of an "
        f"image is {least:.2f} on average."
    )
    return picture_rows(columns, caption)


def _frames(
    marked: Int64[Tensor, " b"], grid: tuple[int, int], size: tuple[int, int]
) -> Bool[np.ndarray, "b height width 1"]:
    """True on the border of each image's marked patch, 2 pixels wide."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(size, grid, strict=True))
    row, column = marked.numpy() // grid[1], marked.numpy() % grid[1]
    inside = (rows == row[:, None])[:, :, None] & (columns == column[:, None])[:, None]
    kept = np.pad(inside, ((0, 0), (2, 2), (2, 2)))
    height, width = size
    inner = np.logical_and.reduce(
        [kept[:, i : i + height, j : j + width] for i in (0, 2, 4) for j in (0, 2, 4)]
    )
    return (inside & ~inner)[..., None]
