"""Dense probe commands: segmentation and depth, from options to scores, card and picture."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from ssl_vit.commands.depth_options import DepthConfig
from ssl_vit.commands.eval_options import EvalConfig, EvalData, SegmentConfig
from ssl_vit.commands.evaluating import look_at, warn_same_images
from ssl_vit.commands.probes import Result
from ssl_vit.common.errors import check
from ssl_vit.data.depths import open_depths
from ssl_vit.data.groups import leaks
from ssl_vit.data.pairs import Pairs, open_pairs, pairs_of
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators.backbone import Backbone, open_backbone, result_file
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.depth import depth_probe
from ssl_vit.evaluators.depth_options import DepthOptions
from ssl_vit.evaluators.features import Machine, ready
from ssl_vit.evaluators.options import SegmentOptions
from ssl_vit.evaluators.protocol import protocol_card, split_card
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.segment import segment_probe
from ssl_vit.training.parallel import resolve_precision, start_parallel

log = logging.getLogger("ssl_vit")
T = TypeVar("T")
P = TypeVar("P", bound=Pairs)
Found = tuple[list[Score], dict[str, Any], np.ndarray | None]
"""Scores, what a card says of the probe, and a picture."""

_PARTS = ("kept", "held")
SEGMENT_FILES = {
    "linear": "segment.json",
    "mlp": "segment-mlp.json",
    "transformer": "segment-transformer.json",
}


def segment(config: SegmentConfig) -> Result:
    """Segmentation scores: mean IoU of a head on patch tokens."""
    opened = [_opened(spec, config, "pairs", open_pairs) for spec in _given(config)]
    options = _some(SegmentOptions, config)

    def probe(backbone: Backbone, train: Pairs, val: Pairs, machine: Machine) -> Found:
        return segment_probe(options, backbone, train, val, machine, config.seed)

    file = SEGMENT_FILES[config.head]
    return _dense("segment", config, opened, probe, "masks_sha256", file, "boundaries")


def depth(config: DepthConfig) -> Result:
    """Depth scores: delta1 and others of a head on feature maps."""
    opened = [_opened(spec, config, "depth", open_depths) for spec in _given(config)]
    for pairs in opened:
        pairs.scale = config.scale
    options = _some(DepthOptions, config)

    def probe(backbone: Backbone, train: Any, val: Any, machine: Machine) -> Found:
        return depth_probe(options, backbone, train, val, machine, config.seed)

    return _dense("depth", config, opened, probe, "depth_sha256", "depth.json", "maps")


def _given(config: EvalConfig) -> tuple[str, str]:
    """Training and validation images.

    Raises:
        UserError: one is missing.
    """
    data = config.data
    for option, spec in (("train", data.train), ("val", data.val)):
        check(bool(spec), f"--data.{option} is missing")
    return data.train, data.val


def _opened(spec: str, config: EvalConfig, scheme: str, whole: Callable[[str, EvalData], P]) -> P:
    """Pairs of a specification, or a part of them: ``kept:`` or ``held:``.

    Raises:
        UserError: they cannot be opened; or there are others than ``whole`` opens.
    """
    part = spec.split(":")
    if part[0] not in _PARTS or scheme not in part:
        return whole(spec, config.data)
    return pairs_of(open_source(spec, config.data))  # type: ignore[return-value]


def _some(kind: type[T], config: Any) -> T:
    """Options of a probe, taken from those of a command."""
    return kind(**{f.name: getattr(config, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def _dense(
    name: str,
    config: EvalConfig,
    opened: list[P],
    probe: Callable[[Backbone, P, P, Machine], Found],
    digest: str,
    file: str,
    picture: str,
) -> Result:
    """Result of a probe of pixels.

    Args:
        opened: training and validation pairs.
        digest: name on the card of the hash of what lies beside the images.
        file: name of the result; ``picture``: of the picture beside it.
    """
    started, (train, val) = time.perf_counter(), opened
    for line in leaks({"data.train": train, "data.val": val}):
        log.warning("warning: %s", line)
    content = [content_sha256(pairs) for pairs in opened]
    warn_same_images(*content)
    parallel = start_parallel(config.device)
    device, seed = parallel.device, config.seed
    if parallel.world > 1:
        log.warning("warning: %s is for one process; all %d do the same", name, parallel.world)
    precision = resolve_precision(config.precision, device)
    machine = Machine(device, precision, config.data.workers, config.batch_size)
    backbone = open_backbone(config.encoder, seed, config.size)
    look_at(train, backbone, seed)
    if backbone.module is not None:
        ready(backbone.module, device)
    scores, about, made = probe(backbone, train, val, machine)
    splits = {
        "train": split_card(train, None, content[0]),
        "val": split_card(val, None, content[1], train),
    }
    for split, pairs in zip(splits.values(), opened, strict=True):
        split[digest] = content_sha256(pairs.masks)
    card = protocol_card(
        name,
        backbone.identity,
        backbone.view,
        splits,
        options=asdict(config),
        **about,
        **machine.card(),
        seconds=round(time.perf_counter() - started, 1),
    )
    out = result_file(config.out, backbone, file)
    return scores, card, out, {} if made is None else {picture: made}
