"""Model selection without the validation set: a held-out split of the training images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import permute
from ssl_vit.evaluators.options import FEATURES

_LEAST_IMAGES, _LEAST_OF_A_CLASS = 20, 5
NOT_CHOSEN = "not chosen: too few images, or groups of them"
"""Recorded in details where nothing could be held out and a fixed setting was used."""

Split = tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]


def usable(wanted: tuple[str, ...], has: Callable[[str], bool]) -> tuple[str, ...]:
    """Available features among the wanted ones; else the first plain one.

    Encoders without [CLS] have ``mean``, other networks ``pooled``, raw pixels ``pixels``.

    Raises:
        UserError: none is available.
    """
    found = tuple(name for name in wanted if has(name))
    if not found:
        found = tuple(name for name in ("cls", "mean", "pooled", "pixels") if has(name))[:1]
    check(bool(found), f"features are {', '.join(wanted)}; the encoder gives none of these")
    return found


def split_rows(
    labels: Tensor, share: float, seed: int, groups: Int64[Tensor, " n"] | None = None
) -> Split | None:
    """Split rows into (kept, held out): ``share`` is held out, stratified by class, by ``seed``.

    None where too few images remain to select on: under 20, or under 5 per class, or a share of 0.
    Classes of one image keep it. With several labels per image the split is not stratified. With
    ``groups`` of the rows whole ones are held out (:func:`split_groups`).

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
        # Sorted by class, shuffled within: evenly spaced picks take the same share of each class.
        candidates = order[np.argsort(of[order], kind="stable")]
        candidates = candidates[counts[of[candidates]] > 1]
    if n < _LEAST_IMAGES or share <= 0:
        return None
    if groups is not None:
        return split_groups(labels, groups, share, seed)
    count = max(1, round(share * len(candidates)))
    places = ((np.arange(count) + 0.5) * (len(candidates) / count)).astype(np.int64)
    held = np.sort(candidates[places])
    kept = np.setdiff1d(np.arange(n), held)
    return torch.from_numpy(kept), torch.from_numpy(held)


def split_groups(
    labels: Tensor, groups: Int64[Tensor, " n"], share: float, seed: int
) -> Split | None:
    """Split rows into (kept, held out), none of a group in both: groups are held out in a random
    order, each that still fits into ``share`` of the rows; if none does, the smallest one.

    Every class, of (n,) ``labels``, keeps a row. None where a group holds more than half of the
    rows, or all of a class, and so does each of them.
    """
    n = len(groups)
    _, unit, sizes = np.unique(groups.cpu().numpy(), return_inverse=True, return_counts=True)
    rows_of = np.split(np.argsort(unit, kind="stable"), np.cumsum(sizes)[:-1])
    of = labels.cpu().numpy() if labels.ndim == 1 else np.zeros(n, dtype=np.int64)
    of = np.unique(of, return_inverse=True)[1]
    order = permute(np.arange(len(sizes), dtype=np.int64), len(sizes), fold(seed, 1))
    held = _held([rows_of[i] for i in order], of, max(1, round(share * n)))
    if not held:
        smallest = order[np.argsort(sizes[order], kind="stable")]
        held = _held([rows_of[i] for i in smallest], of, n // 2)[:1]
    if not held:
        return None
    rows = np.sort(np.concatenate(held))
    return torch.from_numpy(np.setdiff1d(np.arange(n), rows)), torch.from_numpy(rows)


def split_tenth(
    n: int,
    groups: Int64[Tensor, " n"] | None,
    seed: int,
    usable: Bool[Tensor, " n"] | None = None,
) -> Split:
    """Split ``n`` rows, two at the least, into (kept, held out): a tenth is held out, of whole
    groups where they are known and one can be held out; else of those that are ``usable``."""
    if groups is not None and (rows := split_groups(torch.zeros(n), groups, 0.1, seed)):
        return rows
    shuffled = torch.from_numpy(permute(np.arange(n, dtype=np.int64), n, seed))
    some = shuffled if usable is None else shuffled[usable[shuffled]]
    held = some[: max(1, n // 10)]
    return shuffled[~torch.isin(shuffled, held)], held


def _held(groups: list[np.ndarray], of: np.ndarray, room: int) -> list[np.ndarray]:
    """The groups (rows of each) that in turn still fit into ``room``, and leave every class a row;
    ``of``: the class of each row, from 0 on."""
    left, held = np.bincount(of), []
    for rows in groups:
        there = np.bincount(of[rows], minlength=len(left))
        if len(rows) <= room and not ((there > 0) & (there == left)).any():
            left, room = left - there, room - len(rows)
            held.append(rows)
    return held


def quality(logits: Float[Tensor, "h c"], targets: Tensor) -> float:
    """Quality of logits in percent: accuracy, or the mean average precision over labels.

    ``targets``: (h,) classes or (h, c) labels, NaN where unknown; labels without both outcomes are
    left out. Non-finite logits give -1, below all others; NaN where no label has both outcomes.
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
    """Best (feature, setting) by quality; the first of equal ones, None if all are NaN."""
    scored = {point: value for point, value in found.items() if not np.isnan(value)}
    return max(scored, key=scored.__getitem__) if scored else None


def grid_of(widths: dict[str, int], settings: tuple[float, ...]) -> list[tuple[str, float]]:
    """Grid of all (feature, setting) points: narrow features, then low settings first."""
    order = {name: i for i, name in enumerate(FEATURES)}
    features = sorted(widths, key=lambda name: (widths[name], order[name]))
    return [(name, setting) for name in features for setting in sorted(settings)]


def guesses_of(logits: Float[Tensor, "q c"], targets: Tensor) -> Tensor:
    """Guesses of a prediction: at most 5 classes, best first; or each label's probability.

    ``targets``: of the training set; their shape decides between the two.
    """
    if targets.ndim == 2:
        return logits.sigmoid()
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def outputs_of(targets: Tensor) -> int:
    """Number of a head's outputs: classes up to the largest, or labels."""
    return targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
