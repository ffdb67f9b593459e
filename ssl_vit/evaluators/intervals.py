"""Confidence intervals: 95 % of a metric, by the percentile bootstrap over images (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

_ENDS = (2.5, 97.5)
_RESAMPLES = 1000
_RANKED_RESAMPLES = 200


def _random(seed: int) -> np.random.RandomState:
    # RandomState, because its stream is frozen: a newer numpy must not change an interval.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def accuracy_interval(correct: Bool[np.ndarray, " q"], seed: int) -> tuple[float, float]:
    """Interval of the accuracy, in percent.

    Correctness is binary, so the number of correct images in a resample is binomial: it is drawn
    directly, not image by image.
    """
    n = len(correct)
    counts = _random(seed).binomial(n, correct.mean(), _RESAMPLES)
    low, high = np.percentile(100.0 * counts / n, _ENDS)
    return float(low), float(high)


def mean_precision_interval(
    scores: Float[np.ndarray, "q l"], truth: Float[np.ndarray, "q l"], seed: int
) -> tuple[float, float]:
    """Interval of the mean average precision over labels, in percent; truth is 1, 0, or NaN.

    Images are resampled with all their labels. A label with one outcome only in a resample is left
    out of its mean. Each label is sorted once; a resample is a count for each image.
    """
    n = len(scores)
    ranked = [Ranking.of(s, t) for s, t in zip(scores.T, truth.T, strict=True)]
    random, means = _random(seed), []
    for _ in range(_RANKED_RESAMPLES):
        counts = np.bincount(random.randint(0, n, n), minlength=n)
        found = [p for r in ranked if (p := r.average_precision(counts)) is not None]
        if found:
            means.append(100.0 * float(np.mean(found)))
    low, high = np.percentile(means, _ENDS)
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
