"""Memory of a step on CUDA beside the prediction of ``benchmark scale``."""

import pytest
import torch

from ssl_vit.benchmarks.costs import count_step, state_of
from ssl_vit.benchmarks.speed import random_batch, trainer_midway
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import find_method
from ssl_vit.model.architecture import without_memory

STATISTICS = (0.5,) * 3, (0.25,) * 3


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_step_takes_what_scale_says(name, device, say):
    """ViT-S/16 with the method's own options; temporary buffers are not in the prediction."""
    images = 64 if device.type == "cuda" else 2
    kind, encoder = find_method(name), EncoderConfig("vit_small_patch16_224")
    with without_memory():
        counted = kind(kind.Config(), encoder, 3)
    spec, state = kind.view_spec(counted.config, counted.encoder), state_of(counted)
    kept = count_step(counted, spec, 3).kept
    predicted = state.total + kept.fixed + images * kept.per_image
    task, run = kind(kind.Config(), encoder, 3), RunConfig(length="10ep")
    normalize = Normalize(*STATISTICS)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    trainer = trainer_midway(task, run, OptimConfig(), normalize, device, torch.bfloat16)
    batch = random_batch(spec, images, 3, seed=0)
    trainer.task.train()
    for _ in range(2):
        scalars = trainer.update([batch])
        trainer.step += 1
    assert torch.isfinite(scalars["loss"]).item()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
        say(f"{name} ViT-S, {images} images: {peak / 1e9:.2f} GB, predicted {predicted / 1e9:.2f}")
        assert 0.9 * predicted < peak < 1.4 * predicted


@pytest.fixture(autouse=True)
def _begin(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
