"""Our training step as a side of a comparison, with its matrix products and breakdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssl_vit.benchmarks.breakdown import breakdown
from ssl_vit.benchmarks.matmul_peak import MatmulShapes, Shape
from ssl_vit.benchmarks.side import Side, Workload
from ssl_vit.benchmarks.speed import random_batch, trainer_midway, wait, worker_batch
from ssl_vit.common.config import RunConfig
from ssl_vit.common.task import Task
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.block import recomputing_nothing
from ssl_vit.model.encoder import parameter_count
from ssl_vit.training.footprint import measure_step, optimizer_flops

_COUNTED = 3  # steps to average FLOPs over; stochastic depth drops other samples in each


class OurStep(Side):
    """Our step: everything the training loop does between two batches.

    Its views lie on the device, normalised, as those of the peers do.

    Args:
        make: builds the method with its initial weights.
        run: compilation, activation checkpointing and the like.
    """

    def __init__(self, work: Workload, make: Callable[[], Task], run: RunConfig) -> None:
        super().__init__(work)
        normalize = Normalize(*work.statistics)
        self.trainer = trainer_midway(
            make(), run, work.optim, normalize, work.device, work.precision
        )
        batch = random_batch(work.spec, work.batch_size, work.channels, work.seed)
        views = self.trainer.normalize(batch.views.to(work.device))
        self.batch = replace(batch, views=views)

    def step(self) -> Tensor:
        """One optimizer step; returns the loss, on the device."""
        normalize, self.trainer.normalize = self.trainer.normalize, nn.Identity()  # type: ignore[assignment]
        try:
            return self.learn(self.batch)
        finally:
            self.trainer.normalize = normalize

    def learn(self, batch: Batch) -> Tensor:
        """One optimizer step on a batch as a loader returns it; returns the loss."""
        self.trainer.task.train()
        loss = self.trainer.update([batch])["loss"]
        self.trainer.step += 1
        return loss

    def parameters(self) -> int:
        """Number of parameters of all networks, trained or not."""
        return parameter_count(self.trainer.task)

    def flops(self) -> float:
        """FLOPs of a step: the mean of some steps, as stochastic depth drops some of the work;
        recomputation by activation checkpointing and the optimizer are not counted."""
        with recomputing_nothing(self.trainer.task):
            if self.trainer.run.compile:  # compiled blocks drop no work
                return float(measure_step(self.trainer, [self.batch])[0])
            steps = (super(OurStep, self).flops() for _ in range(_COUNTED))
            return mean(steps) - optimizer_flops(self.trainer)

    def products(self) -> Counter[Shape]:
        """Matrix products of a step without stochastic depth: the number of each shape."""
        with MatmulShapes() as products:
            measure_step(self.trainer, [self.batch])
        return products.shapes

    def kernels(self) -> int | None:
        """Kernels and copies that a step starts on the device; None: on the CPU, which is none."""
        if self.work.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.step()
            wait(self.work.device)
        return sum(event.device_type == DeviceType.CUDA for event in seen.events())

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median seconds of each stage of a step, photometric operations included."""
        work = self.work
        batch = worker_batch(work.spec, work.batch_size, work.channels, work.seed)
        return breakdown(self.trainer, lambda: batch, steps, loads=False)
