"""Patch tokens: frozen, of images with masks; kept in memory or, if too large, recomputed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float16, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.eval_images import eval_batches
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.pairs import PairBatch, PairImages, Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.frozen import Statistics, room, warn_unreadable
from ssl_vit.evaluators.maps import FeatureMaps, maps_of
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import autocast, loader_workers
from ssl_vit.weights.reading import one_line

log = logging.getLogger("ssl_vit")
# Pixels per patch side at which heads are trained.
_FINE = 4

TokenMap = Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d r s"]]


@dataclass
class Seen:
    """Token batch of pairs: ``tokens`` (b, D, rows, columns) in half precision, on the device;
    ``masks`` at their own sizes; ``keys`` (b,) indices; ``bad``: index -> reason.
    """

    tokens: Tensor
    masks: list[Tensor]
    keys: Int64[Tensor, " b"]
    bad: dict[int, str]


@dataclass(frozen=True)
class TokenExtractor:
    """Token extractor: ``tokens`` maps images to patch tokens, ``grid`` is their (rows, columns) in
    an image of the view's size.

    Half precision throughout, so that the score is the same whether tokens are kept or recomputed;
    float32 tokens gave the same mIoU to 0.01 points.
    """

    name: str
    tokens: TokenMap
    grid: tuple[int, int]
    view: View
    machine: Machine

    def batches(self, pairs: Pairs) -> Iterator[Seen]:
        """Token batches of all readable pairs, in order.

        Raises:
            UserError: an image and its mask differ in size, or a token is not finite.
        """
        for crops, batch in self.images(pairs):
            tokens = self.of(crops[0], pairs) if batch.masks else torch.empty(0)
            yield Seen(tokens, batch.masks, batch.views.keys, batch.bad)

    def images(
        self, pairs: Pairs, sizes: Sequence[tuple[int, int]] = ()
    ) -> Iterator[tuple[list[Tensor], PairBatch]]:
        """Batches of all pairs, in order, with their normalised images on the device: of the
        view's size, or of each of ``sizes``; none where no pair of a batch is readable.

        Raises:
            UserError: an image and its mask differ in size.
        """
        device, workers = self.machine.device, self.machine.workers
        normalize = Normalize(self.view.mean, self.view.std).to(device)
        images = PairImages(pairs, self.view.size, self.view.channels, sizes)
        workers, pin = loader_workers(workers, device), device.type == "cuda"
        for batch in eval_batches(images, self.machine.at_once, workers, pin):
            assert isinstance(batch, PairBatch)
            # Not inference mode, whose tensors could not be trained on.
            with torch.no_grad(), autocast(device, self.machine.precision):
                crops = normalize(batch.views.to(device)).crops if batch.masks else []
            yield crops, batch

    def of(self, images: Float[Tensor, "b c h w"], pairs: Pairs) -> Float16[Tensor, "b d r s"]:
        """Tokens of normalised images of ``pairs``, in half precision.

        Raises:
            UserError: a token is not finite.
        """
        with torch.no_grad(), autocast(self.machine.device, self.machine.precision):
            tokens = self.tokens(images)
        tokens = tokens.half()
        finite = bool(tokens.isfinite().all())
        check(finite, f"the encoder's tokens of {pairs.spec} are not finite")
        return tokens


def token_extractor(backbone: Backbone, blocks: int, machine: Machine) -> TokenExtractor:
    """Token extractor of an encoder's last map, or of its last ``blocks``, joined at the finest.

    Maps of a plain ViT are the patch tokens of its blocks, of a hierarchical network its stages
    (``maps.FeatureMaps``). Without an encoder (``pixels:``) tokens are pixels averaged over each
    patch.

    Raises:
        UserError: a network without maps, or with fewer.
    """
    view, module = backbone.view, backbone.module
    if module is None and backbone.info is not None:
        with without_memory():
            config = replace(backbone.info.config, positions="learned")
            patch = Encoder(config, view.channels).patch_size
        grid = (view.size[0] // patch, view.size[1] // patch)

        def pixels(images: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(images, grid)

        return TokenExtractor("pixels", pixels, grid, view, machine)
    if isinstance(module, Encoder):
        check(
            blocks <= len(module.vit.blocks),
            f"--blocks is {blocks}; {backbone.name} has {len(module.vit.blocks)}",
        )
    maps = maps_of(backbone, blocks)
    name = "patches" if isinstance(module, Encoder) else "maps"
    return TokenExtractor(
        name if blocks == 1 else f"{name}{blocks}",
        lambda images: joined(maps(images)),
        finest_grid(maps, backbone),
        view,
        machine,
    )


def joined(maps: list[Tensor]) -> Float[Tensor, "b d h w"]:
    """Maps one after the other along their channels, each interpolated to the size of the first."""
    size = maps[0].shape[2:]
    same = [
        m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear", align_corners=False)
        for m in maps
    ]
    return same[0] if len(same) == 1 else torch.cat(same, 1)


@torch.no_grad()
def finest_grid(maps: FeatureMaps, backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of the finest map of an image of the backbone's size.

    Raises:
        UserError: the network does not take images of this size.
    """
    (height, width), stride = backbone.view.size, maps.strides[0]
    if isinstance(maps.network, Encoder):
        return height // stride, width // stride
    device = next(maps.network.parameters()).device
    try:
        found = maps(torch.zeros(1, backbone.view.channels, height, width, device=device))[0]
    except Exception as error:  # timm's networks raise what they like
        raise UserError(
            f"--size is {height}x{width}: {backbone.name} takes no such images: {one_line(error)}"
        ) from None
    return found.shape[2], found.shape[3]


