"""Speed of a run as people are shown it: what is usual of late, whatever a single interval says."""

from __future__ import annotations

from collections import deque
from statistics import median_low

# Of the intervals between lines, those of the last so many seconds, and at least so many of them.
_SECONDS, _LEAST = 60.0, 9


class Speed:
    """Steps per second, as the median over the intervals of the last minute.

    A machine that is busy for a moment changes nothing in it; one whose speed has changed for good
    does when half of the intervals say so. The mean would be pulled: one interval in ten that takes
    ten times as long halves it. What does return at intervals, as a slow disk, is in the median
    only if it takes the half of them: ``metrics.jsonl`` has each.
    """

    def __init__(self) -> None:
        self.intervals: deque[tuple[int, float]] = deque()

    def add(self, steps: int, seconds: float) -> None:
        """Take in an interval of so many steps, without what was not training."""
        self.intervals.append((steps, seconds))
        rest = sum(s for _, s in self.intervals) - self.intervals[0][1]
        while len(self.intervals) > _LEAST and rest >= _SECONDS:
            self.intervals.popleft()
            rest -= self.intervals[0][1]

    @property
    def seconds(self) -> float:
        """Seconds that a step usually takes."""
        return median_low([s / steps for steps, s in self.intervals])
