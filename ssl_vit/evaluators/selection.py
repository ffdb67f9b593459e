"""Choosing a head's setting without the validation set: what is held out, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.common.config import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import permute
from ssl_vit.evaluators.features import FEATURES

_LEAST_IMAGES, _LEAST_OF_A_CLASS = 20, 5
NOT_CHOSEN = "not chosen: too few images"
"""What details say where nothing could be held out, and a fixed setting was taken."""

Split = tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]


def usable(wanted: tuple[str, ...], has: Callable[[str], bool]) -> tuple[str, ...]:
    """Those of the wanted features that there are; else the first there is of the plain ones.

    Encoders without [CLS] have ``mean``, other networks ``pooled``, raw pixels ``pixels``.

    Raises:
        UserError: there are none.
    """
    found = tuple(name for name in wanted if has(name))
    if not found:
        found = tuple(name for name in ("cls", "mean", "pooled", "pixels") if has(name))[:1]
    check(bool(found), f"features are {', '.join(wanted)}; the encoder gives none of these")
    return found


def split_rows(labels: Tensor, share: float, seed: int) -> Split | None:
    """(kept, held out) rows: ``share`` of the images, of each class alike; a function of ``seed``.

    None where too few are left to judge by: under 20 images, or 5 for each class there is, or a
    share of 0. Classes of one image keep it. Where images have several labels the rows are drawn
    from all alike.

    ``labels``: (n,) classes or (n, L) labels.
    """
    n = len(labels)
    order = permute(np.arange(n, dtype=np.int64), n, fold(seed, 1))
    candidates = order
    if labels.ndim == 1:
        classes, of, counts = np.unique(
            labels.cpu().numpy(), return_inverse=True, return_counts=True
        )
        if n < _LEAST_OF_A_CLASS * len(classes):
            return None
        # Class by class, shuffled within: every so-manyth of them takes its share of each class.
        candidates = order[np.argsort(of[order], kind="stable")]
        candidates = candidates[counts[of[candidates]] > 1]
    if n < _LEAST_IMAGES or share <= 0:
        return None
    count = max(1, round(share * len(candidates)))
    places = ((np.arange(count) + 0.5) * (len(candidates) / count)).astype(np.int64)
    held = np.sort(candidates[places])
    kept = np.setdiff1d(np.arange(n), held)
    return torch.from_numpy(kept), torch.from_numpy(held)


def quality(logits: Float[Tensor, "h c"], targets: Tensor) -> float:
    """How good logits are, in percent: accuracy, or the mean of the labels' average precisions.

    ``targets``: (h,) classes or (h, c) labels, NaN where unknown; labels without both outcomes are
    left out. Logits that are not finite are worth -1, less than any others; NaN where no label can
    be judged.
    """
    if not bool(logits.isfinite().all()):
        return -1.0
    if targets.ndim == 1:
        return 100.0 * float((logits.argmax(1) == targets).double().mean())
    from sklearn.metrics import average_precision_score  # slow to import, and rarely needed

    scores, wanted = logits.double().cpu().numpy(), targets.double().cpu().numpy()
    precisions = []
    for score, truth in zip(scores.T, wanted.T, strict=True):
        known = ~np.isnan(truth)
        if (truth == 1).any() and (truth == 0).any():
            precisions.append(float(average_precision_score(truth[known], score[known])))
    return 100.0 * float(np.mean(precisions)) if precisions else float("nan")


def best(found: dict[tuple[str, float], float]) -> tuple[str, float] | None:
    """The (feature, setting) of highest quality; the first of equal ones, None if all are NaN."""
    judged = {point: value for point, value in found.items() if not np.isnan(value)}
    return max(judged, key=judged.__getitem__) if judged else None


def grid_of(widths: dict[str, int], settings: tuple[float, ...]) -> list[tuple[str, float]]:
    """All (feature, setting) points, the preferred first: narrow features, then low settings."""
    order = {name: i for i, name in enumerate(FEATURES)}
    features = sorted(widths, key=lambda name: (widths[name], order[name]))
    return [(name, setting) for name in features for setting in sorted(settings)]


def guesses_of(logits: Float[Tensor, "q c"], targets: Tensor) -> Tensor:
    """The guesses of a prediction: at most 5 classes, best first; or each label's probability.

    ``targets``: the training set's, which say which of the two.
    """
    if targets.ndim == 2:
        return logits.sigmoid()
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def outputs_of(targets: Tensor) -> int:
    """How many outputs a head has: classes up to the largest, or labels."""
    return targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
