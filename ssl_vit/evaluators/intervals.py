"""Confidence intervals: 95 % of a metric, by the percentile bootstrap over images (Efron 1979).

Images of one group (a patient) are not independent: where groups are known, whole ones are drawn
(cluster bootstrap; Davison and Hinkley 1997, section 3.8), as many as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

_ENDS = (2.5, 97.5)
_RESAMPLES = 1000
_RANKED_RESAMPLES = 200


def _random(seed: int) -> np.random.RandomState:
    # RandomState, because its stream is frozen: a newer numpy must not change an interval.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


Groups = Int64[np.ndarray, " q"] | None


def accuracy_interval(
    correct: Bool[np.ndarray, " q"], seed: int, groups: Groups = None
) -> tuple[float, float]:
    """Interval of the accuracy, in percent; ``groups``: of the images.

    Correctness is binary, so the number of correct images in a resample is binomial: it is drawn
    directly, not image by image. Of groups, the share of correct images among all of those drawn.
    """
    n = len(correct)
    if groups is not None:
        group, sizes = _numbered(groups)
        right = np.bincount(group, correct, len(sizes))
        draws = _drawn(_random(seed), len(sizes), _RESAMPLES)
        low, high = np.percentile([100.0 * (c @ right) / (c @ sizes) for c in draws], _ENDS)
        return float(low), float(high)
    counts = _random(seed).binomial(n, correct.mean(), _RESAMPLES)
    low, high = np.percentile(100.0 * counts / n, _ENDS)
    return float(low), float(high)


def mean_interval(
    values: Float[np.ndarray, " q"], seed: int, groups: Groups = None
) -> tuple[float, float]:
    """Interval of a mean over images; ``groups``: of them, drawn whole."""
    group, sizes = _numbered(np.arange(len(values)) if groups is None else groups)
    sums = np.bincount(group, values, len(sizes))
    draws = _drawn(_random(seed), len(sizes), _RESAMPLES)
    low, high = np.percentile([(c @ sums) / (c @ sizes) for c in draws], _ENDS)
    return float(low), float(high)


def _numbered(groups: Int64[np.ndarray, " q"]) -> tuple[np.ndarray, np.ndarray]:
    """Groups as numbers from 0 on (q,), and their sizes."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return group, sizes


def _drawn(random: np.random.RandomState, n: int, resamples: int) -> Iterator[np.ndarray]:
    """Counts of how often each of n units is drawn, int64 (n,), for each resample."""
    for _ in range(resamples):
        yield np.bincount(random.randint(0, n, n), minlength=n)


def mean_precision_interval(
    scores: Float[np.ndarray, "q l"],
    truth: Float[np.ndarray, "q l"],
    seed: int,
    groups: Groups = None,
) -> tuple[float, float]:
    """Interval of the mean average precision over labels, in percent; truth is 1, 0, or NaN.

    Images, or ``groups`` of them, are resampled with all their labels. A label with one outcome
    only in a resample is left out of its mean. Each label is sorted once; a resample is a count for
    each image.
    """
    group = np.arange(len(scores)) if groups is None else _numbered(groups)[0]
    ranked = [Ranking.of(s, t) for s, t in zip(scores.T, truth.T, strict=True)]
    means = []
    for drawn in _drawn(_random(seed), int(group.max()) + 1, _RANKED_RESAMPLES):
        counts = drawn[group]
        found = [p for r in ranked if (p := r.average_precision(counts)) is not None]
        if found:
            means.append(100.0 * float(np.mean(found)))
    low, high = np.percentile(means, _ENDS)
    return float(low), float(high)


def resampled(
    metric: Callable[[Int64[np.ndarray, " units"]], float | None],
    units: int,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Interval of any metric that is a function of how often each unit (image, group) is drawn.

    Resamples of which it is None are left out; (0, 0) if it is of all.
    """
    found = [metric(counts) for counts in _drawn(_random(seed), units, resamples)]
    known = [value for value in found if value is not None]
    low, high = np.percentile(known, _ENDS) if known else (0.0, 0.0)
    return float(low), float(high)


@dataclass
class Ranking:
    """Ranking of the images whose label is known, best score first, reused for many resamples.

    ``order``: image indices. ``hits``: positions in that order of images that have the label.
    ``ends``: for each hit, the last position of an equal score; ``last_hits``: the number of hits
    up to there, less one.
    """

    order: np.ndarray
    hits: np.ndarray
    ends: np.ndarray
    last_hits: np.ndarray

    @classmethod
    def of(cls, scores: Float[np.ndarray, " q"], truth: Float[np.ndarray, " q"]) -> Ranking:
        """Sort the images by score."""
        known = np.flatnonzero(~np.isnan(truth))
        order = known[np.argsort(-scores[known], kind="stable")]
        falling = -scores[order]
        hits = np.flatnonzero(truth[order] == 1)
        ends = np.searchsorted(falling, falling[hits], side="right") - 1
        return cls(order, hits, ends, np.searchsorted(hits, ends, side="right") - 1)

    def average_precision(self, counts: np.ndarray) -> float | None:
        """Average precision: mean over hits of the precision at their score, by ``counts``.

        None where all images are hits, or none is.
        """
        weight = counts[self.order]
        seen, hit = weight.cumsum(), weight[self.hits]
        total = int(hit.sum())
        if total in (0, int(seen[-1])):
            return None
        # A hit that was not drawn may come before all others: 0 of 0, with weight 0.
        precision = hit.cumsum()[self.last_hits] / np.maximum(seen[self.ends], 1)
        return float((hit * precision).sum() / total)
