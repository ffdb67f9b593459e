"""Seconds of DINO's steps by attention kernel: ``python -m tests.gpu.steps_of_dino DEVICE``.

In a process of its own, where annotations are not checked: that takes time, too. It prints a line
of JSON for each kernel, as they are measured.
"""

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_vit.benchmarks.speed import random_batch, trainer_midway, wait
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import find_method
from ssl_vit.model.block import LeanResidual
from ssl_vit.training.loop import Trainer

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Kernel, and whether what stochastic depth drops is computed; the one that a run takes comes first.
WAYS = (
    ("chosen", True),
    ("chosen", False),
    ("cudnn", True),
    ("efficient", True),
    ("math", True),
    ("cudnn", False),
)
# Steps of each, and seconds after which there is no further one.
STEPS, SECONDS = 30, 12.0


def size(device: torch.device) -> tuple[str, int]:
    """Encoder and images of a step: ViT-S/16 as published on a GPU, a tiny one elsewhere."""
    return ("vit_small_patch16_224", 64) if device.type == "cuda" else ("test_vit", 2)


def dino(device: torch.device, whole: bool) -> Trainer:
    """DINO's trainer, in training mode."""
    kind, encoder = find_method("dino"), EncoderConfig(size(device)[0], drop_path=0.1)
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    task, run = kind(kind.Config(), encoder, 3), RunConfig(length="10ep")
    made = trainer_midway(task, run, OptimConfig(clip=3.0), normalize, device, torch.bfloat16)
    for part in made.task.modules():
        if isinstance(part, LeanResidual):
            part.whole = whole
    made.task.train()
    return made


def forced(kernel: str) -> AbstractContextManager[None]:
    """Context with this attention kernel alone, or as it is in a run."""
    return nullcontext() if kernel == "chosen" else sdpa_kernel(KERNELS[kernel])


def seconds(trainer: Trainer, device: torch.device, steps: int) -> list[float]:
    """Seconds of each step on the same batch, each waited for."""
    task = trainer.task
    batch = random_batch(type(task).view_spec(task.config, task.encoder), size(device)[1], 3, 0)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    found: list[float] = []
    while len(found) < steps and sum(found) < SECONDS:
        wait(device)
        started = time.perf_counter()
        loss = trainer.update([batch])["loss"]
        wait(device)
        found.append(time.perf_counter() - started)
        trainer.step += 1
    assert torch.isfinite(loss).item()
    return found


def main(device: torch.device) -> None:
    """Measure all ways that there are on the device."""
    on_gpu = device.type == "cuda"
    for kernel, whole in WAYS:
        if not on_gpu and kernel not in ("chosen", "math"):
            continue
        row = {"kernel": kernel, "whole": whole, "size": size(device)}
        trainer = dino(device, whole)  # which turns cuDNN's attention off: before it is forced
        try:
            with forced(kernel):
                row["seconds"] = seconds(trainer, device, STEPS if on_gpu else 4)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
