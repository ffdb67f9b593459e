"""Step breakdown: the time of each stage of a training step, measured from outside the trainer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch

from ssl_vit.benchmarks.speed import wait
from ssl_vit.common.task import Task
from ssl_vit.data.batch import Batch
from ssl_vit.methods.base import Method
from ssl_vit.objectives.base import Objective
from ssl_vit.training.loop import Trainer

WAITING, TRANSFER, DEVICE = "waiting for images", "transfer", "device augmentation"
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "clipping and optimizer"
AFTER, REST = "teacher and centre", "the rest"
STAGES = (WAITING, TRANSFER, DEVICE, FORWARD, BACKWARD, OPTIMIZER, AFTER, REST)


class StageTimer:
    """Stage timer: seconds of each stage of a step, measured between synchronisation points.

    The device is synchronised at the end of each stage. Work that would overlap is therefore timed
    one after the other, and on a GPU the sum exceeds the time of an undisturbed step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """Start of a step."""
        self.steps.append(defaultdict(float))
        wait(self.device)
        self.last = time.perf_counter()

    def end(self, stage: str) -> None:
        """End of a stage: the time since the last end is added to ``stage``."""
        wait(self.device)
        now = time.perf_counter()
        self.steps[-1][stage] += now - self.last
        self.last = now

    def medians(self) -> dict[str, float]:
        """Median seconds of each stage that occurred, in the order of ``STAGES``."""
        seen = {stage for step in self.steps for stage in step}
        return {s: median(step[s] for step in self.steps) for s in STAGES if s in seen}


def breakdown(
    trainer: Trainer, next_batch: Callable[[], Batch], steps: int, loads: bool
) -> dict[str, float]:
    """Step breakdown: median seconds of each stage of an optimizer step.

    ``loads``: whether ``next_batch`` waits for a loader; that wait is then a stage of its own.
    """
    timer = StageTimer(trainer.parallel.device)
    with _hooked(trainer, timer):
        for _ in range(steps):
            trainer.task.train()
            timer.begin()
            batch = next_batch()
            if loads:
                timer.end(WAITING)
            with _timed_method(batch.views, "to", timer, TRANSFER):
                trainer.update([batch])
            timer.end(REST)
            trainer.step += 1
    return timer.medians()


@contextmanager
def _hooked(trainer: Trainer, timer: StageTimer) -> Iterator[None]:
    """Context: the trainer's calls of its modules and of the task's hooks end stages."""
    task = trainer.task
    with ExitStack() as stack:
        for module, stage in ((trainer.normalize, DEVICE), (trainer.model, FORWARD)):
            begins = module.register_forward_pre_hook(lambda *_: timer.end(REST))
            ends = module.register_forward_hook(lambda *_, stage=stage: timer.end(stage))
            stack.callback(begins.remove)
            stack.callback(ends.remove)
        stack.enter_context(_timed_method(task, "before_update", timer, OPTIMIZER, BACKWARD))
        after = AFTER if _acts_after(task) else REST
        stack.enter_context(_timed_method(task, "after_update", timer, after, OPTIMIZER))
        yield


def _acts_after(task: Task) -> bool:
    """True if it, or an objective of it, does anything after the optimizer's step."""
    objectives = [m for m in task.modules() if isinstance(m, Objective)]
    passes_on = type(task).after_update in (Task.after_update, Method.after_update)
    return not passes_on or any(
        type(o).after_update is not Objective.after_update for o in objectives
    )


@contextmanager
def _timed_method(
    owner: Any, name: str, timer: StageTimer, stage: str, before: str = REST
) -> Iterator[None]:
    """Context: a method of one object is a stage; the time until its call belongs to ``before``."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        timer.end(before)
        result = method(*args, **kwargs)
        timer.end(stage)
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)
