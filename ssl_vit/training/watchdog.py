"""Watchdog: detects hung processes; each monitors its own progress and, via the store, the others'.

The timeout of a collective does not name the process that is missing. Here the hung processes log
their own stacks before the process group's timeout ends the run.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from platform import node
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

log = logging.getLogger("ssl_vit")
_LONGEST_INTERVAL = 5.0
# Step posted by a process that has left the training loop: no other process waits for it.
_LEFT = -1


class RunPosition(NamedTuple):
    """Progress of a process; of two, the smaller one is behind."""

    step: int
    phase: int
    """Index of the phase within the step."""
    doing: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


class ProcessState(NamedTuple):
    """Last known state of a process: progress, host, heartbeat, and when that last changed."""

    place: RunPosition
    host: str
    beat: int
    heard: float


class Watchdog:
    """Watchdog: logs an error, once per stall, when this process makes no progress for ``seconds``.

    The processes that are furthest behind log their stacks; process 0 names those it waits for,
    and those that do not respond. A context manager; its threads never raise, and never keep the
    process from exiting.

    Args:
        rank, world: of this process.
        seconds: without progress, before it is reported.
        store: through which the processes exchange their progress; the process group's if None.
        ends: whether a stall for which another process is missing ends this one, with status 1.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        seconds: float,
        store: dist.Store | None = None,
        ends: bool = False,
    ) -> None:
        self.rank, self.seconds, self.ends = rank, seconds, ends
        # Frequent enough that the report precedes a timeout that is a third longer.
        self.interval = min(_LONGEST_INTERVAL, seconds / 20)
        # How long another process may be silent.
        self.patience = seconds / 4
        self.now = RunPosition(0, 0, "before its first step"), time.monotonic()
        self.reported = 0.0
        self.left, self.well = threading.Event(), False
        self.board: Board | None = None
        if world > 1:
            self.board = Board(rank, world, store or dist.distributed_c10d._get_default_store())

    def at(self, step: int, doing: str) -> None:
        """Record progress: ``doing`` in step ``step``. All processes go through the same phases."""
        before = self.now[0]
        phase = before.phase + 1 if step == before.step else 0
        self.now = RunPosition(step, phase, doing), time.monotonic()

    def __enter__(self) -> Watchdog:
        self.threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.board:
            meet = threading.Thread(target=self._meet, name="watchdog's board", daemon=True)
            self.threads.append(meet)
        self._arm()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.well = kind is None
        self.left.set()
        for thread in self.threads:
            # Not longer: the store itself may hang. Not shorter: a store call that returned while
            # Python shuts down would abort the process.
            thread.join(timeout=1)
        faulthandler.cancel_dump_traceback_later()

    def _meet(self) -> None:
        """Exchange progress with the others; in a thread of its own, as the store may block."""
        assert self.board is not None
        try:
            while not self.left.wait(self.interval):
                place, since = self.now
                # The others are read only when this process seems to be stuck.
                still = time.monotonic() - since > self.seconds / 2
                self.board.exchange(place, ask=still)
            if self.well:
                self.board.exchange(RunPosition(_LEFT, 0, ""), ask=False)
        except Exception:
            return  # the store is gone, and the run with it: the main thread will raise

    def _watch(self) -> None:
        checked = woke = time.monotonic()
        while not self.left.wait(self.interval):
            self._arm()
            place, since = self.now
            moment = time.monotonic()
            if moment - checked > self.seconds / 4:
                woke = moment  # the whole process was suspended: the others' states are stale
            checked = moment
            if moment - max(since, woke) >= self.seconds and since != self.reported:
                self.reported = since
                for line in self._report(place, moment - since):
                    log.error(line)
                if self.ends and self._abandoned():
                    log.error("stopped: another process has exited or did not respond in time")
                    # The main thread may never return from the device.
                    os._exit(1)

    def _abandoned(self) -> bool:
        """True if another process, or the store, has not responded for long."""
        board, patience = self.board, self.patience
        return board is not None and (board.unanswered() > patience or bool(board.silent(patience)))

    def _arm(self) -> None:
        """Arm faulthandler: a C thread dumps the stacks if no Python thread runs for that long."""
        faulthandler.dump_traceback_later(self.seconds, file=2)

    def _report(self, place: RunPosition, still: float) -> list[str]:
        """Log lines of this process after ``still`` seconds without progress."""
        own = f"process {self.rank} ({node()})"
        if self.board is None:
            return [f"{own} hangs at {place}, for {still:.0f} s; its stack:\n{stacks()}"]
        if (unanswered := self.board.unanswered()) > self.patience:
            # The store runs in process 0, or next to it. One process reports it.
            line = f"process 0 or its key-value store has not responded for {unanswered:.0f} s"
            return [f"{own} hangs at {place}, for {still:.0f} s: {line}"] * (self.rank == 1)
        moment, silent = time.monotonic(), self.board.silent(self.patience)
        peers = {r: p for r, p in self.board.peers.items() if p.place.step != _LEFT}
        reports = self.rank == min({self.rank} | (peers.keys() - silent.keys()))
        if silent:
            line = "process {} ({}) has not responded since {}, for more than {:.0f} s"
            lines = [line.format(r, p.host, p.place, moment - p.heard) for r, p in silent.items()]
            return lines if reports else []
        behind = {r: p for r, p in peers.items() if p.place < place}
        if not behind:
            return [f"{own} hangs at {place}, for {still:.0f} s; its stack:\n{stacks()}"]
        last = min(p.place for p in behind.values())
        names = [f"process {r} ({p.host})" for r, p in behind.items() if p.place == last]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        line = f"waits at {place}, for {still:.0f} s, for {', '.join(names[:3])}{more} at {last}"
        return [f"{own} {line}"] * reports


