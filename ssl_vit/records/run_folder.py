"""Run folder: reads a run in any state, complete or damaged."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from ssl_vit.common.errors import UserError
from ssl_vit.common.schedules import Length
from ssl_vit.records.run_files import (
    Stamp,
    find_runs,
    newest_checkpoint,
    read_exported,
    read_metrics,
    read_run_config,
    stamp,
)
from ssl_vit.records.run_state import RunState, Traces, gone, run_state_of
from ssl_vit.records.status import STATUS_FILE, Status, read_status
from ssl_vit.training.run_files import CONFIG_FILE, METRICS_FILE
from ssl_vit.training.smoothing import SmoothedRate

__all__ = ["Run", "find_runs", "read_run"]
# Files of the final scores.
_RESULTS = ("results.json", "finetune.json", "detect.json")
_FINETUNE, _DETECT = "finetune", "detect"
# Metrics of seconds not spent on training.
PAUSES = ("saving_s", "looking_s")


@dataclass(frozen=True)
class Run:
    """Run as read from its folder. Any part may be missing.

    Attributes:
        folder: the run's.
        config: its options, as ``group.option``; empty where ``config.yaml`` is missing or damaged.
        rows: of ``metrics.jsonl``, each with its ``step``.
        status: content of ``status.json``.
        problems: each file that is missing or damaged, in a line.
        state: ``running``; ``finished``; ``stopped`` by a signal; ``failed`` by an error;
            ``killed``: its process ended without recording it; ``silent``: on another machine, and
            has written nothing for far too long; ``unknown``: it has recorded no status.
        said: message with the reason of the state, in a line; empty if there is none.
        updated: time of the last write; Unix time in seconds, 0 if never.
        metrics_stamp, torn: stamp of ``metrics.jsonl``; number of its unreadable lines.
        exported_by: method recorded in the exported weights.
        known_epoch: steps per epoch, from the number of images in a checkpoint.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    status: Status | None = None
    problems: list[str] = field(default_factory=list)
    state: RunState = "unknown"
    said: str = ""
    updated: float = 0.0
    metrics_stamp: Stamp | None = None
    torn: int = 0
    exported_by: str = ""
    known_epoch: int | None = None

    @property
    def method(self) -> str:
        """Method or kind of the run (``mae``, ``finetune``): by its status, else its exported
        weights; empty where unknown."""
        named = self.status.name if self.status else ""
        tuned = _FINETUNE if any(key.startswith("tune.") for key in self.config) else ""
        return named or self.exported_by or tuned

    @property
    def step(self) -> int:
        """Optimizer steps done, by its status or metrics."""
        return max(
            self.rows[-1]["step"] if self.rows else 0, self.status.step if self.status else 0
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch, where known."""
        return (self.status and self.status.steps_per_epoch) or self.known_epoch

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run, where known."""
        if self.status and self.status.total:
            return self.status.total
        try:
            length = Length.parse(str(self.config.get("run.length")), "run.length")
        except UserError:
            return None
        if length.unit == "ep" and not self.steps_per_epoch:
            return None
        return max(1, length.steps(self.steps_per_epoch or 1))

    @property
    def images_per_step(self) -> int | None:
        """Effective batch size, where known."""
        if self.status and self.status.images_per_step:
            return self.status.images_per_step
        size = self.config.get("optim.batch_size")
        return size if isinstance(size, int) and size > 0 else None

    def series(self, name: str) -> list[tuple[int, float]]:
        """Series of the finite values logged under a name, with their steps, in order."""
        return [(row["step"], float(row[name])) for row in self.rows if finite(row.get(name))]

    def latest(self, name: str) -> float | None:
        """Latest finite value logged under a name."""
        values = (row[name] for row in reversed(self.rows) if finite(row.get(name)))
        return next((float(value) for value in values), None)

    @property
    def knn(self) -> tuple[str, float] | None:
        """k-NN accuracy, the latest: name (``knn20_cls``) and value in percent.

        Of the feature that the method trains; the best one where that is not recorded.
        """
        own = f"_{self.status.pooling}" if self.status and self.status.pooling else ""
        for row in reversed(self.rows):
            found = {k: v for k, v in row.items() if re.match(r"knn\d+", k) and finite(v)}
            for name in sorted(found, key=lambda k: (k.endswith(own), found[k]), reverse=True):
                return name, float(found[name])
        return None

    @property
    def warnings(self) -> list[str]:
        """Warnings since the last metrics row."""
        last = max((row["step"] for row in self.rows if "loss" in row), default=0)
        late = (row.get("warning") for row in self.rows if row["step"] >= last)
        return [line for line in late if isinstance(line, str)]

    @property
    def images_per_second(self) -> float | None:
        """Images per second over all processes, as usual in the last minute of the run.

        Smoothed as the run's own line of progress. Where the batch size is unknown, lines do not
        say how long they took, and the minute is a longer time.
        """
        rate = SmoothedRate(self._intervals())
        return (self.images_per_step or 1) / rate.seconds if rate.intervals else None

    def _intervals(self) -> Iterator[tuple[int, float]]:
        """Steps and seconds of each metrics row with a rate, newest first."""
        size = self.images_per_step or 1
        rows = (row for row in reversed(self.rows) if finite(row.get("images_per_s")))
        for row, before in pairwise(chain(rows, [{"step": 0}])):
            steps, rate = row["step"] - before["step"], row["images_per_s"]
            if rate > 0 and steps > 0 and finite(steps):
                yield steps, size / rate * steps

    @property
    def seconds_left(self) -> float | None:
        """Seconds left, at the usual rate of the last minute; None unless it is running."""
        rate, size, total = self.images_per_second, self.images_per_step, self.total
        if self.state != "running" or not rate or not size or total is None:
            return None
        return max(0, total - self.step) * size / rate

    @property
    def resume(self) -> str:
        """Command that resumes the run; empty if it is running, has finished, or has not recorded
        how it was started."""
        command = self.status.command if self.status else ""
        if not command and self.method:
            door = "evaluate" if self.method in (_FINETUNE, _DETECT) else "pretrain"
            of = f"{door} {self.method}"
            command = f"python -m ssl_vit.{of}"
        if self.state in ("running", "finished") or not command or not self.config:
            return ""
        again = f"{command} --config {shlex.quote(str(self.folder / CONFIG_FILE))}"
        # It may have been moved, or started from another folder.
        own = Path(str(self.config.get("run.out", ""))).resolve() == self.folder.resolve()
        return again if own else f"{again} --run.out {shlex.quote(str(self.folder))}"


def read_run(folder: Path, known: Run | None = None) -> Run:
    """Read a run; missing or damaged files do not raise but are listed in ``problems``.

    ``known``: the same run as read before; its metrics are reused if their file has not changed.
    """
    status, problems = _read_status(folder)
    if status and status.state == "running" and gone(status):
        status, problems = _read_status(folder)  # it may have ended and recorded that in between
    path = folder / METRICS_FILE
    config, wrong = read_run_config(folder / CONFIG_FILE)
    problems += wrong
    metrics = stamp(path)
    if known is not None and metrics is not None and known.metrics_stamp == metrics:
        rows, torn = known.rows, known.torn
    else:
        rows, torn, wrong = read_metrics(path)
        just_begun = metrics is None and status is not None and status.step == 0
        problems += [] if just_begun else wrong
    if torn:
        lines = f"{torn} lines" if torn > 1 else "a line"
        problems.append(f"{path}: {lines} cannot be read, ignored")
    written = [s[1] / 1e9 for s in (metrics, stamp(folder / STATUS_FILE)) if s]
    run = Run(folder, config, rows, status, problems, updated=max(written, default=0.0))
    return _with_state(replace(run, metrics_stamp=metrics, torn=torn))


def _read_status(folder: Path) -> tuple[Status | None, list[str]]:
    """Status of a run, and problems of its file."""
    try:
        return read_status(folder), []
    except UserError as error:
        return None, [" ".join(str(error).split())]


def _with_state(run: Run) -> Run:
    """Complete a run by what follows from its weights and checkpoints, its state above all."""
    exported_by, exported, wrong = read_exported(run.folder)
    checkpoint, images = newest_checkpoint(run.folder)
    size = run.images_per_step
    run = replace(
        run,
        problems=run.problems + wrong,
        exported_by=exported_by,
        known_epoch=images // size if images and size else None,
    )
    traces = Traces(
        step=run.step,
        total=run.total,
        checkpoint=checkpoint,
        exported=exported,
        results=any((run.folder / name).is_file() for name in _RESULTS),
        written=run.updated,
        gap=_usual_gap(run),
    )
    state, said = run_state_of(run.status, traces)
    return replace(run, state=state, said=said)


def _usual_gap(run: Run) -> float | None:
    """Expected longest time between two metrics rows, in seconds: training at the last rate, and
    the longest pause for saving and probing."""
    lines = [row for row in run.rows if finite(row.get("images_per_s"))]
    if len(lines) < 2 or not run.images_per_step or lines[-1]["images_per_s"] <= 0:
        return None
    steps = max(1, lines[-1]["step"] - lines[-2]["step"])
    pauses = (sum(row[n] for n in PAUSES if finite(row.get(n))) for row in lines)
    return steps * run.images_per_step / float(lines[-1]["images_per_s"]) + max(pauses)


def finite(value: Any) -> bool:
    """True if a value of a row is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # also for integers too large for a float
