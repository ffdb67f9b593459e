"""95% intervals of metrics by the percentile bootstrap over images (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

_ENDS = (2.5, 97.5)
_RESAMPLES = 1000
_RANKED_RESAMPLES = 200


def _random(seed: int) -> np.random.RandomState:
    # RandomState, because its stream is frozen: a newer numpy must not move an interval.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def accuracy_interval(correct: Bool[np.ndarray, " q"], seed: int) -> tuple[float, float]:
    """Of the share of correct guesses, in percent.

    Correctness is yes or no, so a resample's count of yes is binomial: drawn at once, not image by
    image.
    """
    n = len(correct)
    counts = _random(seed).binomial(n, correct.mean(), _RESAMPLES)
    low, high = np.percentile(100.0 * counts / n, _ENDS)
    return float(low), float(high)


def mean_precision_interval(
    scores: Float[np.ndarray, "q l"], truth: Float[np.ndarray, "q l"], seed: int
) -> tuple[float, float]:
    """Of the mean over labels of the average precision, in percent; truth is 1, 0, or NaN.

    Images are drawn again, with all their labels. A label that a resample has of one kind only is
    left out of that one's mean. Each label is sorted once; a resample is a count for each image.
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
    """The images whose label is known, best score first, ready for many weightings of them.

    ``order``: which images. ``hits``: places in that order of those that have the label. ``ends``:
    for each hit, the last place of an equal score; ``last_hits``: how many hits, less one, up to
    there.
    """

    order: np.ndarray
    hits: np.ndarray
    ends: np.ndarray
    last_hits: np.ndarray

    @classmethod
    def of(cls, scores: Float[np.ndarray, " q"], truth: Float[np.ndarray, " q"]) -> Ranking:
        """Sort once."""
        known = np.flatnonzero(~np.isnan(truth))
        order = known[np.argsort(-scores[known], kind="stable")]
        falling = -scores[order]
        hits = np.flatnonzero(truth[order] == 1)
        ends = np.searchsorted(falling, falling[hits], side="right") - 1
        return cls(order, hits, ends, np.searchsorted(hits, ends, side="right") - 1)

    def average_precision(self, counts: np.ndarray) -> float | None:
        """The mean over hits of the precision at their score, each image as often as ``counts``.

        None where all images are hits, or none is.
        """
        weight = counts[self.order]
        seen, hit = weight.cumsum(), weight[self.hits]
        total = int(hit.sum())
        if total in (0, int(seen[-1])):
            return None
        # A hit that was not drawn may stand before all others: 0 of 0, with weight 0.
        precision = hit.cumsum()[self.last_hits] / np.maximum(seen[self.ends], 1)
        return float((hit * precision).sum() / total)