class Board:
    """Progress board: processes post their progress in a store and read the others'."""

    def __init__(self, rank: int, world: int, store: dist.Store) -> None:
        # A separate connection: a blocking call of another thread would block this one.
        self.store = dist.PrefixStore("watchdog", store.clone())
        self.rank, self.others = rank, [str(r) for r in range(world) if r != rank]
        self.peers: dict[int, ProcessState] = {}
        self.beat = 0
        self.answered = time.monotonic()

    def unanswered(self) -> float:
        """Seconds since the last completed exchange."""
        return time.monotonic() - self.answered

    def silent(self, patience: float) -> dict[int, ProcessState]:
        """Processes that have not left, and have shown no sign of life for so many seconds."""
        limit = time.monotonic() - patience
        peers = self.peers.items()
        return {r: p for r, p in peers if p.place.step != _LEFT and p.heard < limit}

    def exchange(self, place: RunPosition, ask: bool) -> None:
        """Post the progress of this process; with ``ask``, read the others'."""
        self.beat += 1
        self.store.set(str(self.rank), json.dumps([self.beat, node(), *place]))
        if ask:
            self._read()
        self.answered = time.monotonic()

    def _read(self) -> None:
        # Few calls, as all processes ask at once; multi_get would block on a missing key.
        there = self.others
        if not self.store.check(there):
            there = [name for name in there if self.store.check([name])]
        posts = dict(zip(there, self.store.multi_get(there) if there else [], strict=True))
        for name in self.others:
            self._take(int(name), posts.get(name, b""))

    def _take(self, rank: int, post: bytes) -> None:
        unknown = '[0, "host unknown", 0, 0, "before its first step"]'
        beat, host, *place = json.loads(post or unknown)
        before = self.peers.get(rank)
        heard = before.heard if before and before.beat == beat else time.monotonic()
        self.peers[rank] = ProcessState(RunPosition(*place), host, beat, heard)


def stacks() -> str:
    """Python stacks of all threads but the watchdog's, the main thread's first."""
    names = {t.ident: t.name for t in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    texts = []
    for ident in sorted(frames, key=lambda i: i != main):
        name = names.get(ident, "unnamed")
        if not name.startswith("watchdog"):
            stack = "".join(traceback.format_stack(frames[ident]))
            texts.append(f"thread {name}:\n{stack}")
    return "".join(texts).rstrip()
