"""Samples of shards: which members are the images, where several have the same key."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.tar_index import ShardIndex
from ssl_vit.data.tar_names import split_name

log = logging.getLogger("ssl_vit")
# More kinds of images than one sample has: what follows the first dot is then a part of the name.
_MOST_KINDS = 16
# Images that accompany another one, by the words of their extension.
_SIDE = {
    *("mask", "masks", "seg", "segmentation", "label", "labels", "depth", "disparity", "normal"),
    *("normals", "annotation", "gt", "alpha", "instance", "semantic", "thumb", "thumbnail", "npy"),
}
Rows = list[np.ndarray]
"""Rows: for each shard the images taken, int64, as indices into its index."""
Samples = dict[str, list[tuple[str, int]]]
"""Samples of a shard: by key, the extensions of their images and the images' indices."""


def choose_samples(
    spec: str, indexes: Sequence[ShardIndex], reading: ReadConfig
) -> tuple[Rows, bool]:
    """Choose the image of each sample; what is left out is logged, with what to do about it.

    ``reading.key``: ``webdataset`` names a sample up to the first dot, ``full`` up to the last one;
    ``auto`` is the first, but for names that have dots of their own (``names_have_dots``).
    ``reading.image``: the extension of the images; where it is not given and a sample has several,
    the most usual one that does not sound like a mask is taken.

    Returns:
        rows, and whether keys are full.

    Raises:
        UserError: no image has the extension.
    """
    if reading.image:
        return _of_extension(spec, indexes, reading)
    full = reading.key == "full"
    shared = [index for index in indexes if not index.alone]
    if reading.key == "auto" and names_have_dots(_samples(index) for index in shared):
        full = True
        _log_full_keys(spec, shared)
    found = {id(index): _samples(index, full) for index in shared}
    rank = _ranked(found.values())
    rows = [
        _best(found[id(index)], rank) if id(index) in found else np.arange(len(index.sizes))
        for index in indexes
    ]
    _warn_left_out(spec, list(found.values()), rank, full)
    return rows, full


def _samples(index: ShardIndex, full: bool = False) -> Samples:
    samples: Samples = {}
    for i in range(len(index.names)):
        key, kind = split_name(os.fsdecode(index.names[i]), full)
        samples.setdefault(key, []).append((kind.lower(), i))
    return samples


def names_have_dots(shards: Iterable[Samples]) -> bool:
    """True if dots belong to the names, as samples of several images by the first dot show.

    WebDataset's extensions are the few parts of a sample: ``rgb.png``, ``depth.png``. So they are
    names where most such samples have two that differ only in digits (``slice001.png``,
    ``slice002.png``: images of one kind), or where there are more than 16 of them in all.
    """
    several = counted = 0
    kinds: set[str] = set()
    for samples in shards:
        for images in samples.values():
            own = {kind for kind, _ in images}
            if len(own) > 1:
                kinds |= own
                several += 1
                counted += len({re.sub(r"\d+", "0", kind) for kind in own}) < len(own)
    return len(kinds) > _MOST_KINDS or 2 * counted > several


def _log_full_keys(spec: str, shared: Sequence[ShardIndex]) -> None:
    images = sum(len(index.sizes) for index in shared)
    keys = sum(len(_samples(index)) for index in shared)
    log.info(
        "%s: names have dots of their own (%s images, %s different names up to the first dot, as "
        "of %s): each image is a sample, as by --data.key full; --data.key webdataset takes one of "
        "each name, --data.image EXTENSION those of one kind",
        *(spec, f"{images:,}", f"{keys:,}", os.fsdecode(shared[0].names[0])),
    )


def _ranked(shards: Iterable[Samples]) -> dict[str, int]:
    """Rank of each extension, by preference: images before masks, usual before rare ones."""
    count = Counter(kind for samples in shards for own in samples.values() for kind, _ in own)
    kinds = sorted(count, key=lambda kind: (_is_side(kind), -count[kind]))
    return {kind: rank for rank, kind in enumerate(kinds)}


def _is_side(kind: str) -> bool:
    return bool(_SIDE & set(re.split(r"[^a-z]+", kind)))


def _best(samples: Samples, rank: dict[str, int]) -> np.ndarray:
    taken = [min(own, key=lambda image: rank[image[0]])[1] for own in samples.values()]
    return np.array(taken, dtype=np.int64)


def _warn_left_out(spec: str, shards: list[Samples], rank: dict[str, int], full: bool) -> None:
    images = sum(len(own) for samples in shards for own in samples.values())
    keys = sum(len(samples) for samples in shards)
    if images == keys:
        return
    kinds = list(rank)
    more = f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""
    each = "" if full else ", --data.key full takes each as a sample of its own"
    log.warning(
        "warning: %s: %s images share %s keys, %s are not used: of each sample %s is taken, not "
        "%s%s; --data.image %s picks that%s",
        *(spec, f"{images:,}", f"{keys:,}", f"{images - keys:,}", kinds[0]),
        *(", ".join(kinds[1:4]), more, kinds[1], each),
    )


def _of_extension(
    spec: str, indexes: Sequence[ShardIndex], reading: ReadConfig
) -> tuple[Rows, bool]:
    """Images with the extension ``reading.image``: all after the first dot, or with full keys (and
    for ``auto``, where no image has it so) what the name ends in."""
    wanted = reading.image.lower().removeprefix(".")
    names = [[os.fsdecode(i.names[n]) for n in range(len(i.names))] for i in indexes]
    exact = [[n for n, a in enumerate(own) if split_name(a)[1].lower() == wanted] for own in names]
    full = reading.key == "full" or (reading.key == "auto" and not any(exact))
    if full:
        end = f".{wanted}"
        exact = [[n for n, a in enumerate(own) if a.lower().endswith(end)] for own in names]
    taken = sum(map(len, exact))
    if not taken:
        kinds = Counter(split_name(a)[1] for own in names for a in own)
        if reading.key == "full" or len(kinds) > _MOST_KINDS:
            kinds = Counter(split_name(a, full=True)[1] for own in names for a in own)
        known = ", ".join(kind or "nothing" for kind, _ in kinds.most_common(8))
        raise UserError(f"--data.image is {reading.image!r}; the images of {spec} end in {known}")
    keys = sum(len({split_name(a, full)[0] for a in own}) for own in names)
    if not full and taken < keys:
        text = "warning: %s: %s of %s samples have no %s and are left out"
        log.warning(text, spec, f"{keys - taken:,}", f"{keys:,}", reading.image)
    images = sum(map(len, names))
    log.info("%s: %s of %s images end in %s", spec, f"{taken:,}", f"{images:,}", reading.image)
    return [np.array(own, dtype=np.int64) for own in exact], full
