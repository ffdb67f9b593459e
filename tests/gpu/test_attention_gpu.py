"""Attention on CUDA, by each kernel that torch has: finite gradients, and the seconds of a step.

What is printed decides whether cuDNN's stays off, and whether what stochastic depth drops is
computed (``choose_attention``).
"""

import time
from statistics import median

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ssl_vit.benchmarks.speed import random_batch, trainer_midway, wait
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.data.augment import Normalize
from ssl_vit.methods.base import find_method
from ssl_vit.model.block import LeanResidual
from ssl_vit.training.loop import Trainer

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_a_single_query_are_finite(kernel, device, say):
    """The query of [CLS] in the last block; with logits far below zero. Those of cuDNN, which is
    off, are told only."""
    if device.type != "cuda" and kernel != "math":
        pytest.skip("of CUDA")
    torch.manual_seed(0)
    found = []
    for scale in (1.0, 30.0):
        q = torch.randn(8, 6, 1, 64, device=device, dtype=torch.bfloat16) * scale
        k = -q + 0.1 * torch.randn(8, 6, 197, 64, device=device, dtype=torch.bfloat16)
        v = torch.randn_like(k)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(KERNELS[kernel]):
            scaled_dot_product_attention(*inputs).float().square().sum().backward()
        found.append(all(bool(x.grad.isfinite().all()) for x in inputs))
    say(f"single query, {kernel}: gradients finite {found}")
    assert all(found) or kernel == "cudnn"


def size(device: torch.device) -> tuple[str, int]:
    """Encoder and images of a step: ViT-S/16 as published on a GPU, a tiny one elsewhere."""
    return ("vit_small_patch16_224", 64) if device.type == "cuda" else ("test_vit", 2)


def dino(device: torch.device, compiled: bool = False) -> Trainer:
    """DINO's trainer."""
    kind, encoder = find_method("dino"), EncoderConfig(size(device)[0], drop_path=0.1)
    run, normalize = RunConfig(length="10ep", compile=compiled), Normalize((0.5,) * 3, (0.25,) * 3)
    task = kind(kind.Config(), encoder, 3)
    return trainer_midway(task, run, OptimConfig(clip=3.0), normalize, device, torch.bfloat16)


def seconds(trainer: Trainer, device: torch.device, steps: int) -> list[float]:
    """Seconds of each step on the same batch, each waited for."""
    task, images = trainer.task, size(device)[1]
    spec = type(task).view_spec(task.config, task.encoder)
    batch = random_batch(spec, images, 3, seed=0)
    task.train()
    found = []
    for _ in range(steps):
        wait(device)
        started = time.perf_counter()
        loss = trainer.update([batch])["loss"]
        wait(device)
        found.append(time.perf_counter() - started)
        trainer.step += 1
    assert torch.isfinite(loss).item()
    return found


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "rows"])
@pytest.mark.parametrize("kernel", ["chosen", "cudnn"])
def test_steps_of_dino(kernel, whole, device, say):
    """Whole branches, as chosen, take equally long from the third step on."""
    if device.type != "cuda" and kernel != "chosen":
        pytest.skip("of CUDA")
    trainer = dino(device)
    for part in trainer.task.modules():
        if isinstance(part, LeanResidual):
            part.whole = whole
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")
    try:
        found = seconds(trainer, device, 30 if device.type == "cuda" else 4)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    usual, worst = median(found[3:]), max(found[3:])
    say(f"DINO {size(device)}, {kernel}, {'whole' if whole else 'rows'}: first {found[0]:.2f} s,")
    say(f"  then {1000 * usual:.1f} ms, at most {1000 * worst:.1f} ms")
    if device.type == "cuda" and kernel == "chosen" and whole:
        assert worst < 3 * usual + 0.05


def test_compiled_steps_of_dino(device, say):
    """What --run.compile gives, after it has compiled."""
    if device.type != "cuda":
        pytest.skip("of CUDA")
    found = seconds(dino(device, compiled=True), device, 15)
    usual = 1000 * median(found[8:])
    say(f"DINO {size(device)}, compiled: {sum(found[:8]):.0f} s at first, then {usual:.1f} ms")
