"""Segmenter and depth estimator as tuned networks: saved, reopened, scored, and used on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.data.base import Source, check_classes
from ssl_vit.data.depths import DepthPairs
from ssl_vit.data.pairs import PairImages, Pairs, pairs_of, whole_pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.dense_kinds import Kind
from ssl_vit.evaluators.dense_tune import DenseNetwork, trainable
from ssl_vit.evaluators.depth_kind import DepthKind
from ssl_vit.evaluators.detector_body import set_image_size
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.evaluators.score import UNITS, Score
from ssl_vit.evaluators.segment_kind import SegmentKind
from ssl_vit.evaluators.start import Start, rebuilt
from ssl_vit.evaluators.tuned import Judged, Remembered, Row, Tuned, view_of
from ssl_vit.model.encoder import Encoder
from ssl_vit.pictures.boundaries import evenly
from ssl_vit.weights.exchange import (
    HEAD,
    EncoderInfo,
    contiguous_state,
    load_strictly,
    read_safetensors,
    write_own,
)

_KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (SegmentKind, DepthKind)}
_LOOKED = 64


def dense_network(
    start: Start, kind: Kind, size: tuple[int, int], drop_path: float, seed: int
) -> DenseNetwork:
    """Network of an encoder and a new head, whose weights are a function of ``seed``.

    Raises:
        UserError: the encoder takes no images of ``size``, or has too few maps.
    """
    module, option = trainable(start.module, drop_path), "--tune.image-size"
    if isinstance(module, Encoder):
        check_patches(option, size, module.patch_size)
    else:
        set_image_size(module, size, option, start.identity["given"])
    maps = FeatureMaps(module, kind.maps, kind.spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = kind.head(maps.widths)
    return DenseNetwork(maps, head, kind.together)


class TunedPixels(Tuned):
    """Fine-tuned segmenter or depth estimator; ``of``: what is learned of each pixel."""

    at_once = 16
    network: DenseNetwork

    def __init__(self, network: DenseNetwork, of: Kind, view: View) -> None:
        super().__init__(network, view, of.names)
        self.of, self.kind = of, of.name

    def writer(self, path: Path, start: Start, step: int) -> Callable[[], None]:
        """Writer as of every kind; the file of a plain ViT opens as an encoder, too."""
        about = self.about(start, step) | {"options": asdict(self.of.options)} | self.of.learned()
        content: dict[str, Any] = {"about": about}
        inner, view = self.network.maps.network, self.view
        if isinstance(inner, Encoder):
            tensors = contiguous_state(inner.vit)
            head = contiguous_state(self.network.head)
            tensors |= {f"{HEAD}{name}": value for name, value in head.items()}
            shown = view.channels, view.mean, view.std
            content["info"] = asdict(EncoderInfo(inner.config, *shown, "finetune", step))
        else:
            tensors, about["body"] = contiguous_state(self.network), start.body
        return lambda: write_own(path, tensors, content)

    def matched(self, source: Source) -> Source:
        whole = whole_pairs(source)
        rule = f"{self.where} was trained on {self.of.pairs.beside.scheme}:"
        check(type(whole) is self.of.pairs, f"{source.spec!r}: {rule}")
        if isinstance(whole, DepthPairs):
            whole.scale = self.of.options.scale
        check_sizes(pairs_of(source), self.view.channels)
        if self.names is not None:
            check_classes(Remembered(self.where, self.names, len(self.names)), source)
        return source

    def score_by(self, config: Any) -> None:
        self.of.options = getattr(config, self.kind)

    def digest(self, source: Source) -> dict[str, str]:
        name = f"{self.of.pairs.beside.folder}_sha256"
        return {name: content_sha256(pairs_of(source).masks)}

    def judge(self, source: Source, machine: Machine, seed: int) -> Judged:
        self.ready(machine.device)
        found = self.of.score(self.network, pairs_of(source), self.view, machine, seed)
        score, count, pictures = found
        return Judged([score], {"images": count["val"]}, {"pairs": count}, pictures)

    def predict(self, images: Sequence[Tensor]) -> list[Tensor]:
        return list(self.of.predict(self.network, images, self.view.size, self.normalized))

    def table(self, scores: Sequence[Score]) -> tuple[str, Row, list[Row]]:
        (score,) = scores
        units = "".join(f" ({name}: {UNITS[name]})" for name in score.metrics if name in UNITS)
        values = (f"{v:.{4 if k in UNITS else 2}f}" for k, v in score.metrics.items())
        low, high = score.interval
        header = ("weights", *score.metrics, f"95% of {next(iter(score.metrics))}")
        return f"in %{units}", header, [(score.setting, *values, f"{low:.2f} to {high:.2f}")]

    def model(self) -> dict[str, Any]:
        return {"head": self.of.about()}


def check_sizes(pairs: Pairs, channels: int) -> None:
    """Check that maps are as large as their images, of some evenly spread.

    Raises:
        UserError: one is not.
    """
    PairImages(pairs, (8, 8), channels).__getitems__(evenly(len(pairs), _LOOKED))


def open_pixels(path: Path, content: dict[str, Any]) -> TunedPixels:
    """Segmenter or depth estimator of a file; ``content``: its metadata.

    Raises:
        UserError: its tensors do not match.
    """
    about = content["about"]
    kind, view = _KINDS[about["kind"]].remembered(about), view_of(about)
    state, plain = read_safetensors(path)[0], "info" in content
    body = content["info"] if plain else about["body"]
    own = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    network = dense_network(rebuilt(body, own, str(path), view), kind, view.size, 0.0, 0)
    if plain:
        head = {name.removeprefix(HEAD): v for name, v in state.items() if name.startswith(HEAD)}
        load_strictly(network.head, head, str(path))
    else:
        load_strictly(network, state, str(path))
    return TunedPixels(network, kind, view)
