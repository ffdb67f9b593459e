"""Detection benchmark: training steps of our detectors and torchvision's, each in its own process.

Networks take turns at one image size, on the same images, boxes and masks; then their processes
end, as those of the next size need the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from ssl_vit.benchmarks.comparison import time_in_turn
from ssl_vit.benchmarks.measured import machine_card
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.peers import Peer
from ssl_vit.benchmarks.side import Workload
from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.task import Views
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Crop, ViewSpec
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.detect import Detect, targets_of
from ssl_vit.evaluators.detect_options import DetectOptions
from ssl_vit.evaluators.detector import Framed
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.tuned_detector import detector_of
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import resolve_device, resolve_precision

TORCHVISION = "maskrcnn_resnet50_fpn"
_CLASSES = 80  # COCO's
_SIDES = 16, 4  # the least and the greatest side of a box, in parts of the image's


def made_up_objects(images: int, objects: int, size: int, seed: int) -> dict[str, Tensor]:
    """Objects of so many images, as ``JitteredObjects`` draws them: boxes, filled by masks."""
    rng = np.random.default_rng(seed)
    count = images * objects
    sides = rng.integers(size // _SIDES[0], size // _SIDES[1], (count, 2), endpoint=True)
    first = rng.integers(0, size - sides, endpoint=True)
    boxes = np.concatenate([first, first + sides], 1)
    masks = np.zeros((count, size, size), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return {
        "count": torch.full((images,), objects),
        "boxes": torch.from_numpy(boxes).float(),
        "classes": torch.from_numpy(rng.integers(0, _CLASSES, count)),
        "masks": torch.from_numpy(np.packbits(masks, axis=-1)),
    }


def _drawn(work: Workload, objects: int) -> dict[str, Tensor]:
    """Objects of a workload, on its device."""
    made = made_up_objects(work.batch_size, objects, work.spec.crops[0].size[0], work.seed)
    return {name: value.to(work.device) for name, value in made.items()}


class OurDetector(OurStep):
    """Our detector's step: that of ``evaluate detect``."""

    def __init__(
        self, work: Workload, options: DetectOptions, run: RunConfig, objects: int
    ) -> None:
        super().__init__(work, partial(detection_task, work, options), run)
        views = replace(self.batch.views, drawn=_drawn(work, objects))
        self.batch = replace(self.batch, views=views)


def detection_task(work: Workload, options: DetectOptions) -> Detect:
    """Task of a Mask R-CNN on an encoder with random weights.

    Raises:
        UserError: an option that the encoder does not allow.
    """
    encoder, name = Encoder(work.encoder, work.channels), work.encoder.arch
    shown = encoder.image_size, work.channels, *work.statistics
    start = Start(encoder, False, *shown, {"given": name})
    network = detector_of(start, options, _CLASSES, masks=True, seed=work.seed)
    return Detect(network, options.layer_decay)


class TorchvisionDetector(Peer):
    """torchvision's ``maskrcnn_resnet50_fpn`` as it is with pretrained weights: BatchNorm frozen,
    and neither the stem nor the first stage trained. Images come normalised and in their size."""

    def __init__(self, work: Workload, objects: int) -> None:
        super().__init__(work)
        frozen: dict[str, Any] = {"norm_layer": FrozenBatchNorm2d, "trainable_layers": 3}
        body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, **frozen)
        network = MaskRCNN(body, _CLASSES + 1)
        network.transform = Framed(work.spec.crops[0].size)
        self.begin(network)
        nothing = torch.zeros(0, dtype=torch.long)
        drawn = _drawn(work, objects)
        self.targets = targets_of(Views(self.views, nothing, nothing, drawn=drawn))

    def loss(self, views: list[Tensor]) -> Tensor:
        """Sum of its losses."""
        return torch.stack(list(self.networks(list(views[0]), self.targets).values())).sum()


def measure_detection(config: Any) -> dict[str, Any]:
    """Report of the benchmark, for JSON; ``config``: a ``DetectionConfig``.

    Raises:
        UserError: sizes or options that the encoder does not allow.
        RunFailed: a loss is not finite, or a process ended.
    """
    with without_memory():
        patch = Encoder(config.encoder, 3).patch_size
    for size in config.sizes:
        check_patches("--sizes", (size,), patch)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.precision, device)
    return {
        "benchmark": "detection",
        **machine_card(device, torch.get_num_threads()),
        "precision": str(precision).removeprefix("torch."),
        "results": [one for size in config.sizes for one in _of_size(config, size)],
        "options": asdict(config),
    }


def _of_size(config: Any, size: int) -> Iterator[dict[str, Any]]:
    """Results of each network at one image size."""
    work = _workload(config, size)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(OwnProcess(*build))
            for name, build in _networks(work, config, size).items()
        }
        time_in_turn(sides, work.batch_size, config.warm_up)
        for side in sides.values():
            side.ask("watch_memory")
        timings = time_in_turn(sides, work.batch_size, config.repeats)
        for name, timing in timings.items():
            memory = sides[name].ask("peak_memory")
            found = {"size": size, "network": name, **timing.speed.card()}
            yield {**found, "peak_memory_bytes": memory, "last_loss": timing.last_loss}


def _networks(work: Workload, config: Any, size: int) -> dict[str, tuple[Any, ...]]:
    """Networks by name: the arguments of ``OwnProcess`` for each."""
    found: dict[str, tuple[Any, ...]] = {
        TORCHVISION: (TorchvisionDetector.build, work, config.objects)
    }
    side = config.detect.windows
    for name, windows in (("all blocks global", 0), (f"windows of {side}", side)):
        own = config.framed(size, windows), config.run, config.objects
        found[f"{work.encoder.arch}, {name}"] = (OurDetector.build, work, *own)
    return found


def _workload(config: Any, size: int) -> Workload:
    """Workload of all networks at one image size."""
    device = resolve_device(config.run.device)
    return Workload(
        encoder=config.encoder,
        channels=3,
        method=None,
        optim=OptimConfig(lr=1e-4, weight_decay=0.1),
        spec=ViewSpec((Crop((size, size)),)),
        batch_size=config.batch_size,
        seed=config.run.seed,
        statistics=(IMAGENET_MEAN, IMAGENET_STD),
        device=device,
        precision=resolve_precision(config.run.precision, device),
    )
