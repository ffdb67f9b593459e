"""The training loop. It trains any Task and names no method."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType, TracebackType

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ssl_vit.config import OptimConfig, RunConfig, RunFailed
from ssl_vit.data.augment import Normalize
from ssl_vit.data.loader import BadImages, Batch
from ssl_vit.seeds import fold
from ssl_vit.task import Task
from ssl_vit.training.health import Alarm
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.optim import (
    Schedule,
    clip_gradients,
    guarded_step,
    make_optimizer,
    set_rates,
)
from ssl_vit.training.parallel import Parallel, autocast

log = logging.getLogger("ssl_vit")


@dataclass(frozen=True)
class Hook:
    """Something to do every ``every`` steps and after the last: save, look at the encoder.

    ``when_stopped``: also when a signal ends the run before its last step.
    """

    every: int
    call: Callable[[int], None]
    when_stopped: bool = False

    def due(self, step: int, total: int, stopping: bool) -> bool:
        """Whether to call it after ``step`` steps of ``total``."""
        if stopping:
            return self.when_stopped
        return step % self.every == 0 or step == total


class Trainer:
    """A task, its optimizer and schedule, and the number of steps done: all the state there is."""

    def __init__(
        self,
        task: Task,
        run: RunConfig,
        optim: OptimConfig,
        schedule: Schedule,
        normalize: Normalize,
        parallel: Parallel,
        precision: torch.dtype,
    ) -> None:
        self.task, self.run, self.optim = task, run, optim
        self.schedule, self.normalize = schedule, normalize
        self.parallel, self.precision = parallel, precision
        task.set_length(schedule.total, schedule.steps_per_epoch)
        self.optimizer = make_optimizer(task, optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.model = parallel.wrap(task)
        self.step = 0
        self.streak = torch.zeros((), device=parallel.device)
        self.alarm = Alarm(after=schedule.warmup)

    def train(
        self, batches: Iterator[Batch], bad: BadImages, log: RunLog, hooks: list[Hook]
    ) -> bool:
        """Train from ``self.step`` to the schedule's end; false when a signal stopped it before.

        Raises:
            RunFailed: too many steps in a row had a non-finite loss or gradient.
            UserError: too many images are unreadable.
        """
        with StopSignal() as stop:
            while self.step < self.schedule.total:
                self.task.train()
                started = time.perf_counter()
                parts = [self._next(batches, bad) for _ in range(self.optim.accumulate)]
                waited = time.perf_counter() - started
                scalars = self.update(parts)
                self.step += 1
                means = log.add(self.step, scalars, self.schedule.lr(self.step - 1), waited)
                if means:
                    self._check_streak()
                    self._check_health(means, log)
                unfinished = self.step < self.schedule.total
                stopping = self.parallel.any(stop.requested) and unfinished
                self._call(hooks, log, stopping)
                if stopping:
                    return False
        return True

    def update(self, parts: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step from its accumulated parts; scalars that stay on the device."""
        # Dropout and its like follow from the step, so no generator's state need be saved.
        torch.manual_seed(fold(self.run.seed, self.step, self.parallel.rank))
        schedule = self.schedule
        set_rates(self.optimizer, schedule.lr(self.step), schedule.weight_decay(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        scalars = self._forward_backward(parts)
        self.task.before_update(self.step)
        norm = clip_gradients(self.trained, self.optim)
        finite = torch.isfinite(scalars["loss"]) & torch.isfinite(norm)
        finite = guarded_step(self.optimizer, finite)
        self.task.after_update(self.step, finite)
        skipped = (~finite).float()
        self.streak = (self.streak + skipped) * skipped
        return {**scalars, "grad_norm": norm, "skipped": skipped}

    def _forward_backward(self, parts: list[Batch]) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for i, batch in enumerate(parts):
            views = self.normalize(batch.views.to(self.parallel.device))
            with self._sync(last=i == len(parts) - 1):
                with autocast(self.parallel.device, self.precision):
                    scalars = self.model(views, self.step)
                (scalars["loss"] / len(parts)).backward()
            for name, value in scalars.items():
                means[name] = means.get(name, 0) + value.detach() / len(parts)
        return means

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients cross between processes once a step, with the last part."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _next(self, batches: Iterator[Batch], bad: BadImages) -> Batch:
        batch = next(batches)
        bad.add(batch.bad)
        return batch

    def _call(self, hooks: list[Hook], log: RunLog, stopping: bool) -> None:
        started = time.perf_counter()
        for hook in hooks:
            if hook.due(self.step, self.schedule.total, stopping):
                hook.call(self.step)
        log.pause(time.perf_counter() - started)

    def _check_health(self, means: dict[str, float], log: RunLog) -> None:
        if math.isfinite(means["loss"]):  # else no step of the interval says anything
            for line in self.alarm.news(self.step, self.task.concerns(means)):
                log.warn(self.step, line)

    def _check_streak(self) -> None:
        streak = int(self.streak.item())
        if streak >= self.run.max_nonfinite:
            raise RunFailed(
                f"the loss or gradient was not finite {streak} steps in a row, up to step "
                f"{self.step}; each was skipped. Lower --optim.lr, or set --optim.clip 1"
            )
        if streak:
            log.warning("step %d: %d steps in a row not finite, skipped", self.step, streak)


class StopSignal:
    """SIGINT, SIGTERM, and Slurm's SIGUSR2, become a request, met at the end of the step.

    A second signal has its usual effect at once.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    received = 0

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.received)

    def __enter__(self) -> StopSignal:
        self.before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._restore()
