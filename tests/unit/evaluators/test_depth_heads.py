"""Depth: metrics and loss against closed forms and loops, heads against what they are made of."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssl_vit.evaluators.depth_heads import (
    BINS,
    Bins,
    DptDepth,
    LinearDepth,
    Standardised,
    depth_loss,
    fine_grid,
)
from ssl_vit.evaluators.depth_metrics import NAMES, DepthErrors, image_metrics
from ssl_vit.evaluators.intervals import mean_interval
from ssl_vit.evaluators.patch_heads import upsampled


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def metrics(depth: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    return dict(zip(NAMES, image_metrics(depth, truth).tolist(), strict=True))


# --- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.2, 1.5, 1.25, 2.0])
def test_metrics_of_depths_off_by_one_factor(factor):
    """Closed forms: the deltas are all or nothing, by max(c, 1 / c) < 1.25 ** k, strictly."""
    truth = 2.0 ** torch.randint(-2, 3, (50,), generator=seeded()).double()
    found = metrics(factor * truth, truth)
    ratio = max(factor, 1 / factor)
    for k in (1, 2, 3):
        assert found[f"delta{k}"] == (100 if ratio < 1.25**k else 0)
    assert found["abs_rel"] == pytest.approx(100 * abs(factor - 1))
    assert found["log10"] == pytest.approx(abs(math.log10(factor)))
    rms = math.sqrt(float(truth.square().mean()))
    assert found["rmse"] == pytest.approx(abs(factor - 1) * rms)


def test_metrics_of_a_constant_error():
    truth = torch.tensor([1.0, 2.0, 4.0])
    found = metrics(truth + 0.5, truth)
    assert found["rmse"] == 0.5
    assert found["abs_rel"] == pytest.approx(100 * 0.5 * (1 + 1 / 2 + 1 / 4) / 3)
    assert [found[f"delta{k}"] for k in (1, 2, 3)] == pytest.approx([100 / 3, 100, 100])


def test_metrics_are_the_loop_of_their_definitions():
    depth, truth = (torch.rand(2, 40, generator=seeded()).double() * 3 + 0.1).unbind()
    pixels = list(zip(depth.tolist(), truth.tolist(), strict=True))
    found = metrics(depth, truth)
    assert found["abs_rel"] == pytest.approx(100 * sum(abs(d - t) / t for d, t in pixels) / 40)
    assert found["rmse"] == pytest.approx(math.sqrt(sum((d - t) ** 2 for d, t in pixels) / 40))
    logs = sum(abs(math.log10(d) - math.log10(t)) for d, t in pixels) / 40
    assert found["log10"] == pytest.approx(logs)
    inside = sum(max(d / t, t / d) < 1.25**2 for d, t in pixels)
    assert found["delta2"] == pytest.approx(100 * inside / 40)


def test_an_image_counts_as_one_whatever_its_pixels():
    """Means over images; the interval is of the first metric, over images or groups of them."""
    rows = torch.stack([torch.full((6,), v, dtype=torch.float64) for v in (0.0, 100.0) * 20])
    assert DepthErrors(rows).metrics() == dict.fromkeys(NAMES, 50.0)
    low, high = DepthErrors(rows).interval(0)
    assert 30 < low < 40 < 60 < high < 70  # binomial: 50 -+ 1.96 * 50 / sqrt(40)
    alike = DepthErrors(rows, torch.arange(40) // 2)  # one of each in every group
    assert alike.interval(0) == (50, 50)
    assert mean_interval(np.full(7, 3.0), 0) == (3, 3)
    halves = DepthErrors(rows.sort(0).values, torch.arange(40) // 10)
    assert halves.interval(0)[1] - halves.interval(0)[0] > 2 * (high - low)


# --- loss ---------------------------------------------------------------------------------------


def test_the_loss_of_depths_off_by_one_factor():
    """Closed form: no variance, no gradient; a part of the mean's."""
    target = torch.rand(2, 9, 7, generator=seeded()) + 0.5
    loss = float(depth_loss(1.5 * target, target))
    assert loss == pytest.approx(math.sqrt(0.15) * math.log(1.5), rel=1e-4)
    assert float(depth_loss(target, target)) < 2e-4


def test_the_loss_is_the_loop_of_its_definition():
    """With holes: they have no part in it, and pairs of neighbours need both."""
    depth, target = (torch.rand(2, 2, 9, 7, generator=seeded()) + 0.5).double().unbind()
    target = torch.where(torch.rand(2, 9, 7, generator=seeded(1)) < 0.3, 0.0, target)
    expected = sum(loss_by_loops(depth[b], target[b]) for b in range(2)) / 2
    assert float(depth_loss(depth, target)) == pytest.approx(expected, rel=1e-5)
    empty = torch.cat([target, torch.zeros(1, 9, 7)])
    more = float(depth_loss(torch.cat([depth, depth[:1]]), empty))
    assert more == pytest.approx(expected * 2 / 3, rel=1e-5), "one without a valid pixel counts 0"


