"""Where the time of a training step goes, seen from outside the trainer."""

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
from ssl_vit.data.loader import Batch
from ssl_vit.methods.base import Method
from ssl_vit.objectives.base import Objective
from ssl_vit.training.loop import Trainer

WAITING, TRANSFER, DEVICE = "waiting for images", "transfer", "device augmentation"
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "clipping and optimizer"
AFTER, REST = "teacher and centre", "the rest"
PARTS = (WAITING, TRANSFER, DEVICE, FORWARD, BACKWARD, OPTIMIZER, AFTER, REST)


class Laps:
    """Seconds between borders, each given to the part that ends there.

    The device finishes its work at each border: what would overlap is counted in turn, so that on a
    GPU the sum is more than an undisturbed step takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """A new step."""
        self.steps.append(defaultdict(float))
        wait(self.device)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What went on since the last border was ``part``."""
        wait(self.device)
        now = time.perf_counter()
        self.steps[-1][part] += now - self.last
        self.last = now

    def medians(self) -> dict[str, float]:
        """Median seconds of each part that was met, in order."""
        met = {part for step in self.steps for part in step}
        return {p: median(step[p] for step in self.steps) for p in PARTS if p in met}


def breakdown(
    trainer: Trainer, next_batch: Callable[[], Batch], steps: int, loads: bool
) -> dict[str, float]:
    """Median seconds of each part of an optimizer step.

    ``loads``: whether batches are waited for, which then is a part.
    """
    laps = Laps(trainer.parallel.device)
    with _borders(trainer, laps):
        for _ in range(steps):
            trainer.task.train()
            laps.begin()
            batch = next_batch()
            if loads:
                laps.lap(WAITING)
            with _around(batch.views, "to", laps, TRANSFER):
                trainer.update([batch])
            laps.lap(REST)
            trainer.step += 1
    return laps.medians()


@contextmanager
def _borders(trainer: Trainer, laps: Laps) -> Iterator[None]:
    """Inside, the trainer's calls of what it is made of are borders of ``laps``."""
    task = trainer.task
    with ExitStack() as stack:
        for module, part in ((trainer.normalize, DEVICE), (trainer.model, FORWARD)):
            begins = module.register_forward_pre_hook(lambda *_: laps.lap(REST))
            ends = module.register_forward_hook(lambda *_, part=part: laps.lap(part))
            stack.callback(begins.remove)
            stack.callback(ends.remove)
        stack.enter_context(_around(task, "before_update", laps, OPTIMIZER, before=BACKWARD))
        after = AFTER if _acts_after(task) else REST
        stack.enter_context(_around(task, "after_update", laps, after, before=OPTIMIZER))
        yield


def _acts_after(task: Task) -> bool:
    """Whether it, or an objective of it, does anything after the optimizer's step."""
    objectives = [m for m in task.modules() if isinstance(m, Objective)]
    passes_on = type(task).after_update in (Task.after_update, Method.after_update)
    return not passes_on or any(
        type(o).after_update is not Objective.after_update for o in objectives
    )


@contextmanager
def _around(owner: Any, name: str, laps: Laps, during: str, before: str = REST) -> Iterator[None]:
    """Inside, a method of one object is a part: what was until it begins is ``before``."""
    method = getattr(owner, name)

    def bordered(*args: Any, **kwargs: Any) -> Any:
        laps.lap(before)
        result = method(*args, **kwargs)
        laps.lap(during)
        return result

    setattr(owner, name, bordered)
    try:
        yield
    finally:
        delattr(owner, name)
