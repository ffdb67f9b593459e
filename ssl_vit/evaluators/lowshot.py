"""Low-shot evaluation: seeded subsets of labelled images, and mean scores over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import permute
from ssl_vit.evaluators.score import Score


def subsets(
    labels: Tensor,
    per_class: int | None,
    fraction: float | None,
    seed: int,
    classes: Sequence[str] | None = None,
) -> Int64[Tensor, " rows"]:
    """Subset rows, ascending: ``per_class`` images, or a ``fraction`` of each class, at least one.

    A function of the labels, the seed and the amount; with the same seed, smaller subsets are
    contained in larger ones. With several labels per image (n, L), a fraction of all images.

    Raises:
        UserError: not exactly one of the two amounts is given, or a class has too few images.
    """
    one = (per_class is None) != (fraction is None)
    check(one, f"a subset needs images per class or a fraction; given: {per_class}, {fraction}")
    check(per_class is None or per_class >= 1, f"{per_class} images per class; at least 1")
    check(fraction is None or 0 < fraction <= 1, f"a fraction of {fraction}; above 0, at most 1")
    n = len(labels)
    shuffled = torch.from_numpy(permute(np.arange(n, dtype=np.int64), n, fold(seed, n)))
    labels = labels.cpu()
    if labels.ndim == 2:
        check(
            per_class is None,
            "images with several labels have no single class; give a share of all images, as "
            "--fraction 0.25",
        )
        assert fraction is not None
        return shuffled[: max(1, round(fraction * n))].sort().values
    check(bool((labels >= 0).all()), "a subset by class needs the label of every image")
    counts = labels.bincount()
    if per_class is not None:
        few = ((counts > 0) & (counts < per_class)).nonzero()[:, 0].tolist()
        names = [classes[c] if classes else str(c) for c in few[:1]]
        there = f"class {names[0]!r} has {counts[few[0]]} images" if few else ""
        check(not few, f"{there}; {per_class} per class are asked")
        amounts = torch.full_like(counts, per_class)
    else:
        assert fraction is not None
        amounts = (counts * fraction).round().clamp_min(1).long()
    # Shuffled, then sorted by class: the first of each class are a random sample of it.
    order = shuffled[labels[shuffled].argsort(stable=True)]
    within = torch.arange(n) - (counts.cumsum(0) - counts)[labels[order]]
    return order[within < amounts[labels[order]]].sort().values


def over_seeds(scores: Sequence[Score]) -> Score:
    """Mean score over several seeds.

    The interval is the mean of theirs, so it covers the sampling of validation images only; the
    standard deviation over seeds (sample, n - 1) is in the details, with each seed's numbers.
    ``confusion`` is the sum.
    """
    first = scores[0]
    features, setting = (
        names.pop() if len(names := {getattr(s, of) for s in scores}) == 1 else "chosen for each"
        for of in ("features", "setting")
    )
    spread = {m: _deviation([s.metrics[m] for s in scores]) for m in first.metrics}
    seeds: list[dict[str, Any]] = [
        {
            "features": s.features,
            "setting": s.setting,
            "metrics": s.metrics,
            "interval": list(s.interval),
            "details": s.details,
        }
        for s in scores
    ]
    ends = np.mean([s.interval for s in scores], axis=0)
    tables = [s.confusion for s in scores if s.confusion is not None]
    shared = [name for name in first.per_class if all(name in s.per_class for s in scores)]
    return Score(
        features,
        setting,
        {m: float(np.mean([s.metrics[m] for s in scores])) for m in first.metrics},
        (float(ends[0]), float(ends[1])),
        {name: float(np.mean([s.per_class[name] for s in scores])) for name in shared},
        np.sum(tables, axis=0).tolist() if len(tables) == len(scores) else None,
        {"standard_deviation": spread, "seeds": seeds},
    )


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
