"""What is measured of a step: noise in the sizes of crops, a trainer in the middle of its way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import Normalize, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.loader import Batch, TrainImages, draw_samples
from ssl_vit.training.loop import Trainer
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, reuse_memory
from ssl_vit.training.session import prepare_task

# A step is measured in the middle of a run of this length: nothing warms up or is frozen there.
_EPOCHS, _STEPS_PER_EPOCH = 100, 1000


def random_batch(spec: ViewSpec, batch: int, channels: int, seed: int) -> Batch:
    """A batch as workers hand it over, of noise, without photometric operations."""
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randint(
            0, 256, (batch * c.count, channels, *c.size), dtype=torch.uint8, generator=generator
        )
        for c in spec.crops
    ]
    keys = torch.arange(batch)
    drawn = draw_samples(spec.draw, keys.tolist()) if spec.draw else {}
    return Batch(Views(crops, keys, torch.full((batch,), -1), drawn=drawn))


class Noise(Source):
    """Images of noise, 256 pixels each way."""

    spec, classes, labels = "noise", None, None

    def __init__(self, images: int, channels: int, seed: int) -> None:
        self.shape, self.channels, self.seed = (256, 256, channels), channels, seed
        self.images = images

    def __len__(self) -> int:
        return self.images

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        """Always the same pixels for the same ``i``."""
        pixels = np.random.default_rng((self.seed, i)).integers(0, 256, self.shape, dtype=np.uint8)
        return pixels, None

    def name(self, i: int) -> str:
        """Of one image."""
        return f"noise {i}"


def worker_batch(spec: ViewSpec, batch: int, channels: int, seed: int) -> Batch:
    """A batch of noise as workers make it of images, with all that they draw for the device."""
    images = TrainImages(Noise(batch, channels, seed), spec, channels, seed)
    return images.__getitems__([(0, i) for i in range(batch)])


def single_views(batch: Batch, spec: ViewSpec, normalize: Normalize) -> list[Tensor]:
    """The same batch for a peer: every view (B, C, h, w) apart, normalised, on the device."""
    views = normalize(batch.views.to(normalize.mean.device)).crops
    return [v for crops, c in zip(views, spec.crops, strict=True) for v in crops.chunk(c.count)]


def trainer_midway(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    normalize: Normalize,
    device: torch.device,
    precision: torch.dtype,
) -> Trainer:
    """What pretraining would run, alone on ``device``, in the middle of its way."""
    reuse_memory(device)
    alone = Parallel(0, 1, device)
    prepare_task(task, run, alone)
    run = replace(run, length=f"{_EPOCHS}ep")
    schedule = Schedule(run, optim, _STEPS_PER_EPOCH, task.peak_in_warmup)
    trainer = Trainer(task, run, optim, schedule, normalize.to(device), alone, precision)
    trainer.step = schedule.total // 2
    return trainer


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
