"""Signals become a request that the training meets at the end of a step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

log = logging.getLogger("ssl_vit")


class _BrokenOff(BaseException):
    """Of no kind that anybody catches on the way."""


class StopSignal:
    """SIGINT, SIGTERM, and Slurm's SIGUSR2, become a request, met at the end of the step.

    ``received`` is the last one's number, or 0. A second SIGINT has its usual effect at once; the
    others come more than once from a scheduler, and the run is saving then.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    received = 0
    breaks_off = False

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Inside, what is done may be left undone: a signal ends it at once."""
        try:
            self.breaks_off = not self.received
            yield
        except _BrokenOff:
            log.warning("a signal came: the look at what was learnt is broken off")
        finally:
            self.breaks_off = False

    def __enter__(self) -> StopSignal:
        self.before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[signal.SIGINT])
        if self.breaks_off:
            self.breaks_off = False
            raise _BrokenOff

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