@dataclass(frozen=True)
class Material:
    """Training material of patch heads: the readable ``pairs``, with masks and tokens.

    ``masks``: (n, R, S) at 4 x 4 pixels per patch. ``tokens``: (n, D, rows, columns), None if too
    large. ``mean`` and ``std``: (D,) exact, over all tokens. ``values``: that occur in the masks;
    ``unreadable``: number of skipped pairs.
    """

    pairs: Pairs
    extractor: TokenExtractor
    masks: Integer[Tensor, "n r s"]
    tokens: Float16[Tensor, "n d h w"] | None
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    values: tuple[int, ...]
    unreadable: int

    def batches(self, rows: Int64[Tensor, " k"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of these pairs: tokens (b, D, rows, columns) float32, masks (b, R, S)."""
        device = self.extractor.machine.device
        if self.tokens is not None:
            for chunk in rows.split(size):
                yield self.tokens[chunk].to(device).float(), self.masks[chunk].to(device).long()
            return
        extractor = replace(self.extractor, machine=replace(self.extractor.machine, at_once=size))
        for seen in extractor.batches(self.pairs.take(rows)):
            if seen.masks:
                yield seen.tokens.float(), self.masks[rows[seen.keys]].to(device).long()


def gather_tokens(extractor: TokenExtractor, pairs: Pairs, cache_gb: float) -> Material:
    """Extract tokens of all pairs once; keep them if they take at most ``cache_gb`` 1e9 bytes.

    Raises:
        UserError: no pair can be read.
    """
    size = (extractor.grid[0] * _FINE, extractor.grid[1] * _FINE)
    statistics, values, bad = Statistics(), set[int](), dict[int, str]()
    masks, places = list[Tensor](), list[Tensor]()
    tokens: Tensor | None = None
    for seen in extractor.batches(pairs):
        bad |= seen.bad
        if not seen.masks:
            continue
        if not masks:
            (tokens,) = room([seen.tokens], len(pairs), cache_gb, "tokens") or (None,)
        if tokens is not None:
            tokens[len(masks) : len(masks) + len(seen.masks)] = seen.tokens
        statistics.add(seen.tokens)
        masks += [nearest_mask(mask, size) for mask in seen.masks]
        for mask in seen.masks:
            values.update(mask.unique().tolist())
        places.append(seen.keys)
    warn_unreadable(bad, "pair")
    if not places:
        raise UserError(f"no pair of {pairs.spec} can be read: {next(iter(bad.values()), '')}")
    # One dtype for all: 8-bit masks may be mixed with deeper ones.
    small = torch.stack([mask.to(_smallest(values)) for mask in masks])
    return Material(
        pairs.take(torch.cat(places)),
        extractor,
        small,
        None if tokens is None else tokens[: len(masks)],
        *statistics.result(),
        tuple(sorted(values)),
        len(bad),
    )


def _smallest(values: set[int]) -> torch.dtype:
    return torch.uint8 if max(values) < 256 else torch.int32