def loss_by_loops(depth, target):
    """Loss of one image."""
    g = {
        (i, j): math.log(depth[i, j]) - math.log(target[i, j])
        for i in range(9)
        for j in range(7)
        if target[i, j] > 0
    }
    mean = sum(g.values()) / len(g)
    spread = sum((v - mean) ** 2 for v in g.values()) / len(g)
    found = math.sqrt(spread + 0.15 * mean**2)
    for step in (1, 2, 4, 8):
        kept = {k: v for k, v in g.items() if k[0] % step == 0 and k[1] % step == 0}
        rough = [
            abs(kept[i, j] - v)
            for (y, x), v in kept.items()
            for down, along in ((step, 0), (0, step))
            if ((i := y + down), (j := x + along)) in kept
        ]
        found += 0.5 * sum(rough) / max(1, len(kept))
    return found


def test_a_batch_without_a_valid_pixel_teaches_nothing():
    depth = (torch.rand(1, 4, 4, generator=seeded()) + 0.5).requires_grad_()
    loss = depth_loss(depth, torch.zeros(1, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert depth.grad.abs().max() == 0


# --- heads --------------------------------------------------------------------------------------


def test_bins_are_evenly_spaced_and_weighted():
    bins = Bins(1.0, 256.0)
    logits = torch.zeros(1, BINS, 1, 2)
    logits[0, 9, 0, 1] = 1e6
    found = bins(logits)[0, 0].tolist()
    assert found == pytest.approx([128.5, 10.0], rel=1e-3)
    logits[0, 9, 0, 1] = 0.9  # against 255 bins of 0.1: (128.5 * 25.6 + 0.9 * 10) / (25.6 + 0.9)
    assert float(bins(logits)[0, 0, 1]) == pytest.approx((128.5 * 25.6 + 9) / 26.5, rel=1e-5)
    assert float(bins(-logits)[0, 0, 1]) == pytest.approx(128.5)  # relu


@pytest.mark.parametrize(
    ("grid", "fine"), [((14, 14), (56, 56)), ((37, 37), (148, 148)), ((56, 56), (112, 112))]
)
def test_predictions_are_four_per_place_within_a_limit(grid, fine):
    assert fine_grid(*grid) == fine
    assert fine_grid(100, 200) == (100, 200)


def test_the_linear_head_is_one_layer_on_maps_joined_at_one_size():
    head = LinearDepth((3, 5), 0.5, 4.0)
    maps = [
        torch.randn(2, 3, 4, 6, generator=seeded()),
        torch.randn(2, 5, 2, 3, generator=seeded(1)),
    ]
    head.standardise([(torch.ones(3), 2 * torch.ones(3)), (torch.zeros(5), torch.ones(5))])
    joined = torch.cat([upsampled((maps[0] - 1) / 2, (16, 24)), upsampled(maps[1], (16, 24))], 1)
    weight = torch.cat([layer.weight for layer in head.layers], 1)
    logits = F.conv2d(joined, weight, head.layers[0].bias + head.layers[1].bias)
    torch.testing.assert_close(head(maps), head.bins(logits))


@pytest.mark.parametrize("sizes", [[(4, 4)] * 4, [(8, 12), (4, 6), (2, 3), (1, 1)]])
@pytest.mark.parametrize("kind", [LinearDepth, DptDepth])
def test_heads_take_blocks_of_one_size_and_pyramids(kind, sizes):
    """Depth lies within the range, and every parameter has a gradient."""
    torch.manual_seed(0)
    widths = (6, 6, 8, 8)
    head = kind(widths, 0.5, 4.0)
    maps = [torch.randn(2, w, *s) for w, s in zip(widths, sizes, strict=True)]
    depth = head(maps)
    assert depth.shape == (2, *fine_grid(*sizes[0]))
    assert depth.min().item() >= 0.5
    assert depth.max().item() <= 4.0
    depth_loss(depth, torch.rand_like(depth) + 1).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    norms = [m for m in head.modules() if isinstance(m, Standardised)]
    assert len(norms) == 4
    assert not any(isinstance(p, nn.Parameter) for norm in norms for p in norm.buffers())


def test_a_dpt_head_uses_every_map():
    torch.manual_seed(0)
    head = DptDepth((4, 4), 0.5, 4.0)
    maps = [torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)]
    before = head(maps)
    for i in (0, 1):
        changed = [m + (i == n) for n, m in enumerate(maps)]
        assert (head(changed) - before).abs().max() > 1e-4
