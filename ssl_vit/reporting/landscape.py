"""A run's held-out images as a map: by its features, in two dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ssl_vit.common.errors import UserError, check
from ssl_vit.training.panels import projections


@dataclass(frozen=True)
class Projection:
    """Features that a run keeps for TensorBoard's projector after ``step`` steps.

    ``labels``: names of classes, or of several labels each; None where the images have none.
    ``classes``: whether they are classes.
    """

    step: int
    features: Float[np.ndarray, "n d"]
    labels: list[str] | None
    classes: bool
    pictures: UInt8[np.ndarray, "n s s 3"]


def read_projection(folder: Path) -> Projection | None:
    """The newest of a run; None where it has none.

    Raises:
        UserError: it is damaged.
    """
    found = projections(folder)
    if not found:
        return None
    step = max(found)
    path = found[step]
    try:
        text = (path / "tensors.tsv").read_text()
        check(bool(text.strip()), "no features")
        features = np.loadtxt(text.splitlines(), delimiter="\t", ndmin=2)
        head, *lines = (path / "metadata.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
        labels = [line.rpartition("\t")[0] for line in lines]
        sprite = np.asarray(Image.open(path / "sprite.png").convert("RGB"))
        check(len(labels) == len(features) > 0, "as many labels as features are needed")
        check(bool(np.isfinite(features).all()), "its features are not finite")
        pictures = _cut(sprite, len(features))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:120]})") from None
    kind = head.partition("\t")[0]
    known = labels if kind in ("class", "labels") else None
    return Projection(step, features, known, kind == "class", pictures)


def _cut(sprite: UInt8[np.ndarray, "height width 3"], n: int) -> UInt8[np.ndarray, "n s s 3"]:
    """The pictures of a square sheet, row by row, as TensorBoard lays them out."""
    across = math.ceil(math.sqrt(n))
    side = min(sprite.shape[:2]) // across
    check(side > 0, "its sheet of pictures is too small")
    cells = sprite[: across * side, : across * side]
    cells = cells.reshape(across, side, across, side, 3).swapaxes(1, 2)
    return cells.reshape(-1, side, side, 3)[:n]


def flattened(features: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """t-SNE (van der Maaten and Hinton 2008) of features of length 1, so that near means similar.

    Begun from the two first principal components, and a function of ``seed``. Fewer than five
    images are laid out by those components alone, and those that are all the same at one place.
    """
    from sklearn.decomposition import PCA  # late: it takes a second to import
    from sklearn.manifold import TSNE

    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(lengths, 1e-12)
    n, width = unit.shape
    if float(unit.std(0).max()) < 1e-9:
        return np.zeros((n, 2))
    flat = PCA(min(2, n, width), random_state=seed).fit_transform(unit)
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    if n < 5:
        return flat
    # The customary start: small, so that it is the data that moves the points.
    start = flat / max(float(flat[:, 0].std()), 1e-12) * 1e-4
    perplexity = min(30.0, (n - 1) / 4)
    made = TSNE(2, perplexity=perplexity, init=start.astype(np.float32), random_state=seed)
    return np.asarray(made.fit_transform(unit.astype(np.float32)), dtype=np.float64)
