"""Segmentation scores: masks predicted by heads on patch tokens, against the true ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.pairs import CLASSES_FILE, Pairs
from ssl_vit.evaluators.features import units_of
from ssl_vit.evaluators.frozen import BATCH
from ssl_vit.evaluators.options import SegmentHeadOptions
from ssl_vit.evaluators.overlap import Overlap, confusion_matrix, counts, iou
from ssl_vit.evaluators.patch_heads import PatchHeads, upsampled
from ssl_vit.evaluators.segment_heads import HeadModules
from ssl_vit.evaluators.sliding import Logits, Sliding, scaled_size
from ssl_vit.evaluators.tokens import Material, TokenExtractor
from ssl_vit.pictures.boundaries import Outlined, evenly

# Images in the picture.
_DRAWN = 8
# Maximum number of logits held at once when a mask is scored, 256 MB.
_VALUES = 1 << 26

Heads = PatchHeads | HeadModules
"""Heads side by side, one for each learning rate."""


def classify(maps: Sequence[Float[Tensor, "c _ _"]], size: tuple[int, int]) -> Int64[Tensor, "r s"]:
    """Classify each of ``size`` pixels by its highest interpolated logit, or by the highest sum of
    probabilities of several maps, each of its own resolution.

    In chunks of classes, so that a large mask with many classes fits in memory.
    """
    step = max(1, _VALUES // (size[0] * size[1]))
    best, guess = None, None
    for first in range(0, len(maps[0]), step):
        fine = [upsampled(m[None, first : first + step], size)[0] for m in maps]
        value, index = (fine[0] if len(fine) == 1 else torch.stack(fine).sum(0)).max(0)
        if best is None or guess is None:
            best, guess = value, index
            continue
        higher = value > best  # of equal ones the first
        best, guess = torch.where(higher, value, best), torch.where(higher, index + first, guess)
    assert guess is not None
    return guess


@torch.no_grad()
def held_out_miou(
    heads: Heads, material: Material, rows: Int64[Tensor, " n"], ignore: int
) -> list[float]:
    """Held-out mean IoU of each head, 0 to 1, at 4 x 4 pixels per patch."""
    classes = heads.classes
    tables = [torch.zeros(classes, classes, dtype=torch.int64) for _ in range(len(heads))]
    for tokens, masks in material.batches(rows, BATCH):
        truth = known(masks, ignore).flatten()
        logits = heads(tokens)
        for table, head in zip(tables, logits.unbind(1), strict=True):
            fine = upsampled(head, (masks.shape[1], masks.shape[2]))
            table += confusion_matrix(truth, fine.argmax(1).flatten(), classes).cpu()
    return [float(iou(counts(table).double()).nanmean()) for table in tables]


def known(mask: Int[Tensor, "*shape"], ignore: int) -> Int[Tensor, "*shape"]:
    """Mask with -1 for pixels without a class."""
    return torch.where(mask == ignore, -1, mask)


def scored_sizes(size: tuple[int, int], config: SegmentHeadOptions) -> list[tuple[int, int]]:
    """Sizes that images are brought to; ``size``: that of the encoder."""
    return [scaled_size(size, scale) for scale in config.scales]


def guessed(
    crops: Sequence[Float[Tensor, "b k _ _"]],
    shapes: Sequence[tuple[int, int]],
    window: tuple[int, int],
    config: SegmentHeadOptions,
    logits_of: Logits,
) -> Iterator[Int64[Tensor, "h w"]]:
    """Class of each pixel of a batch of images, which are given at each of ``scored_sizes``, at
    ``shapes``: of the whole image or, of several scales or mirror images, averaged over windows."""
    if config.scales == (1.0,) and not config.flip:
        for own, shape in zip(logits_of(crops[0]), shapes, strict=True):
            yield classify([own], shape)
        return
    sizes = scored_sizes(window, config)
    slides = [Sliding(size, window, config.overlap, config.flip) for size in sizes]
    made = [s.logits(crop, logits_of) for s, crop in zip(slides, crops, strict=True)]
    for row, shape in enumerate(shapes):
        each = [s.probabilities(logits[:, row]) for s, logits in zip(slides, made, strict=True)]
        yield classify(each, shape)


@dataclass
class Guesses:
    """Classes of all masks' pixels by one head: iterates over (index, mask, guess), the guess of
    the mask's size; ``bad``: number of unreadable pairs met."""

    heads: Heads
    extractor: TokenExtractor
    pairs: Pairs
    config: SegmentHeadOptions
    bad: int = 0

    def __iter__(self) -> Iterator[tuple[int, Tensor, Int64[Tensor, "h w"]]]:
        config, window = self.config, self.extractor.view.size

        def logits_of(images: Tensor) -> Tensor:
            return self.heads(self.extractor.of(images, self.pairs))[:, 0]

        for crops, batch in self.extractor.images(self.pairs, scored_sizes(window, config)):
            self.bad += len(batch.bad)
            if not batch.masks:
                continue
            shapes = [(mask.shape[0], mask.shape[1]) for mask in batch.masks]
            guesses = guessed(crops, shapes, window, config, logits_of)
            yield from zip(batch.views.keys.tolist(), batch.masks, guesses, strict=True)


@dataclass
class Scored:
    """Scored masks: their overlap, the number of unreadable pairs, and some images to draw."""

    overlap: Overlap
    bad: int
    samples: list[Outlined] = field(default_factory=list)
    pixels: int = 0
    """Pixels of all masks, also those without a class."""


@torch.no_grad()
def score_masks(
    heads: Heads, extractor: TokenExtractor, pairs: Pairs, config: SegmentHeadOptions
) -> Scored:
    """Score a head on all masks, at their own resolution.

    Raises:
        UserError: a mask has a class that the head does not have, or no pixel has a class.
    """
    classes, drawn = heads.classes, set(evenly(len(pairs), _DRAWN))
    table, images, places = torch.zeros(classes, classes, dtype=torch.int64), [], []
    samples, guesses, pixels = [], Guesses(heads, extractor, pairs, config), 0
    for i, mask, guess in guesses:
        truth = known(mask.to(guess.device).long(), config.ignore)
        highest = int(truth.max())
        if highest >= classes:
            raise UserError(
                f"the mask of {pairs.name(i)} has class {highest}, those of training go up to "
                f"{classes - 1}; name all classes in {CLASSES_FILE} beside the masks"
            )
        own = confusion_matrix(truth.flatten(), guess.flatten(), classes).cpu()
        table += own
        pixels += truth.numel()
        images.append(counts(own))
        places.append(i)
        if i in drawn:
            samples.append(Outlined(i, truth.cpu(), guess.cpu()))
    check(int(table.sum()) > 0, f"{pairs.spec}: no pixel of its masks has a class")
    overlap = Overlap(table, torch.stack(images), units_of(pairs, torch.tensor(places)))
    return Scored(overlap, guesses.bad, samples, pixels)
