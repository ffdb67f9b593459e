"""Rate of a run as people are shown it: what is usual of late, whatever a single interval says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median_low

# Of the intervals between lines, those of the last so many seconds, and at least so many of them.
_SECONDS, _LEAST = 60.0, 9


class SmoothedRate:
    """Seconds per step, as the median over the intervals of the last minute.

    A machine that is busy for a moment changes nothing in it; one whose speed has changed for good
    does when half of the intervals say so. The mean would be pulled: one interval in ten that takes
    ten times as long halves it. What does return at intervals, as a slow disk, is in the median
    only if it takes the half of them: ``metrics.jsonl`` has each.

    Args:
        newest_first: intervals so far, as ``add`` takes them; no more are read than count.
    """

    def __init__(self, newest_first: Iterable[tuple[int, float]] = ()) -> None:
        self.intervals = _last_minute(newest_first)

    def add(self, steps: int, seconds: float) -> None:
        """Take in an interval of so many steps, without what was not training."""
        self.intervals.appendleft((steps, seconds))
        self.intervals = _last_minute(self.intervals)

    @property
    def seconds(self) -> float:
        """Seconds that a step usually takes."""
        return median_low([s / steps for steps, s in self.intervals])


def _last_minute(newest_first: Iterable[tuple[int, float]]) -> deque[tuple[int, float]]:
    """The newest intervals, up to the one with which they are enough."""
    taken, passed = deque[tuple[int, float]](), 0.0
    for steps, seconds in newest_first:
        taken.append((steps, seconds))
        passed += seconds
        if len(taken) >= _LEAST and passed >= _SECONDS:
            break
    return taken
