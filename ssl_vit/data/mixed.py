"""Mixed sources: several under one name, joined by commas, each with a weight behind a star."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source, known_labels
from ssl_vit.data.draws import Mix
from ssl_vit.data.shard_names import find_shards

_WEIGHT = re.compile(r"\s*\*\s*(\d+\.?\d*|\.\d+)\s*$")
_BEFORE = re.compile(r"(?:(?:kept|held):)*(\w*):?")


def parts_of(spec: str, schemes: Iterable[str]) -> list[tuple[str, float]]:
    """Sources that a string names, and the weight of each, 1 where it gives none.

    A comma parts them only where a scheme follows it: ``folder:a,b`` and ``tar:x-{1,2}.tar`` are
    one source. ``*NUMBER`` is a weight only at the end. What exists on the disk by the whole name,
    a path or shards of a pattern, is one source of weight 1.

    Raises:
        UserError: a weight is 0, or a source is named twice.
    """
    named = "|".join(scheme for scheme in schemes if scheme != "digits")
    follows = rf"(?:kept:|held:)*(?:(?:{named}):|digits(?:$|[,:*]))"
    texts = [spec] if _is_there(spec) else re.split(rf"\s*,\s*(?={follows})", spec)
    found = []
    for text in texts:
        star = _WEIGHT.search(text)
        if star is None or _is_there(text):
            found.append((text, 1.0))
            continue
        check(float(star[1]) > 0, f"{text!r} has the weight 0; it must be above 0")
        found.append((text[: star.start()], float(star[1])))
    names = [name for name, _ in found]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    check(not twice, f"{spec!r} names {twice[:1]} twice; give it once, with a weight: SOURCE*2")
    return found


def _is_there(spec: str) -> bool:
    """True if a path, or shards, exist by the whole name behind the scheme."""
    if not re.search(r",|\*[\d.]+$", spec):
        return False  # nothing to decide
    start = _BEFORE.match(spec)
    assert start is not None
    scheme, path = start[1], spec[start.end() :]
    if "://" in path:
        return False
    if scheme != "tar":
        return bool(path) and Path(path).expanduser().exists()
    try:
        return bool(find_shards(spec, path))
    except UserError:
        return False


class Mixed(Source):
    """Mixed source: the images of several, one after the other; ``mix`` says how they are drawn.

    Classes of equal names are one class; an image of a source without labels has none.
    """

    def __init__(
        self,
        spec: str,
        parts: Sequence[Source],
        names: Sequence[str],
        weights: Sequence[float],
        reading: ReadConfig,
    ) -> None:
        """``names``: of the sources, as they were given."""
        self.spec, self.parts, self.reading = spec, tuple(parts), reading
        counts = [len(part) for part in parts]
        self.firsts = np.cumsum([0, *counts])
        of = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        self.mix: Mix = Mix(tuple(names), tuple(weights), of)
        self.apart = next((part.apart for part in parts if part.apart), "")
        self.file_of = _joined([part.file_of for part in parts], counts)
        self.groups = _joined_groups(parts)
        self._label()

    def _label(self) -> None:
        """Join the labels of the sources."""
        known = [part for part in self.parts if known_labels(part).any()]
        reasons = dict.fromkeys(part.labels_from for part in known or self.parts)
        self.labels_from = "; ".join(filter(None, reasons))
        if not known:
            return
        names = dict.fromkeys(name for part in known for name in part.classes or ())
        number = {name: i for i, name in enumerate(names)}
        of_class = [part for part in known if part.labels is not None]
        if of_class and len(of_class) < len(known):
            self.labels_from = "some sources have one class an image, others several labels"
        elif any(part.classes is None for part in known):
            self.labels_from = "not all classes of the sources have names"
        elif of_class:
            self.classes = tuple(names)
            self.labels = np.concatenate([_renumbered(part, number) for part in self.parts])
        else:
            self.classes = tuple(names)
            self.targets = np.concatenate([_placed(part, number) for part in self.parts])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def _place(self, i: int) -> tuple[Source, int]:
        """Source of an image, and its index there."""
        i = range(len(self))[i]
        part = int(self.mix.of[i])
        return self.parts[part], i - int(self.firsts[part])

    def read(self, i: int) -> Item:
        part, own = self._place(i)
        return part.read(own)[0], self.label(i)

    def stream(self, i: int) -> io.IOBase:
        part, own = self._place(i)
        return part.stream(own)

    def name(self, i: int) -> str:
        part, own = self._place(i)
        return part.name(own)

    def inner_name(self, i: int) -> str:
        part, own = self._place(i)
        return part.inner_name(own)

    def listing(self) -> Iterable[np.ndarray]:
        """Listings of the sources, the number of images of each, and the weights."""
        for part in self.parts:
            yield from part.listing()
        yield self.firsts
        yield np.array(self.mix.weights)


def _joined(files: Sequence[np.ndarray | None], counts: Sequence[int]) -> np.ndarray | None:
    """Files of all images, int64 (n,), None where each image is a file in every source."""
    if all(own is None for own in files):
        return None
    start, made = 0, []
    for own, count in zip(files, counts, strict=True):
        made.append(start + (np.arange(count) if own is None else own))
        start += count
    return np.concatenate(made).astype(np.int64)


def _joined_groups(parts: Sequence[Source]) -> np.ndarray | None:
    """Groups of all images; those that are by themselves in a source are so in the mix, and parts
    of one file stay together."""
    if all(part.groups is None for part in parts):
        return None
    start, made = 0, []
    for part in parts:
        own = part.groups
        if own is None:
            own = -1 - (np.arange(len(part)) if part.file_of is None else part.file_of)
        made.append(np.where(own < 0, own - start, own))
        start += len(part)
    return np.concatenate(made).astype(np.int64)


def _renumbered(part: Source, number: dict[str, int]) -> np.ndarray:
    """Class numbers of the images of a source among those of all, int64 (n,), -1 where unknown."""
    if part.labels is None:
        return np.full(len(part), -1, dtype=np.int64)
    place = np.array([*(number[name] for name in part.classes or ()), -1], dtype=np.int64)
    return place[part.labels]


def _placed(part: Source, number: dict[str, int]) -> np.ndarray:
    """Outcomes of the images of a source among the labels of all, float32 (n, L)."""
    made = np.full((len(part), len(number)), np.nan, dtype=np.float32)
    if part.targets is not None:
        made[:, [number[name] for name in part.classes or ()]] = part.targets
    return made
