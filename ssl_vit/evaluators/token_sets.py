"""Token sets: frozen patch tokens of labelled images, kept in memory or recomputed each epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.batch import Batch
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import Source, Subset
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import FeatureSet, Machine, targets_of, units_of
from ssl_vit.evaluators.frozen import Statistics, room, warn_unreadable
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.training.parallel import autocast, loader_workers

log = logging.getLogger("ssl_vit")


@dataclass(frozen=True)
class TokenReader:
    """Token reader: the places of the last of ``maps`` are an image's tokens, ``width`` wide; in
    half precision throughout, so that the score is the same whether tokens are kept or recomputed.
    """

    maps: Callable[[Tensor], list[Tensor]]
    width: int
    view: View
    machine: Machine

    def map(self, images: Float[Tensor, "b c h w"]) -> Float16[Tensor, "b d r s"]:
        """Tokens of normalised images, on the device, where they are in the image."""
        # Not inference mode, whose tensors could not be trained on.
        with torch.no_grad(), autocast(self.machine.device, self.machine.precision):
            return self.maps(images)[-1].half()

    def batches(self, source: Source, size: int = 0) -> Iterator[tuple[Tensor, Batch]]:
        """Tokens (b, n, D) of every readable image in order, on the device, with their batch;
        those of a batch without one are empty. ``size``: of batches; 0: the machine's.

        Raises:
            UserError: a token is not finite.
        """
        device = self.machine.device
        normalize = Normalize(self.view.mean, self.view.std).to(device)
        images = EvalImages(source, self.view.size, self.view.crop_ratio, self.view.channels)
        workers = loader_workers(self.machine.workers, device)
        size = size or self.machine.at_once
        for batch in eval_batches(images, size, workers, device.type == "cuda"):
            made = torch.empty(0)
            if batch.views.crops:
                made = self.map(normalize(batch.views.to(device)).crops[0]).flatten(2).mT
                finite = bool(made.isfinite().all())
                check(finite, f"the encoder's tokens of {source.spec} are not finite in 16 bits")
            yield made, batch


def token_reader(backbone: Backbone, machine: Machine) -> TokenReader:
    """Token reader of a backbone: the patch tokens of a plain ViT after its final norm, without
    [CLS] and registers; of other networks the places of their last feature map.

    Raises:
        UserError: raw pixels, or a network without feature maps.
    """
    maps = maps_of(backbone)
    return TokenReader(maps, maps.widths[-1], backbone.view, machine)


@dataclass(frozen=True)
class TokenSet:
    """Token set: patch tokens of the readable images of ``source``.

    ``rows``: their labels, indices and groups, without features. ``kept``: (n, places, D), None if
    too large. ``mean``, ``std``: (D,) exact, over all tokens, on the device. ``places``: tokens of
    an image.
    """

    source: Source
    reader: TokenReader
    rows: FeatureSet
    kept: Float16[Tensor, "n p d"] | None
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    places: int

    def batches(
        self, rows: Int64[Tensor, " k"], size: int
    ) -> Iterator[tuple[Float[Tensor, "b p d"], Int64[Tensor, " b"]]]:
        """Standardised tokens of these images, in this order, on the device; with their rows."""
        device = self.reader.machine.device
        if self.kept is not None:
            for chunk in rows.split(size):
                yield self.standard(self.kept[chunk].to(device)), chunk
            return
        some = Subset(self.source, self.rows.index[rows].numpy())
        for tokens, batch in self.reader.batches(some, size):
            if len(tokens):
                yield self.standard(tokens), rows[batch.views.keys]

    def standard(self, tokens: Float16[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        """Tokens with mean 0 and variance 1 over the training images."""
        return (tokens.float() - self.mean) / self.std


def read_tokens(reader: TokenReader, source: Source, cache_gb: float) -> TokenSet:
    """Read the tokens of all images once; keep them if they take at most ``cache_gb`` 1e9 bytes.

    Raises:
        UserError: no image can be read.
    """
    statistics, found = Statistics(), _Found()
    kept: Tensor | None = None
    places = done = 0
    for tokens, batch in reader.batches(source):
        found.add(batch)
        if not len(tokens):
            continue
        if not done:
            places = tokens.shape[1]
            (kept,) = room([tokens], len(source), cache_gb, "tokens") or (None,)
        if kept is not None:
            kept[done : done + len(tokens)] = tokens
        statistics.add(tokens.mT)
        done += len(tokens)
    rows = found.rows(source)
    return TokenSet(
        source, reader, rows, None if kept is None else kept[:done], *statistics.result(), places
    )


class _Found:
    """Readable images of a source, collected batch by batch."""

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        self.labels: list[Tensor] = []
        self.index: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        self.bad |= batch.bad
        self.labels.append(batch.views.labels)
        self.index.append(batch.views.keys)

    def rows(self, source: Source) -> FeatureSet:
        """Labels, indices and groups, without features.

        Raises:
            UserError: no image could be read.
        """
        warn_unreadable(self.bad, "image")
        index = torch.cat(self.index)
        if not len(index):
            first = next(iter(self.bad.values()), "")
            raise UserError(f"no image of {source.spec} can be read: {first}")
        labels = targets_of(source, index, torch.cat(self.labels))
        return FeatureSet({}, labels, len(self.bad), index, units_of(source, index))


def answers(
    reader: TokenReader, source: Source, read: Callable[[Tensor], Tensor]
) -> tuple[Tensor, FeatureSet]:
    """Outputs of ``read`` for the tokens of every readable image, on the CPU; and these images.

    Raises:
        UserError: no image can be read.
    """
    found, made = _Found(), list[Tensor]()
    for tokens, batch in reader.batches(source):
        found.add(batch)
        if len(tokens):
            made.append(read(tokens).cpu())
    rows = found.rows(source)
    return torch.cat(made), rows
