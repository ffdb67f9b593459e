"""Our training step as one side of a comparison, with what is asked of it alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import mean

from torch import Tensor

from ssl_vit.benchmarks.breakdown import breakdown
from ssl_vit.benchmarks.matmul_peak import Products, Shape
from ssl_vit.benchmarks.side import Side, Work
from ssl_vit.benchmarks.speed import random_batch, trainer_midway, worker_batch
from ssl_vit.common.config import RunConfig
from ssl_vit.common.task import Task
from ssl_vit.data.augment import Normalize
from ssl_vit.model.block import recomputing_nothing
from ssl_vit.model.encoder import parameter_count
from ssl_vit.training.footprint import measure_step

_COUNTED = 3  # steps that differ in what stochastic depth drops


class OurStep(Side):
    """What the loop does between two batches.

    Args:
        make: the method with its first weights.
        run: compiled or not, and the like.
    """

    def __init__(self, work: Work, make: Callable[[], Task], run: RunConfig) -> None:
        super().__init__(work)
        normalize = Normalize(*work.statistics)
        self.trainer = trainer_midway(
            make(), run, work.optim, normalize, work.device, work.precision
        )
        self.batch = random_batch(work.spec, work.batch_size, work.channels, work.seed)

    def step(self) -> Tensor:
        """The loss, which stays on the device."""
        self.trainer.task.train()
        loss = self.trainer.update([self.batch])["loss"]
        self.trainer.step += 1
        return loss

    def parameters(self) -> int:
        """Weights of all networks, those that are not trained too."""
        return parameter_count(self.trainer.task)

    def flops(self) -> float:
        """As of any side: without what stochastic depth spares, the mean of some steps, and without
        what activation checkpointing computes again."""
        with recomputing_nothing(self.trainer.task):
            if self.trainer.run.compile:  # compiled blocks spare nothing
                return float(measure_step(self.trainer, [self.batch])[0])
            return mean(super(OurStep, self).flops() for _ in range(_COUNTED))

    def products(self) -> Counter[Shape]:
        """The matrix products of a step that drops nothing, and how often each is computed."""
        with Products() as products:
            measure_step(self.trainer, [self.batch])
        return products.shapes

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median seconds of each part of a step, photometric operations included."""
        work = self.work
        batch = worker_batch(work.spec, work.batch_size, work.channels, work.seed)
        return breakdown(self.trainer, lambda: batch, steps, loads=False)
