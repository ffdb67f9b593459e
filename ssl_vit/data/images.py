"""Images of a run: training and held-out sources, and pixel statistics."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ssl_vit.common.reading import DataConfig
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.data.cache import ImageCache, no_use, open_cache
from ssl_vit.data.fingerprint import fingerprint
from ssl_vit.data.groups import group_count, leaks, shared_groups
from ssl_vit.data.labels import align_classes
from ssl_vit.data.shard_order import check_order
from ssl_vit.data.sources import Source, open_source, split_holdout
from ssl_vit.data.statistics import FEW, MANY, Survey, estimate_statistics, survey

# Channels whose statistics a row shows; share of tiles that have one value everywhere.
_SHOWN, _FLAT = 4, 0.02


class Given(NamedTuple):
    """Encoder that training begins with: the option that names it, and the statistics of its own
    images."""

    option: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Images:
    """Images of a run: training and held-out sources, and pixel statistics.

    ``origin``: where the statistics are from. ``survey``: the training images that were looked at.
    ``warnings``: what looks wrong with them, with remedies.
    """

    train: Source
    val: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    deep: bool
    """More than 8 bits per channel, so values have no fixed range."""
    origin: str
    survey: Survey
    warnings: tuple[str, ...] = ()
    named: tuple[tuple[str, Source], ...] = ()
    """The sources that the options name, by option."""
    cache: ImageCache | None = None
    """Cache of decoded training images."""
    choice: Source | None = None
    """Images that are neither trained on nor scored: the best encoder of the run is chosen by them.
    None: there are no such."""
    no_choice: str = ""
    """Reason why there are none, where there is a best encoder to be chosen."""

    @property
    def held_out(self) -> bool:
        """True if ``val`` is separate from ``train``; if nothing is held out they are the same."""
        return self.val is not self.train

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint that detects changed images, JSON-serialisable: number and statistics of the
        training set, and ``content``, by option. Costs some hundred reads, once."""
        content = {option: fingerprint(source) for option, source in self.named}
        known = {"count": len(self.train), "mean": list(self.mean), "std": list(self.std)}
        return {**known, "content": content}

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on their values."""
        rest = f" ... ({len(self.mean)} channels)" if len(self.mean) > _SHOWN else ""
        mean, std = (", ".join(f"{v:.4g}" for v in s[:_SHOWN]) for s in (self.mean, self.std))
        rows = [("normalised by", f"mean {mean}{rest}, deviation {std}{rest}: {self.origin}")]
        looked = self.survey
        if looked.missing:
            how = f"--data.nodata {self.train.reading.nodata}"
            share = f"{100 * looked.missing:.3g} % of the pixels of {len(looked):,} images"
            none = f"; {looked.empty:,} of them hold none" if looked.empty else ""
            rows.append(("no data", f"{share} looked at ({how}){none}"))
        if self.train.mix is not None:
            rows.append(("mixed", self.train.mix.about()))
        if self.train.groups is not None:
            rows.append(("groups", self._about_groups()))
        if looked.tiles:
            tried = len(looked) + len(looked.reasons)
            what = f"{looked.tiles:,} of {tried:,} images looked at are tiles without data"
            rows.append(("empty tiles", f"{what}: others are taken for them"))
        if self.cache:
            each = looked.decoded / len(looked)
            rows.append(("cache", self.cache.about(len(self.train), each)))
        return rows

    def _about_groups(self) -> str:
        """Groups of both sides, in a line."""
        said = f"{group_count(self.train):,} by {self.train.reading.group}"
        if not self.held_out:
            return said
        both = len(shared_groups(self.train, self.val))
        leak = f"{both:,} OF THEM ARE ALSO IN TRAINING" if both else "none in both"
        return f"{said}, {group_count(self.val):,} held out: {leak}"


def open_images(data: DataConfig, seed: int, given: Given | None = None) -> Images:
    """Open the sources of a run, split off held-out images, check channels, get statistics.

    ``given``: the encoder that it begins with, if any.

    Raises:
        UserError: sources that do not exist, or do not match the options or each other; or there
            can be no ``data.cache``.
    """
    cache = open_cache(data)
    images = _opened(data, seed, given)
    if data.val:
        images.warnings += tuple(leaks({"data.train": images.train, "data.val": images.val}))
    if cache and (reason := no_use(images.train)):
        images.warnings += (f"--data.cache has no effect: {reason}",)
    elif cache:
        images.cache = cache
    return images


def _opened(data: DataConfig, seed: int, given: Given | None) -> Images:
    """The images of a run, without a cache."""
    train = open_source(data.train, data, weighted=True)
    check_order(train, data.shard_window)
    given_by = [("data.train", train)]
    if data.val:
        val = open_source(data.val, data)
        given_by.append(("data.val", val))
    else:
        rest, val = split_holdout(train, data.holdout, seed)
        train, val = (rest, val) if len(val) else (train, train)
    fixed = given.option if given and len(given.mean) == data.channels else ""
    for part in getattr(given_by[0][1], "parts", ()):  # one of them may be unreadable as a whole
        survey(part, data.channels, seed, 1).check(fixed, adapts=True)
    few = survey(train, data.channels, seed, FEW)
    few.check(fixed, adapts=True)
    if val is not train:
        others = "" if data.val else "give some by --data.val, or --data.holdout 0 for none"
        survey(val, data.channels, seed, 1).check(fixed, adapts=True, held_out=others)
    val = val if val is train else align_classes(train, val)
    usual = data.channels == 3 and data.statistics == "default" and not few.deep
    if not data.mean and not usual:
        return _estimated(train, val, data, seed, bool(few.deep), tuple(given_by))
    mean, std = (data.mean, data.std) if data.mean else (IMAGENET_MEAN, IMAGENET_STD)
    origin = "as given by --data.mean and --data.std" if data.mean else "ImageNet's"
    remedy = "give --data.statistics auto"
    if given and (given.mean, given.std) == (mean, std):
        origin = f"those of {given.option}"
    elif data.mean:
        remedy = "8 and unsigned 16 bits are decoded to 0..1, other values as they are"
    warnings = list(_on_missing(few, data))
    if wrong := few.misfit(mean, std):
        warnings.append(f"the training images {wrong} ({origin}); {remedy}")
    return Images(
        train, val, mean, std, bool(few.deep), origin, few, tuple(warnings), tuple(given_by)
    )


def _estimated(
    train: Source,
    val: Source,
    data: DataConfig,
    seed: int,
    deep: bool,
    given_by: tuple[tuple[str, Source], ...],
) -> Images:
    """Images with statistics of their own."""
    many = survey(train, data.channels, seed, MANY)
    mean, std, warnings = estimate_statistics(many)
    origin = f"estimated from {len(many):,} training images"
    if many.deep < len(many) and many.deep:
        origin += f", {many.deep:,} of them of more than 8 bits"
    warnings += _on_missing(many, data)
    deep = deep or bool(many.deep)
    return Images(train, val, mean, std, deep, origin, many, tuple(warnings), given_by)


def _on_missing(looked: Survey, data: DataConfig) -> Iterator[str]:
    """Warnings of more images without any data than a run allows, and of such that look like it."""
    values = looked.constant if data.tile else []
    if len(values) >= max(2, _FLAT * len(looked)):
        first = "" if values[0] else "; if 0 is no data, give --data.nodata 0"
        yield (
            f"{len(values):,} of {len(looked):,} images looked at have one value everywhere, as "
            f"{values[0]:.6g}, and teach nothing{first}"
        )
    if looked.empty > data.max_bad * len(looked):
        yield (
            f"{looked.empty} of {len(looked)} images looked at hold no data, and are replaced by "
            f"others; when more than --data.max-bad {data.max_bad:g} of all are found, the run "
            "stops: raise it, or leave such images out"
        )
