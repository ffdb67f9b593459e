"""Depth command: from options to scores, card and picture."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, fields

from ssl_vit.commands.depth_options import DepthConfig
from ssl_vit.commands.evaluating import look_at
from ssl_vit.commands.probes import Result
from ssl_vit.common.errors import check
from ssl_vit.data.depths import open_depths
from ssl_vit.data.groups import leaks
from ssl_vit.evaluators.backbone import open_backbone, result_file
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.depth import depth_probe
from ssl_vit.evaluators.depth_options import DepthOptions
from ssl_vit.evaluators.features import Machine, ready
from ssl_vit.evaluators.protocol import protocol_card, split_card
from ssl_vit.training.parallel import resolve_precision, start_parallel

log = logging.getLogger("ssl_vit")


def depth(config: DepthConfig) -> Result:
    """Depth scores: delta1 and others of a head on feature maps; a picture beside the result."""
    started = time.perf_counter()
    data, seed = config.data, config.seed
    for option, spec in (("train", data.train), ("val", data.val)):
        check(bool(spec), f"--data.{option} is missing")
    train, val = (open_depths(spec, data, config.scale) for spec in (data.train, data.val))
    for line in leaks({"data.train": train, "data.val": val}):
        log.warning("warning: %s", line)
    parallel = start_parallel(config.device)
    if parallel.world > 1:
        log.warning("warning: depth is for one process; all %d do the same", parallel.world)
    precision = resolve_precision(config.precision, parallel.device)
    machine = Machine(parallel.device, precision, data.workers, config.batch_size)
    backbone = open_backbone(config.encoder, seed, config.size)
    look_at(train, backbone, seed)
    if backbone.module is not None:
        ready(backbone.module, parallel.device)
    options = DepthOptions(**{f.name: getattr(config, f.name) for f in fields(DepthOptions)})
    scores, about, picture = depth_probe(options, backbone, train, val, machine, seed)
    splits = {
        name: split_card(pairs, None, content_sha256(pairs), train if pairs is val else None)
        | {"depth_sha256": content_sha256(pairs.masks)}
        for name, pairs in (("train", train), ("val", val))
    }
    card = protocol_card(
        "depth",
        backbone.identity,
        backbone.view,
        splits,
        options=asdict(config),
        **about,
        **machine.card(),
        seconds=round(time.perf_counter() - started, 1),
    )
    out = result_file(config.out, backbone, "depth.json")
    return scores, card, out, {} if picture is None else {"maps": picture}
