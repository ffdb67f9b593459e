"""Signal handling: signals become a stop request, honoured between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class _Interrupted(BaseException):
    """Interruption of :meth:`StopSignal.unless_stopped`; a kind that no code in between catches."""


class StopSignal:
    """Stop signal: SIGINT, SIGTERM, SIGHUP and Slurm's SIGUSR2 request a stop between two steps.

    ``received`` is the number of the last signal, or 0. A second SIGINT has its usual effect at
    once; schedulers send the others repeatedly, while the run is saving. SIGHUP (the terminal was
    closed) stays ignored where it is ignored already, as under nohup.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
    received = 0
    breaks_off = False

    def unless_stopped(self, work: Callable[[], object]) -> bool:
        """Do work that may be left unfinished; true if it was done. A signal interrupts it at once,
        and one that came before prevents it."""
        try:
            try:
                self.breaks_off = True
                if not self.received:
                    work()
            finally:
                self.breaks_off = False
        except _Interrupted:
            return False
        return not self.received

    def __enter__(self) -> StopSignal:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [s for s in self.signals if s != signal.SIGHUP or not ignored]
        self.before = {s: signal.signal(s, self._note) for s in taken}
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
