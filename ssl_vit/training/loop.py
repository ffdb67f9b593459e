"""Training loop: trains any Task and names no method."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.distributed import gather_texts
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.seeds import fold, seed_generators
from ssl_vit.common.task import Task
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.drop_path import batch_share
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.clipping import clip_gradients
from ssl_vit.training.failures import memory_of_a_step
from ssl_vit.training.health import Alarm
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.optim import (
    Schedule,
    SpikeGuard,
    guarded_step,
    make_optimizer,
    set_rates,
)
from ssl_vit.training.pace import StepTimes
from ssl_vit.training.parallel import Parallel, autocast, casts_kept
from ssl_vit.training.shards import blank_copy, put_together
from ssl_vit.training.stopping import StopSignal
from ssl_vit.training.watchdog import Watchdog

log = logging.getLogger("ssl_vit")


@dataclass(frozen=True)
class Hook:
    """Hook: called every ``every`` steps and after the last, as to save or to probe the encoder.

    ``name``: the metric under which the seconds that it takes are logged. ``call``: all processes
    call it; if it returns a function, that is called next and may take long: a signal interrupts
    it, so it must not use collectives. ``when_stopped``: also called when a signal ends the run
    before its last step. ``at_once``: also called before the first step.
    """

    name: str
    every: int
    call: Callable[[int], Callable[[], object] | None]
    when_stopped: bool = False
    at_once: bool = False

    def due(self, step: int, total: int) -> bool:
        """True if the hook is called after ``step`` steps of ``total``."""
        return step % self.every == 0 or step == total


class Trainer:
    """Trainer: a task, its optimizer and schedule, and the step number; this is the whole state."""

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
        self.blank = blank_copy(task) if parallel.sharded else task
        parallel.shard(task, precision)
        self.optimizer = make_optimizer(task, optim, precision)
        groups = self.optimizer.param_groups
        self.trained = [p for group in groups for p in group["params"]]
        self.encoder = [p for group in groups if group["encoder"] for p in group["params"]]
        check(
            not schedule.frozen or len(self.encoder) < len(self.trained),
            "--optim.freeze-encoder leaves nothing to train: nothing here has a head",
        )
        if schedule.frozen >= schedule.total:
            log.warning("warning: --optim.freeze-encoder is the whole run: the encoder never moves")
        names = {parameter: task.network_of(name) for name, parameter in task.named_parameters()}
        self.networks = [names[parameter] for parameter in self.trained]
        self.model = parallel.wrap(task)
        self.step = self.kept = 0  # steps done, and how many of them when it was last saved
        self.streak = torch.zeros((), device=parallel.device)
        self.guard = SpikeGuard(optim.spike, parallel.device)
        self.alarm = Alarm(after=schedule.warmup)
        self.pace = StepTimes(parallel)

    def train(
        self,
        batches: Iterator[Batch],
        bad: BadImages,
        runlog: RunLog,
        hooks: list[Hook],
        checkpoints: Checkpoints,
    ) -> int:
        """Train from ``self.step`` to the schedule's end; returns 0, or the signal that stopped it.

        Raises:
            RunFailed: too many steps in a row had a non-finite loss or gradient, images cannot be
                loaded any more, a step does not fit into memory, or a checkpoint cannot be written.
            UserError: too many images are unreadable.
        """
        self.kept = self.step
        with StopSignal() as stop, self.parallel.watchdog(self.run.timeout) as watch:
            watch.at(self.step, "saving or probing")
            self._call([hook for hook in hooks if hook.at_once], runlog, stop)
            while self.step < self.schedule.total:
                watch.at(self.step, "waiting for images")
                parts, failure = self._next(batches, bad, stop)
                watch.at(self.step, "synchronizing with the other processes")
                stopped, failure = self._agree(stop, failure, bad, checkpoints)
                if stopped or failure:
                    return self._end_early(stopped, failure, hooks, runlog, stop, checkpoints)
                watch.at(self.step, "computing")
                with memory_of_a_step(self.run, self.optim, self.step):
                    scalars = self.update(parts)
                self.step += 1
                due = self._due(hooks, runlog, watch)
                lr = self.schedule.lr(self.step - 1)
                if means := runlog.add(self.step, scalars, lr, self.pace, self.streak):
                    self._check(means, runlog, checkpoints)
                watch.at(self.step, "saving or probing")
                if due:
                    self._call(due, runlog, stop)
            checkpoints.finish()
        return 0

    def update(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Optimizer step over the accumulated parts; returns its scalars, still on the device."""
        schedule = self.schedule
        share = schedule.encoder_share(self.step)
        set_rates(self.optimizer, schedule.lr(self.step), schedule.weight_decay(self.step), share)
        self.optimizer.zero_grad(set_to_none=True)
        # Activation checkpointing frees activations until backward; cached weight casts would stay.
        several = len(parts) > 1 and not self.run.activation_checkpointing
        with casts_kept(self.parallel.device) if several else nullcontext():
            scalars = self._forward_backward(parts)
        self.task.before_update(self.step)
        if self.step < schedule.frozen:  # without a gradient neither decays nor moments move
            for parameter in self.encoder:
                parameter.grad = None
        norm = clip_gradients(self.trained, self.optim, self.networks)
        finite = torch.isfinite(scalars["loss"]) & torch.isfinite(norm)
        calm = self.guard.passes(scalars["loss"])
        took = guarded_step(self.optimizer, finite & calm)
        self.task.after_update(self.step, took)
        skipped, spike = (~took & calm).float(), (~calm).float()
        self.streak = (self.streak + skipped) * skipped
        counts = {"skipped": skipped} | ({"spikes": spike} if self.optim.spike else {})
        if schedule.frozen or schedule.released:
            counts["encoder_share"] = torch.full_like(norm, share)
        return {**scalars, "grad_norm": norm, **counts}

    def whole(self, device: torch.device | None = None) -> Task:
        """The unsharded task. All processes must call it.

        If sharded, it is gathered on ``device`` (the trainer's own if None), with weights on the
        main process only.
        """
        if not self.parallel.sharded:
            return self.task
        device = device or self.parallel.device
        return put_together(self.blank, self.task, self.parallel.main, device)

    def _forward_backward(self, parts: list[Batch]) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        rank, world = self.parallel.rank, self.parallel.world
        # Random numbers are seeded from the step, so no generator state needs saving.
        key = fold(self.run.seed, self.step)
        seed_generators(fold(key, rank), self.parallel.device)
        for i, batch in enumerate(parts):
            views = self.normalize(batch.views.to(self.parallel.device))
            share = batch_share(i * world + rank, len(parts) * world, len(views.keys), key)
            with share, self.parallel.sync(self.model, last=i == len(parts) - 1):
                with self.pace, autocast(self.parallel.device, self.precision):
                    scalars = self.model(views, self.step)
                (scalars["loss"] / len(parts)).backward()
            for name, value in scalars.items():
                means[name] = means.get(name, 0) + value.detach() / len(parts)
        return means

    def _next(
        self, batches: Iterator[Batch], bad: BadImages, stop: StopSignal
    ) -> tuple[list[Batch], str]:
        """The parts of the next step, and why there are none, if loading fails. A signal ends the
        wait for them, which may be long."""
        parts: list[Batch] = []
        wanted = range(self.optim.accumulate)
        try:
            with self.pace.waiting():
                stop.unless_stopped(lambda: parts.extend([next(batches) for _ in wanted]))
        except RunFailed as error:
            return [], str(error)
        for batch in parts:
            bad.note(batch)
        return parts, ""

    def _agree(
        self, stop: StopSignal, failure: str, bad: BadImages, checkpoints: Checkpoints
    ) -> tuple[int, str]:
        """Synchronize signals, failures, bad images and saves before a step; the signal to stop on,
        or 0, and the first failure."""
        flags = stop.received, bool(failure), bad.news, *checkpoints.state()
        signalled, fails, news, failed, busy = self.parallel.most(*flags)
        if news:
            try:
                bad.count()
            except UserError:
                checkpoints.finish()
                raise
        checkpoints.go_on(bool(failed), bool(busy))
        return int(signalled), self.parallel.first(gather_texts(failure)) if fails else ""

    def _due(self, hooks: list[Hook], runlog: RunLog, watch: Watchdog) -> list[Hook]:
        """Hooks that are called after this step. Where they, or a row of the log, read from the
        device, all processes meet before, on the host."""
        due = [hook for hook in hooks if hook.due(self.step, self.schedule.total)]
        if due or runlog.due(self.step):
            watch.at(self.step, "synchronizing with the other processes")
            self.parallel.meet()
        return due

    def _end_early(
        self,
        stopped: int,
        failure: str,
        hooks: list[Hook],
        runlog: RunLog,
        stop: StopSignal,
        checkpoints: Checkpoints,
    ) -> int:
        """Save, unless this step is saved already, and end on a signal or a failure to load."""
        if self.step != self.kept:
            self._call([hook for hook in hooks if hook.when_stopped], runlog, stop)
        checkpoints.finish()
        if not stopped:
            saved = f" (step {self.step} is saved)" if self.step else ""
            raise RunFailed(f"{failure}{saved}", everywhere=True)
        return stopped

    def _call(self, hooks: list[Hook], runlog: RunLog, stop: StopSignal) -> None:
        """Call hooks, which may set the task to evaluation, and set it to training."""
        for hook in hooks:
            started = time.perf_counter()
            self.kept = self.step if hook.when_stopped else self.kept
            if (rest := hook.call(self.step)) and not stop.unless_stopped(rest):
                log.warning("a signal was received: the probe of the encoder is interrupted")
            runlog.pause(hook.name, time.perf_counter() - started)
        self.task.train()

    def _check(self, means: dict[str, float], runlog: RunLog, checkpoints: Checkpoints) -> None:
        """Health check on the means of the last steps: logs warnings, stops if not finite."""
        if math.isfinite(means["loss"]):  # else no step of the interval was finite
            for line in self.alarm.news(self.step, self.task.concerns(means)):
                runlog.warn(self.step, line)
        for line in self.pace.news(self.step):
            runlog.warn(self.step, line)
        streak = runlog.streak
        if streak >= self.run.max_nonfinite:
            checkpoints.finish()
            raise RunFailed(
                f"the loss or gradient was not finite {streak} steps in a row, up to step "
                f"{self.step}; each was skipped. Lower --optim.lr, or set --optim.clip 1",
                everywhere=True,
            )
        if streak:
            log.warning("step %d: %d steps in a row not finite, skipped", self.step, streak)
