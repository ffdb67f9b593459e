"""Class folders, and what looks like them: splits, masks beside images, stray images."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.data.names import Names

_SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|eval|test|testing)([-_ ]?(set|data|images|\d+))?"
)
_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "groundtruth"),
    *("ground_truth", "seg", "segmentation", "segmentations", "segmentationclass"),
)
_MASK_NAME = re.compile(r"[-_.](mask|masks|gt|groundtruth|seg|segmentation|annotation)$")
_MASK_SHARE, _TRIED = 0.3, 1000
log = logging.getLogger("ssl_vit")
_MASK_ENDING = re.compile(r"[-_. ]?(mask|masks|gt|label|labels|seg|segmentation)$")


def splits_among(folders: Sequence[str]) -> tuple[str, ...]:
    """Folders that are splits of a data set, not classes: ``train`` and ``val``; empty if none is.

    A split's name among classes (``bus``, ``train``, ``truck``) is a class.
    """
    named = tuple(name for name in folders if _SPLIT.fullmatch(name.lower()))
    trains = any(name.lower().startswith("train") for name in named)
    several = len(named) > 1 and trains
    return named if named and (several or len(named) == len(folders)) else ()


def refuse_splits(spec: str, path: str, splits: Sequence[str]) -> None:
    """Refuse a folder of splits, which nobody asked to train on together.

    Raises:
        UserError: there are some; the line names the splits to give.
    """
    if not splits:
        return
    path = path.rstrip("/")
    train = [name for name in splits if name.lower().startswith("train")][:1]
    held = sorted(set(splits) - set(train), key=lambda name: (name[0] not in "vV", name))[:1]
    given = [f"--data.train folder:{path}/{name}" for name in train]
    given += [f"--data.val folder:{path}/{name}" for name in held]
    raise UserError(
        f"{spec!r} holds splits, not classes ({', '.join(splits)}): give {' and '.join(given)}; "
        f"flat:{path} takes all their images, without labels"
    )


def warn_odd_classes(
    spec: str, folders: Sequence[str], inside: Mapping[str, Sequence[str]]
) -> None:
    """Warn of classes that are named like a split, or hold splits: ``inside``, by class."""
    for name in folders:
        if _SPLIT.fullmatch(name.lower()):
            log.warning("warning: %s: folder %r is taken for a class, not a split", spec, name)
    found = [f"{name}/{split}" for name, splits in inside.items() for split in splits]
    if found:
        text = "warning: %s: classes hold splits (%s), and the images of all are taken"
        log.warning(text, spec, ", ".join(found))


def images_and_masks(folders: Sequence[str]) -> tuple[str, str] | None:
    """The folder of images and that of their masks, by their names (``images`` and ``masks``, or
    ``train`` and ``train_masks``); None if there are none."""
    by_name = {name.lower(): name for name in folders}
    images = [by_name[name] for name in _IMAGES if name in by_name]
    masks = [by_name[name] for name in _MASKS if name in by_name]
    if images and masks:
        return images[0], masks[0]
    for lower, name in by_name.items():
        start = _MASK_ENDING.sub("", lower)
        if start != lower and start in by_name:
            return by_name[start], name
    return None


def refuse_masks(spec: str, path: str, both: tuple[str, str], files: Names) -> None:
    """Refuse to take masks for images, where most files have one of the same name beside them.

    Raises:
        UserError: they have; the line says what to give.
    """
    stems: tuple[set[str], set[str]] = (set(), set())
    starts = [os.fsencode(name) + b"/" for name in both]
    for i in range(len(files)):
        for start, found in zip(starts, stems, strict=True):
            if (file := files[i]).startswith(start):
                stem = os.path.splitext(os.fsdecode(file[len(start) :]))[0].lower()
                found.add(_MASK_ENDING.sub("", stem))
    if not stems[1] or 2 * len(stems[0] & stems[1]) < len(stems[1]):
        return
    path, (images, masks) = path.rstrip("/"), both
    short = (images, masks) == ("images", "masks")
    pairs = f"pairs:{path}" if short else f"pairs:{path}/{images}:{path}/{masks}"
    raise UserError(
        f"{spec!r} holds masks beside images ({images}/, {masks}/): give flat:{path}/{images} for "
        f"the images alone; evaluate segment takes both as {pairs}"
    )


def warn_masks(spec: str, files: Names) -> None:
    """Warn where many of the files are named as masks that lie beside their images."""
    tried = np.unique(np.linspace(0, len(files) - 1, _TRIED).round().astype(int))
    names = [os.path.basename(os.fsdecode(files[int(i)])) for i in tried]
    masks = [name for name in names if _MASK_NAME.search(os.path.splitext(name)[0].lower())]
    if _MASK_SHARE * len(names) < len(masks):
        text = "warning: %s: %d of %d files looked at are named like masks of others, as %s"
        log.warning(text, spec, len(masks), len(names), masks[0])


def why_no_classes(
    folders: Sequence[str], counts: Sequence[int], beside: int, within: int = 0
) -> str:
    """Reason why sub-folders are no classes, empty if they are.

    Args:
        counts: images in each folder, at any depth.
        within: folders in the only folder, where there is one.
        beside: images that lie beside the folders. A single one, or a tenth of those within, are
            strays; more of them mean that folders have another sense.
    """
    if not folders:
        return "there are no class folders"
    if len(folders) == 1:
        more = f"; folder:.../{folders[0]} takes its folders for classes" if within else ""
        return f"{folders[0]!r} is the only folder, and one class is no label{more}"
    if images_and_masks(folders) is not None:
        return f"{' and '.join(map(repr, images_and_masks(folders) or ()))} are no classes"
    used = [name for name, count in zip(folders, counts, strict=True) if count]
    if len(used) == 1 and used[0].lower() in _IMAGES:
        return f"{used[0]!r} alone holds images"
    if beside > 1 and 10 * beside > sum(counts):
        return f"{beside:,} images lie beside the folders, {sum(counts):,} within"
    return ""
