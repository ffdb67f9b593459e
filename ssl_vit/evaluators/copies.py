"""Copies: images of one set that are in another, or in it twice, found by features and confirmed by
pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.base import Source
from ssl_vit.evaluators.cache import contents
from ssl_vit.evaluators.features import Embed, FeatureSet
from ssl_vit.evaluators.knn import nearest_neighbours, unit

_LEAST_SIDE, _SIDE = 8, 32
_FLAT = 1e-3
_PAIRS = 1 << 12
SMALL = "small"
"""Part of a feature set: small gray pictures, flat."""
_QUARTERS = ("", "turned 90", "turned 180", "turned 270")
TURNS = (*_QUARTERS, *(", ".join(filter(None, ("mirrored", turn))) for turn in _QUARTERS))
"""Orientations: what was done to an image, quarter turns counterclockwise, after the mirror."""


@dataclass(frozen=True)
class Pair:
    """Pair of images: ``val`` and ``train`` are their indices in their sources; within one set, the
    lower and the higher one.

    ``identical``: the same file, or the same values. ``correlation``: of the edges of their small
    pictures, in the best orientation, ``turn``. ``cosine``: of their features, the highest over
    features and orientations; NaN for pairs found by their bytes alone.
    """

    val: int
    train: int
    identical: bool
    correlation: float
    cosine: float
    turn: str


def turned(images: Tensor, turn: int) -> Tensor:
    """Images (..., h, w) in one of the eight orientations, an index into ``TURNS``."""
    return (images.flip(-1) if turn >= 4 else images).rot90(turn % 4, (-2, -1))


def turns_of(size: tuple[int, int]) -> tuple[int, ...]:
    """Orientations that keep height and width: all eight of squares."""
    return tuple(range(8)) if size[0] == size[1] else (0, 2, 4, 6)


def with_small(embed: Embed) -> Embed:
    """``embed``, and small pictures of the images."""

    def made(images: Tensor) -> dict[str, Tensor]:
        return embed(images) | {SMALL: small(images)}

    return made


def in_all_turns(embed: Embed, turns: Sequence[int]) -> Embed:
    """``embed`` of the images in each orientation, as parts ``cls@5``; and small pictures."""

    def made(images: Tensor) -> dict[str, Tensor]:
        found = {SMALL: small(images)}
        for turn in turns:
            parts = embed(turned(images, turn).contiguous())
            found |= {f"{name}@{turn}": part for name, part in parts.items()}
        return found

    return made


def small(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p"]:
    """Gray pictures of ``small_size``, each pixel the mean of those that it stands for."""
    size = small_size((images.shape[2], images.shape[3]))
    return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), size).flatten(1)


def small_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the small picture: half of the image's, between 8 and 32 pixels. The
    finest details are left out, as recompression changes them most."""
    height, width = (min(side, max(_LEAST_SIDE, min(_SIDE, side // 2))) for side in size)
    return height, width


def nearest_pairs(
    train: FeatureSet,
    val: FeatureSet,
    features: Sequence[str],
    turns: Sequence[int],
    count: int,
    device: torch.device,
) -> tuple[Int64[Tensor, "c 2"], Float[Tensor, " c"]]:
    """Rows (val, train) of each image's ``count`` nearest training images, by each feature and in
    each orientation; each pair once, with its highest cosine. Of equal ones those of lower rows."""
    pairs, cosines = [], []
    k = min(count, len(train.index))
    rows = torch.arange(len(val.index)).repeat_interleave(k)
    for name in features:
        for turn in turns:
            part = [val.parts[f"{name}@{turn}"]]
            asked = unit(part, 0, len(part[0]), device)
            found, places = nearest_neighbours([train.parts[name]], asked, k)
            pairs.append(torch.stack([rows, places.flatten().cpu()], dim=1))
            cosines.append(found.flatten().cpu())
    return _once(torch.cat(pairs), torch.cat(cosines))


def within(
    pairs: Int64[Tensor, "c 2"], cosines: Float[Tensor, " c"]
) -> tuple[Int64[Tensor, "d 2"], Float[Tensor, " d"]]:
    """Pairs of rows of one set, the lower one first; each once, and none of a row with itself."""
    others = pairs[:, 0] != pairs[:, 1]
    return _once(pairs[others].sort(dim=1).values, cosines[others])


def _once(
    pairs: Int64[Tensor, "c 2"], cosines: Float[Tensor, " c"]
) -> tuple[Int64[Tensor, "d 2"], Float[Tensor, " d"]]:
    """Pairs, each once, with its highest cosine."""
    each, of = pairs.unique(dim=0, return_inverse=True)
    best = torch.full((len(each),), -2.0).scatter_reduce(0, of, cosines, "amax")
    return each, best


def correlations(
    train: Float[Tensor, "n p"],
    val: Float[Tensor, "q p"],
    pairs: Int64[Tensor, "c 2"],
    size: tuple[int, int],
    turns: Sequence[int],
) -> tuple[Float[Tensor, " c"], Int64[Tensor, " c"]]:
    """Correlation of the edges of each pair's small pictures in the best orientation, and which
    that is. ``size``: of the small pictures.

    Edges, because any two pictures of sky above ground are alike but for them. What all training
    pictures have in common, the mean of their edges, is taken away: all radiographs of a chest look
    alike, and are no copies. Brightness and contrast do not count. Plain pictures, without an edge,
    have a correlation of 0.
    """
    usual = torch.zeros(edges(train[:1].unflatten(1, size)).shape[1])
    for rows in train.split(_PAIRS):
        usual += edges(rows.unflatten(1, size)).sum(0) / len(train)
    best = torch.full((len(pairs),), -1.0)
    which = torch.zeros(len(pairs), dtype=torch.int64)
    for some in torch.arange(len(pairs)).split(_PAIRS):
        theirs = _apart(train[pairs[some, 1]].unflatten(1, size), usual)
        ours = val[pairs[some, 0]].unflatten(1, size)
        for turn in turns:
            found = (_apart(turned(ours, turn), usual) * theirs).sum(1)
            higher = found > best[some]
            best[some] = torch.where(higher, found, best[some])
            which[some] = torch.where(higher, turn, which[some])
    return best, which


def edges(pictures: Float[Tensor, "n h w"]) -> Float[Tensor, "n e"]:
    """Differences of neighbouring pixels, down and to the right, as unit vectors; zeros where all
    pixels are alike."""
    down, right = pictures.diff(dim=1).flatten(1), pictures.diff(dim=2).flatten(1)
    both = torch.cat([down, right], dim=1)
    return torch.where(both.norm(dim=1, keepdim=True) > _FLAT, F.normalize(both, dim=1), 0.0)


def _apart(pictures: Float[Tensor, "n h w"], usual: Float[Tensor, " e"]) -> Float[Tensor, "n e"]:
    """Edges of pictures without the usual ones, as unit vectors."""
    own = edges(pictures)
    return F.normalize(torch.where(own.any(1, keepdim=True), own - usual, own), dim=1)


def first_places(contents: Sequence[bytes]) -> dict[bytes, int]:
    """The first image of each content, without those that cannot be read."""
    places: dict[bytes, int] = {}
    for i, content in enumerate(contents):
        if content:
            places.setdefault(content, i)
    return places


def find_copies(
    sources: tuple[Source, Source],
    sets: tuple[FeatureSet, FeatureSet],
    features: Sequence[str],
    size: tuple[int, int],
    least: float,
    candidates: int,
    device: torch.device,
) -> list[Pair]:
    """Copies among training images of validation images; the most similar first.

    Args:
        sources, sets: of training and validation; validation has features in all orientations. Of
            one source twice, copies within it.
        size: height and width that images were brought to.
        least: correlation from which on a pair is one of copies.
        candidates: as ``count`` of :func:`nearest_pairs`.
    """
    (train, val), turns, one = sets, turns_of(size), sources[0] is sources[1]
    # Within a set each image is its own nearest one.
    pairs, cosines = nearest_pairs(train, val, features, turns, candidates + one, device)
    if one:
        pairs, cosines = within(pairs, cosines)
    pictures = train.parts[SMALL], val.parts[SMALL]
    found, which = correlations(*pictures, pairs, small_size(size), turns)
    theirs = _readable(sources[0])
    ours = theirs if one else _readable(sources[1])
    made = []
    for row in (found >= least).nonzero()[:, 0].tolist():
        v, t = int(val.index[pairs[row, 0]]), int(train.index[pairs[row, 1]])
        numbers = float(found[row]), float(cosines[row])
        made.append(Pair(v, t, ours[v] == theirs[t], *numbers, TURNS[int(which[row])]))
    # Plain images may have thousands of copies: the first of each is named.
    known = {pair.train if one else pair.val for pair in made if pair.identical}
    first = first_places(theirs)
    for v, content in enumerate(ours):
        if content in first and v not in known and not (one and first[content] == v):
            ends = (first[content], v) if one else (v, first[content])
            made.append(Pair(*ends, True, 1.0, float("nan"), ""))
    return sorted(made, key=lambda p: (not p.identical, -p.correlation, p.val, p.train))


def _readable(source: Source) -> list[bytes]:
    """Hash of the content of each image; empty of those that cannot be read."""
    return [content if readable else b"" for content, readable in contents(source, len(source))]


def copied(
    pairs: Sequence[Pair], val: FeatureSet, one: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the validation images that have a copy, and an identical one; bool (n,) each.
    ``one``: of pairs within one set."""

    def among(some: Sequence[Pair]) -> np.ndarray:
        first, second = [pair.val for pair in some], [pair.train for pair in some]
        return np.isin(val.index.numpy(), first + second if one else first)

    return among(pairs), among([pair for pair in pairs if pair.identical])
