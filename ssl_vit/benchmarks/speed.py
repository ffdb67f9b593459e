"""Benchmark inputs: batches of noise in crop sizes, and a trainer in the middle of its schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.batch import Batch
from ssl_vit.data.loader import TrainImages, draw_all, whole_boxes
from ssl_vit.data.normalize import Normalize
from ssl_vit.training.loop import Trainer
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, prepare_device
from ssl_vit.training.session import prepare_task

# Schedule of the measured step, in whose middle there is no warm-up and nothing is frozen.
_EPOCHS, _STEPS_PER_EPOCH = 100, 1000


def random_batch(spec: ViewSpec, batch: int, channels: int, seed: int) -> Batch:
    """Noise batch as workers return it, without photometric operations."""
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randint(
            0, 256, (batch * c.count, channels, *c.size), dtype=torch.uint8, generator=generator
        )
        for c in spec.crops
    ]
    keys = torch.arange(batch)
    drawn = draw_all(spec, keys.tolist())
    boxes = whole_boxes(spec, batch)
    return Batch(Views(crops, keys, torch.full((batch,), -1), drawn=drawn, boxes=boxes))


class Noise(Source):
    """Noise source: images of noise, 256 x 256 pixels."""

    spec, classes, labels = "noise", None, None

    def __init__(self, images: int, channels: int, seed: int) -> None:
        self.shape, self.channels, self.seed = (256, 256, channels), channels, seed
        self.images = images

    def __len__(self) -> int:
        return self.images

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        """Noise image ``i``, a function of the seed and ``i``."""
        pixels = np.random.default_rng((self.seed, i)).integers(0, 256, self.shape, dtype=np.uint8)
        return pixels, None

    def name(self, i: int) -> str:
        """Name of image ``i``."""
        return f"noise {i}"


def worker_batch(spec: ViewSpec, batch: int, channels: int, seed: int) -> Batch:
    """Noise batch through the workers' half, with the photometric parameters drawn there."""
    images = TrainImages(Noise(batch, channels, seed), spec, channels, seed)
    return images.__getitems__([(0, i) for i in range(batch)])


def single_views(batch: Batch, spec: ViewSpec, normalize: Normalize) -> list[Tensor]:
    """Views of a batch for a peer: a tensor (B, C, h, w) for each, normalised, on the device."""
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
    """Trainer as in pretraining, in one process on ``device``, in the middle of its schedule."""
    prepare_device(device)
    alone = Parallel(0, 1, device)
    prepare_task(task, run, alone)
    run = replace(run, length=f"{_EPOCHS}ep")
    schedule = Schedule(run, optim, _STEPS_PER_EPOCH, task.peak_in_warmup)
    trainer = Trainer(task, run, optim, schedule, normalize.to(device), alone, precision)
    trainer.step = schedule.total // 2
    return trainer


def wait(device: torch.device) -> None:
    """Device synchronisation: return once all queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
