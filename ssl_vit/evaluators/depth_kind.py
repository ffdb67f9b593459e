"""Depth as a kind of dense fine-tuning: the distance of each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ssl_vit.common.checks import flag
from ssl_vit.common.config import from_json
from ssl_vit.common.errors import check
from ssl_vit.common.task import at_least_fp32
from ssl_vit.data.batch import stack
from ssl_vit.data.depths import DepthPairs
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.missing import resized
from ssl_vit.data.pairs import Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.dense_kinds import Kind, Ready, Scored, of_all
from ssl_vit.evaluators.dense_tune import DenseNetwork
from ssl_vit.evaluators.depth import warn_different_units
from ssl_vit.evaluators.depth_heads import HEADS, MAPS, DepthHead, depth_loss
from ssl_vit.evaluators.depth_options import DepthHeadOptions
from ssl_vit.evaluators.depth_scores import depth_score, draw, score_depths, valid_depth
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.map_material import MapExtractor
from ssl_vit.evaluators.options import DepthTuneConfig
from ssl_vit.evaluators.patch_heads import upsampled
from ssl_vit.evaluators.score import LAST


class DepthKind(Kind):
    """Depth: the distance of each pixel."""

    name, spread, unknown, ratio = "depth", True, 0.0, (1.0, 1.0)
    pairs = DepthPairs

    def __init__(self, options: DepthHeadOptions, most: float) -> None:
        """``most``: the greatest depth."""
        self.options, self.maps, self.most = options, MAPS[options.head], most

    @classmethod
    def of(cls, options: DepthHeadOptions, train: DepthPairs, val: DepthPairs) -> DepthKind:
        """Find the greatest depth: as given, or that of all training maps, in which
        ``options.scale`` is already. A warning names units that seem to differ.

        Raises:
            UserError: no training map has a depth in the range.
        """
        most = options.max_depth or max(of_all(train, lambda depth: float(depth.max())))
        least = f"{options.min_depth:g}, in the unit of --depth.scale"
        deep = most > options.min_depth
        check(deep, f"{train.spec}: no pixel of its depth maps is deeper than {least}")
        warn_different_units(train, val, flag(options, "scale"))
        return cls(options, most)

    @classmethod
    def remembered(cls, about: dict[str, Any]) -> DepthKind:
        return cls(from_json(DepthTuneConfig, about["options"]), float(about["most"]))

    def learned(self) -> dict[str, Any]:
        return {"most": self.most}

    @torch.inference_mode()
    def predict(
        self, network: DenseNetwork, images: Sequence[Tensor], size: tuple[int, int], ready: Ready
    ) -> Iterator[Shaped[Tensor, "h w"]]:
        """Depth of each pixel, float32, in the unit of ``--depth.scale``."""
        made = network(ready(stack([resized(i, size) for i in images]))).float()
        for image, depth in zip(images, made, strict=True):
            yield upsampled(depth[None, None], (image.shape[1], image.shape[2]))[0, 0].cpu()

    def head(self, widths: tuple[int, ...]) -> nn.Module:
        return HEADS[self.options.head](widths, self.options.min_depth, self.most)

    def prepare(self, values: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "h w"]:
        return valid_depth(values, self.options, self.most)

    def loss(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``depth_loss`` at the resolution of the predictions, and the mean relative error."""
        size = (made.shape[1], made.shape[2])
        coarse = torch.stack([nearest_mask(depth, size) for depth in target])
        depth, there = at_least_fp32(made), coarse > 0
        error = torch.where(there, (depth - coarse).abs() / coarse.clamp(min=1e-6), 0.0)
        relative = error.sum() / there.sum().clamp(min=1)
        return {"loss": depth_loss(depth, coarse), "abs_rel": relative.detach()}

    def score(
        self, network: DenseNetwork, pairs: Pairs, view: View, machine: Machine, seed: int
    ) -> Scored:
        extractor, head = MapExtractor(network.maps, view, machine), network.head
        assert isinstance(head, DepthHead)
        assert isinstance(pairs, DepthPairs)
        errors, count = score_depths(head, extractor, pairs, self.options, self.most)
        score = depth_score(errors, "pixels' depths", LAST, seed, {})
        picture = draw(head, extractor, pairs, self.options, self.most)
        count = {"val": len(errors.images)} | count
        return score, count, {} if picture is None else {"depths": picture}

    def about(self) -> str:
        least, most = self.options.min_depth, self.most
        return f"{self.options.head}, depths from {least:g} to {most:g}"
