"""Made-up objects of detection's benchmark, and that all networks are given the same."""

import torch

from ssl_vit.benchmarks.detection import (
    OurDetector,
    TorchvisionDetector,
    _workload,
    made_up_objects,
)
from ssl_vit.commands.detection_options import DetectionConfig
from ssl_vit.common.config import EncoderConfig
from ssl_vit.data.coco_images import mask_boxes, unpacked
from ssl_vit.evaluators.detect import targets_of
from ssl_vit.evaluators.detect_options import DetectOptions

TINY = EncoderConfig("vit_tiny_patch16_224", (32,), width=16, depth=1, heads=1)


def test_masks_fill_boxes_that_lie_in_the_image():
    made = made_up_objects(3, 5, 64, seed=0)
    boxes, masks = made["boxes"], unpacked(made["masks"], 64)
    assert made["count"].tolist() == [5, 5, 5]
    assert masks.shape == (15, 64, 64)
    assert torch.equal(mask_boxes(masks), boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert 4 <= sides.min() < sides.max() <= 16
    area = masks.sum((1, 2), dtype=torch.float)
    assert torch.equal(area, sides.prod(1))
    assert 0 <= made["classes"].min() < made["classes"].max() < 80
    again, other = (made_up_objects(3, 5, 64, seed=seed) for seed in (0, 1))
    assert all(torch.equal(again[name], made[name]) for name in made)
    assert not torch.equal(other["boxes"], boxes)


def test_all_networks_have_the_same_images_and_objects():
    config = DetectionConfig(encoder=TINY, detect=DetectOptions(width=8, windows=2))
    work = _workload(config, 32)
    ours = OurDetector(work, config.framed(32, 0), config.run, objects=2)
    theirs = TorchvisionDetector(work, objects=2)
    torch.testing.assert_close(ours.batch.views.crops[0], theirs.views[0])
    for a, b in zip(targets_of(ours.batch.views), theirs.targets, strict=True):
        assert a.keys() == b.keys() == {"boxes", "labels", "masks"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    frozen = [n for n, p in theirs.networks.named_parameters() if not p.requires_grad]
    assert {n.split(".")[2] for n in frozen} == {"conv1", "layer1"}
