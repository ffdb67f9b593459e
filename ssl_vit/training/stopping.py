"""Signal handling: signals become a stop request, honoured at the end of a step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

log = logging.getLogger("ssl_vit")


class _Interrupted(BaseException):
    """Interruption of :meth:`StopSignal.breaking_off`; a kind that no code in between catches."""


class StopSignal:
    """Stop signal: SIGINT, SIGTERM and Slurm's SIGUSR2 request a stop at the end of the step.

    ``received`` is the number of the last signal, or 0. A second SIGINT has its usual effect at
    once; schedulers send the others repeatedly, while the run is saving.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    received = 0
    breaks_off = False

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Context manager for work that may be left unfinished: a signal interrupts it at once."""
        try:
            self.breaks_off = not self.received
            yield
        except _Interrupted:
            log.warning("a signal was received: the probe of the encoder is interrupted")
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
            raise _Interrupted

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
