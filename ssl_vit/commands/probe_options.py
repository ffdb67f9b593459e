"""Evaluators of one encoder, by name, with their options; none of it needs torch."""

from __future__ import annotations

from ssl_vit.commands.depth_options import DepthConfig
from ssl_vit.commands.eval_options import EvalConfig, KnnConfig, LinearConfig, SegmentConfig

PROBES: dict[str, type[EvalConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "segment": SegmentConfig,
    "depth": DepthConfig,
}
