"""Sliding windows: places, and probabilities against a loop over pixels and windows."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.pairs import open_pairs
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.options import SegmentOptions
from ssl_vit.evaluators.patch_heads import fit_patch_heads
from ssl_vit.evaluators.segment_scores import Guesses, classify
from ssl_vit.evaluators.sliding import Sliding, scaled_size, window_starts
from ssl_vit.evaluators.tokens import gather_tokens, token_extractor
from tests.unit.evaluators.test_segment import CPU, backbone, data, run, seeded, textures

__all__ = ["data"]


def test_windows_cover_a_length_and_overlap():
    assert window_starts(10, 4, 0.5) == [0, 2, 4, 6]
    assert window_starts(8, 4, 0.0) == [0, 4]
    assert window_starts(9, 4, 0.0) == [0, 2, 5]
    assert window_starts(4, 4, 0.5) == window_starts(3, 4, 0.5) == [0]
    for length in range(16, 60, 7):
        for overlap in (0.0, 0.3, 0.5, 0.9):
            starts = window_starts(length, 16, overlap)
            assert (starts[0], starts[-1]) == (0, length - 16)
            steps = [b - a for a, b in pairwise(starts)]
            assert all(step <= (1 - overlap) * 16 + 1 for step in steps)
            assert not steps or max(steps) - min(steps) <= 1


def of(images: Tensor) -> Tensor:
    """Logits at half the resolution that differ with the place in a window and with its sides."""
    pooled = F.avg_pool2d(images, 2)
    ramp = torch.linspace(-1, 1, pooled.shape[3])
    return torch.cat([pooled[:, :1] * 2 + ramp, pooled[:, 1:2], pooled.sum(1, keepdim=True)], 1)


def by_loop(image: Tensor, window: tuple[int, int], overlap: float, flip: bool) -> Tensor:
    """Probabilities of each pixel: the mean over all windows, and mirror images, that have it."""
    height, width = image.shape[1:]
    places = [
        (y, x)
        for y in window_starts(height, window[0], overlap)
        for x in window_starts(width, window[1], overlap)
    ]
    found = torch.zeros(3, height, width)
    for i in range(height):
        for j in range(width):
            seen = []
            for y, x in places:
                if not (y <= i < y + window[0] and x <= j < x + window[1]):
                    continue
                part = torch.zeros(len(image), *window)
                own = image[:, y : y + window[0], x : x + window[1]]
                part[:, : own.shape[1], : own.shape[2]] = own
                for mirrored in (False, True)[: 1 + flip]:
                    given = part.flip(2) if mirrored else part
                    fine = F.interpolate(of(given[None]), window, mode="bilinear")[0].softmax(0)
                    at = window[1] - 1 - (j - x) if mirrored else j - x
                    seen.append(fine[:, i - y, at])
            found[:, i, j] = sum(seen) / len(seen)
    return found


@pytest.mark.parametrize("size", [(10, 14), (6, 8), (4, 20), (3, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_are_means_over_windows(size, flip):
    """Also of images smaller than a window, of which the rest is filled up and not judged."""
    images = torch.randn(2, 2, *size, generator=seeded())
    sliding = Sliding(size, (6, 8), 0.4, flip)
    logits = sliding.logits(images, of)
    for row, image in enumerate(images):
        found = sliding.probabilities(logits[:, row])
        torch.testing.assert_close(found, by_loop(image, (6, 8), 0.4, flip), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.sum(0), torch.ones(size))


def test_scales_are_averaged_at_the_size_of_the_mask():
    a, b = torch.rand(3, 4, 6, generator=seeded()), torch.rand(3, 8, 9, generator=seeded(1))
    sized = [F.interpolate(m[None], (5, 7), mode="bilinear")[0] for m in (a, b)]
    expected = ((sized[0] + sized[1]) / 2).argmax(0)
    assert torch.equal(classify([a, b], (5, 7)), expected)
    assert not torch.equal(sized[0].argmax(0), expected)
    assert scaled_size((16, 24), 0.5) == (8, 12)
    assert scaled_size((16, 24), 0.01) == (1, 1)


def test_one_window_is_the_image_at_once(tmp_path):
    """At scale 1, of masks as large as the encoder's images."""
    pairs = open_pairs(textures(tmp_path, 12, 0, sizes=((16, 24),)))
    extractor = token_extractor(backbone(tmp_path), 1, Machine(CPU, torch.float32, 0, 5))
    material = gather_tokens(extractor, pairs, 1.0)
    head = fit_patch_heads(material, torch.arange(12), 3, (0.01,), 2, 255, 0)
    plain = Guesses(head, extractor, pairs, SegmentOptions())
    windows = Guesses(head, extractor, pairs, SegmentOptions(scales=(1.0, 1.0)))
    for (i, mask, whole), (j, same, slid) in zip(plain, windows, strict=True):
        assert i == j
        assert torch.equal(mask, same)
        assert torch.equal(whole, slid)


def test_finer_windows_see_finer_masks(tmp_path):
    """Of images with parts smaller than a patch at scale 1."""
    sets = []
    for seed in (0, 1):
        root = tmp_path / str(seed)
        sets.append(textures(root, 12, seed, sizes=((64, 96),)))
    coarse, _ = run(backbone(tmp_path), *sets, epochs=20)
    fine, card = run(backbone(tmp_path), *sets, epochs=20, scales=(1.0, 3.0), flip=True)
    assert fine.metrics["miou"] > coarse.metrics["miou"]
    assert card["probe"]["scales"] == (1.0, 3.0)
    assert fine.details["held_out_miou_by_lr"] == coarse.details["held_out_miou_by_lr"]
