"""Training log: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ssl_vit.common.distributed import all_reduce_mean, rank_and_world
from ssl_vit.common.duration import duration
from ssl_vit.common.figures import save_png
from ssl_vit.common.files import write_text_atomically
from ssl_vit.training.energy import Energy
from ssl_vit.training.pace import StepTimes
from ssl_vit.training.panels import (
    BOARD_FOLDER,
    PROJECTION,
    drop_pictures,
    panel_file,
    printable,
    projections,
    thin_panels,
)
from ssl_vit.training.run_files import METRICS_FILE, read_rows
from ssl_vit.training.run_lock import LockLost
from ssl_vit.training.shared_cores import SHARED
from ssl_vit.training.smoothing import SmoothedRate

log = logging.getLogger("ssl_vit")
_LINE_SECONDS = 10.0


class RunLog:
    """Run log: accumulates scalars on the device, and writes their means every ``every`` steps.

    Attributes:
        streak: of steps in a row that were skipped, up to the last row.

    Args:
        folder: the run's; files are written by the main process only.
        start, total: first and last step; rows of an earlier attempt after ``start`` are dropped.
        images_per_step: effective batch size, for the rate.
        energy: meter of this process' devices.
        shown: scalars shown in the progress line besides the loss.
        guard: called in the main process before anything is written; its error ends the run.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        every: int,
        images_per_step: int,
        main: bool,
        energy: Energy,
        shown: Sequence[str] = (),
        guard: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.energy, self.guard = folder, energy, guard
        self.start, self.total, self.every = start, total, every
        self.images_per_step, self.main, self.shown = images_per_step, main, shown
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by names: sums, and how many were finite
        self.streak = 0
        self.paused: dict[str, float] = {}
        self.count, self.step = 0, start
        self.smoothed = SmoothedRate()
        self.since = self.logged = time.perf_counter()
        self.progress: Progress | None = None
        if main:
            keep_rows(folder / METRICS_FILE, start or -1)  # a run that begins has no rows yet
            drop_pictures(folder, start)
            self.file = open(folder / METRICS_FILE, "a", buffering=1)  # noqa: SIM115
            self.board = SummaryWriter(str(folder / BOARD_FOLDER), purge_step=start and start + 1)
            self._start_progress()

    def _start_progress(self) -> None:
        """Progress bar on a terminal; plain lines in a log file."""
        console = Console(file=sys.stderr, markup=False, emoji=False)
        if console.is_terminal:
            # The time left is ours, of the speed that the line shows.
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            self.progress = Progress(*columns, console=console)
            self.bar = self.progress.add_task(
                "starting", total=self.total, completed=self.start, left=""
            )
            self.progress.start()

    def add(
        self,
        step: int,
        scalars: dict[str, Tensor],
        lr: float,
        pace: StepTimes,
        streak: Tensor | None = None,
    ) -> dict[str, float]:
        """Add the scalars of step ``step`` (counted from 1); returns their means if a row was due.

        Nothing is read from the device between rows. ``pace``: of all steps since the last row;
        ``streak``: how many steps in a row were skipped, this one the last.
        """
        names = tuple(scalars)
        values = torch.stack([value.detach().float() for value in scalars.values()])
        finite = torch.isfinite(values)
        # A skipped step's NaN would hide the other steps of the interval.
        both = torch.stack([torch.where(finite, values, 0), finite.float()])
        self.sums[names] = self.sums.get(names, 0) + both
        self.count, self.step = self.count + 1, step
        return self._flush(step, lr, pace, streak) if self.due(step) else {}

    def due(self, step: int) -> bool:
        """True if a row is written after ``step`` steps."""
        return step % self.every == 0 or step == self.total

    def _flush(
        self, step: int, lr: float, pace: StepTimes, streak: Tensor | None
    ) -> dict[str, float]:
        row, joules = self._means(streak)
        seconds = time.perf_counter() - self.since
        rate = self.images_per_step * self.count / seconds
        waited, own = pace.take(self.count)
        row |= {"lr": lr, "images_per_s": rate, "waiting": waited / seconds}
        row |= self.paused | ({"energy_j": joules} if math.isfinite(joules) else {})
        if len(own) > 1:
            row |= {"slowest_s": max(own), "median_s": median_low(own)}
        self.write(step, row, "train")
        if self.main and len(own) > 1:
            shown = [float(f"{seconds:.4g}") for seconds in own]
            self.file.write(json.dumps({"step": step, "process_s": shown}) + "\n")
        self.smoothed.add(self.count, seconds)
        self._log_line(step, row, SHARED if pace.cores.shared else "")
        self.sums, self.count, self.paused = {}, 0, {}
        self.since = time.perf_counter()
        return row

    def _means(self, streak: Tensor | None) -> tuple[dict[str, float], float]:
        """Means of the scalars since the last row, over steps and processes, and joules of all
        processes: NaN unless all devices have a counter. One copy from the device."""
        rows = torch.cat(list(self.sums.values()), dim=1)
        own = rows.new_full((1,), self.energy.take())
        last = rows.new_zeros(1) if streak is None else streak.view(1)
        found = all_reduce_mean(torch.cat([rows.flatten(), own, last])).cpu()
        self.streak = round(float(found[-1]))  # the same in all processes
        totals: dict[str, Tensor] = {}  # steps may differ in what they name
        names = [name for names in self.sums for name in names]
        for name, of_steps in zip(names, found[:-2].view(2, -1).unbind(1), strict=True):
            totals[name] = totals.get(name, 0) + of_steps
        means = {name: float(total / count) for name, (total, count) in totals.items()}
        return means, float(found[-2]) * rank_and_world()[1]

    def warn(self, step: int, line: str) -> None:
        """Log a warning, also to metrics.jsonl and as text in TensorBoard."""
        log.warning(line)
        if self.main:
            self.guard()
            self.file.write(json.dumps({"step": step, "warning": line}) + "\n")
            self.board.add_text("warning", line, step)

    def pause(self, name: str, seconds: float) -> None:
        """Exclude time that was not training from the rate; the next row logs it as ``name``."""
        self.since += seconds
        self.paused[name] = self.paused.get(name, 0.0) + seconds

    def write(self, step: int, row: dict[str, float], group: str) -> None:
        """Write a row of metrics.jsonl, and TensorBoard scalars ``group/name``."""
        if not self.main:
            return
        self.guard()
        shown = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in row.items()}
        self.file.write(json.dumps({"step": step, **shown}) + "\n")
        for name, value in row.items():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an (H, W, 3) uint8 picture to TensorBoard and as PNG: the newest, and by step."""
        if self.main:
            self.guard()
            self.board.add_image(name, image, step, dataformats="HWC")
            file = panel_file(self.folder, name, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_png(file, image)
            thin_panels(file.parent)
            save_png(self.folder / f"{name}.png", image)

    def projection(
        self, step: int, features: Tensor, kind: str, labels: list[str], images: np.ndarray
    ) -> None:
        """Log features (n, D), labels and square pictures (n, s, s, 3) to TensorBoard's projector.

        ``kind``: of label: class, labels (several each) or unlabelled. Only the newest is kept: it
        is far larger than everything else that is logged.
        """
        if not self.main:
            return
        self.guard()
        older = projections(self.folder)
        if step in older:
            shutil.rmtree(older.pop(step).parent)
        vars(self.board).pop("_projector_config", None)  # the writer would list all earlier ones
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        # A single column has no header; with two, the header names the first one.
        rows = [[printable(label), str(i)] for i, label in enumerate(labels)]
        header = [kind, "image"]
        self.board.add_embedding(features, rows, pictures, step, PROJECTION, header)
        for path in older.values():
            shutil.rmtree(path.parent)

    def _log_line(self, step: int, row: dict[str, float], note: str = "") -> None:
        if not self.main:
            return
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in ("loss", *self.shown))
        text = f"step {step}/{self.total}  {shown}  lr {row['lr']:.2e}  "
        text += f"{self.images_per_step / self.smoothed.seconds:.0f} img/s"
        text += f"  {note}" if note else ""
        left = f"{duration((self.total - step) * self.smoothed.seconds)} left"
        if self.progress:
            self.progress.update(self.bar, completed=step, description=text, left=left)
            return
        now = time.perf_counter()
        if now - self.logged >= _LINE_SECONDS or step == self.total:
            self.logged = now
            print(f"{text}  {left}", file=sys.stderr, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.progress:
            self.progress.stop()
        if self.main:
            if self.paused and not isinstance(error, LockLost):  # after the last line of means
                self.write(self.step, self.paused, "train")
            self.file.close()
            self.board.close()


def note_outcome(
    folder: Path, step: int, options: dict[str, Any], outcome: dict[str, float]
) -> None:
    """Log a run's options with its results, as a row of TensorBoard's HPARAMS.

    ``options``: by name; ``outcome``: by name, also scalars at ``step``.
    """
    plain = {
        k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in options.items()
    }
    with SummaryWriter(str(folder / BOARD_FOLDER)) as board:
        for name, value in outcome.items():
            board.add_scalar(name, value, step)
        for summary in hparams(plain, outcome):
            board.file_writer.add_summary(summary)


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows after ``step``: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
    text = "".join(f"{line}{os.linesep}" for line in kept)
    write_text_atomically(path, text)
