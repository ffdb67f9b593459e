"""Score: one row of a result file, and the names of a run's own rows; read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PIXELS, RANDOM, GIVEN, BEST = "raw pixels", "random encoder", "initial encoder", "best encoder"
"""Rows of a run's own result beside its trained encoder: what an encoder must beat, itself before
the first step (with random or given weights), and the best of a training on given ones, its step
aside."""
LAST = "last weights"
"""Setting of a network as training left it, not averaged."""
UNITS = {"rmse": "the unit of depth", "log10": "powers of ten"}
"""Metrics that are not in percent, and what they are in."""


@dataclass(frozen=True)
class Score:
    """Score: one row of a result; ``Score(**json)`` reads it back.

    ``metrics``, in percent but for those of ``UNITS``: top1 and top5, or map and auroc, or what an
    evaluator names; of the first, more is better. ``interval``: 95 %, of the first.
    ``per_class``: accuracy of each class that occurs, or average precision of each label.
    ``confusion``: images by class, rows the truth, columns the first guess; None for more than 100
    classes and for several labels.
    """

    features: str
    setting: str
    metrics: dict[str, float]
    interval: Sequence[float]
    per_class: dict[str, float]
    confusion: list[list[int]] | None
    details: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", tuple(self.interval))  # JSON makes a list of it

    @property
    def value(self) -> float:
        """First metric in percent: accuracy, or mean average precision over labels."""
        return next(iter(self.metrics.values()))

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return self.metrics["top1"]
