"""Options of images: where they are, and how files become pixels and labels."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from ssl_vit.common.addresses import check_no_secret
from ssl_vit.common.checks import (
    check_least,
    check_positive,
    check_share,
    check_size,
    flag,
    is_number,
)
from ssl_vit.common.errors import UserError, check

BESIDE = ("pairs", "depth", "coco")
"""Schemes of images with masks, depth maps or annotated objects beside them."""


def beside(spec: str) -> str:
    """Scheme of ``BESIDE`` in a specification: the kind of files beside its images; empty: none."""
    return next((scheme for scheme in BESIDE if f"{scheme}:" in spec), "")


def _is_window(texts: tuple[str, ...]) -> bool:
    """True for the centre and the width of a window."""
    numbers = [float(text) for text in texts if is_number(text)]
    return len(numbers) == len(texts) == 2 and all(map(math.isfinite, numbers)) and numbers[1] > 0


@dataclass(frozen=True)
class ReadConfig:
    """Reading of files as images and labels, where they leave a choice."""

    prefix: ClassVar[str] = "data"

    nodata: str = "auto"
    """Pixels without data: those of this value. auto: NaN, what a GeoTIFF declares, and the padding
    of DICOM. none: every value is data."""
    slices: str = "middle"
    """Planes that are read of files with several (z-stacks, time series, pages, frames of DICOM):
    all, each as an image of its own; the middle one; or the one of this number, from 0."""
    key: Literal["auto", "webdataset", "full"] = "auto"
    """Shards: a sample is named up to the first dot after the last slash (webdataset), or up to the
    last one (full), for names with dots of their own. auto: full where that is certain."""
    image: str = ""
    """Shards: extension of the member that is the image (rgb.png), where a sample has several.
    Hugging Face: the column. Empty: chosen by the names, and reported."""
    labels: str = ""
    """CSV file of labels for any images: a column with the image's name, and one with its class or
    several of 1 and 0 for labels that do not exclude each other (blank: unknown)."""
    label_column: tuple[str, ...] = ()
    """Columns of labels in the CSV, in a Hugging Face data set, or in the .json files of shards (or
    txt: their whole text); of several each holds 1 or 0. Empty: chosen by name, and reported."""
    bands: tuple[int, ...] = ()
    """Bands of each file that are read, in this order, counted from 1 as by GDAL: 4 3 2. Images
    then have these alone, and --data.channels follows. Empty: all."""
    values: Literal["stored", "scaled"] = "stored"
    """GeoTIFF: values as stored, or scaled, by the scale and offset that a file declares for its
    bands (value * scale + offset, not divided by what its bits can hold)."""
    tile: tuple[int, ...] = ()
    """Images larger than this are cut into tiles, each an image of its own that is read without the
    rest: height and width in pixels, or one number for both. They do not overlap, but for the last
    ones of rows and columns, which end where the image does. Empty: whole images."""
    level: int = 0
    """Level of a pyramid (slides, overviews of GeoTIFFs): 0 is the full size, 1 the next one."""
    window: tuple[str, ...] = ("file",)
    """Gray values of DICOM from black to white. file: the first window or VOI table of each file,
    where it has one. full: all that the stored bits can hold. CENTER WIDTH: these, in the units of
    the modality (CT: Hounsfield), as 40 400."""
    group: str = ""
    """Groups of images that belong together (of one patient, scene or slide) and are never split: a
    column of --data.labels, or a DICOM keyword as PatientID, by its name; or name:PATTERN, a
    regular expression whose first brackets match the group in an image's path. column:NAME and
    dicom:NAME are one of the two. Empty: every image is by itself."""
    shard_cache: str = ""
    """Folder, best on a fast disk of this machine, that shards of the network (s3://, gs://,
    https://) are fetched into, for all processes and runs. Empty: $SSL_VIT_CACHE, or
    ~/.cache/ssl_vit."""
    shard_cache_size: float = 100.0
    """Shards of the network that are kept there at most, in GB; those not used for longest go."""
    cache_reserve: float = 10.0
    """Room that --data.cache and --data.shard-cache leave free on their disks, in GB. Of memory
    (--data.cache ram), at most half of what is free at the start."""

    def __post_init__(self) -> None:
        check(
            self.window in (("file",), ("full",)) or _is_window(self.window),
            f"{flag(self, 'window')} is {' '.join(self.window)}; allowed: file, full, or two "
            "numbers, CENTER and a WIDTH above 0",
        )
        check_size(self, "tile")
        check_least(self, 0, "level")
        check_least(self, 1, "bands")
        check(
            self.nodata in ("auto", "none") or is_number(self.nodata),
            f"{flag(self, 'nodata')} is {self.nodata!r}; allowed: auto, none, or a number",
        )
        check(
            self.slices in ("all", "middle") or self.slices.isdecimal(),
            f"{flag(self, 'slices')} is {self.slices!r}; allowed: all, middle, or a number from 0",
        )
        check_least(self, 0, "cache_reserve")
        check_positive(self, "shard_cache_size")
        self._check_group()

    def _check_group(self) -> None:
        kind, text = self.grouping
        given = f"{flag(self, 'group')} is {self.group!r}"
        check(bool(text) or not self.group, f"{given}; it lacks what follows '{kind}:'")
        if kind == "column":
            check(bool(self.labels), f"{given}; a column needs {flag(self, 'labels')} CSV")
        if kind == "name":
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(f"{given}; it is no regular expression: {error}") from None

    @property
    def grouping(self) -> tuple[str, str]:
        """Kind of the groups' key (name, column, dicom; empty for a plain name), and the rest."""
        kind, colon, text = self.group.partition(":")
        return (kind, text) if colon and kind in ("name", "column", "dicom") else ("", self.group)

    @property
    def content(self) -> dict[str, Any]:
        """The options that decide images, their values and their labels: not which images belong
        together, nor where shards are kept."""
        aside = ("group", "shard_cache", "shard_cache_size", "cache_reserve")
        return {f.name: getattr(self, f.name) for f in fields(ReadConfig) if f.name not in aside}

    @property
    def decoding(self) -> str:
        """Options that decide the pixel values of an image, without those of its place and
        labels."""
        usual = f"slices {self.slices}, nodata {self.nodata}, window {' '.join(self.window)}"
        others = {name: getattr(self, name) for name in ("bands", "values", "tile", "level")}
        given = [f", {name} {v}" for name, v in others.items() if v != getattr(ReadConfig, name)]
        return usual + "".join(given)


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    """Images and how they are read."""

    train: str = "digits:train"
    """Training images: digits, folder:PATH (sub-folders are classes), flat:PATH (unlabelled),
    tar:PATH-{000000..000146}.tar, s3://BUCKET/NAME-{000000..000146}.tar (gs://, https://),
    torchvision:NAME:ROOT[:SPLIT], hf:NAME_OR_PATH[:SPLIT]; and of any of them kept:SOURCE, four
    fifths, or held:SOURCE, the other fifth. Several as A*2,B: images of A are drawn twice an epoch,
    those of B once; any number above 0."""
    val: str = ""
    """Held-out images, in the same form. Empty: --data.holdout images of the training set."""
    holdout: int = 500
    """Number of training images (at most a tenth) that are held out without --data.val. Of
    pretraining with --init.encoder and labels, half of them are to choose the best encoder by; with
    --data.val this many are held out for that."""
    preset: Literal["natural", "gray", "aerial", "microscopy", "medical"] = "natural"
    """Augmentation for a kind of image; single options of the method win over it. natural: that of
    each method, made for photographs. gray: levels in place of colour jitter, no turning gray.
    aerial: any orientation (flips, quarter turns), channels dropped, no gray, no solarise; colour
    jitter for 3 channels, levels for others. microscopy: the same, with levels of each channel for
    colour jitter. medical: left, right and up are kept; levels and mild noise, no blur."""
    channels: int = 3
    """Channels of an image: 3 (gray is repeated), 1 (colour turns gray), or what the files have."""
    statistics: Literal["default", "auto"] = "default"
    """default: those of the encoder that training begins with; else ImageNet's mean and standard
    deviation for 8-bit images of 3 channels, estimated for others. auto: estimated from 2000
    training images. Without effect when --data.mean is given."""
    mean: tuple[float, ...] = ()
    """Mean per channel; images of 8 and unsigned 16 bits are scaled to 0..1, others as they are."""
    std: tuple[float, ...] = ()
    """Standard deviation per channel, as the mean."""
    workers: int = -1
    """Loader processes for each training process. -1: one for each core it has (when it trains on
    the CPU itself, for every second one), at most 16."""
    max_bad: float = 0.05
    """Stop when more than this share of the images is unreadable."""
    cache: str = ""
    """Cache of decoded training images, filled when they are first used, for later epochs and other
    runs. Crops are the same. A folder, best on a fast disk of this machine; or ram: memory of this
    machine, for all its processes, until the last run that uses it ends. Empty: nowhere."""
    shard_window: int = 0
    """Order of shards. 0: images are drawn from all shards at once. 8: shards in random order, and
    images shuffled within 8 of them at a time, for disks that read best in a row, and for shards of
    the network of which --data.shard-cache cannot hold all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_secret(self.train)
        check_no_secret(self.val)
        check_least(self, 1, "channels")
        self._follow_bands()
        check_least(self, 0, "holdout", "shard_window")
        check_least(self, -1, "workers")
        check_share(self, "max_bad")
        check(len(self.mean) == len(self.std), "--data.mean and --data.std go together")
        for option in ("mean", "std"):
            n = len(getattr(self, option))
            check(
                n in (0, self.channels),
                f"{flag(self, option)} has {n} values; --data.channels is {self.channels}",
            )
        check_positive(self, "std")

    def _follow_bands(self) -> None:
        """Set the channels to the number of the bands, where they are at the default of colour.

        Gray is repeated to 3 channels, and three bands can be made gray, as of any file.
        """
        bands = len(self.bands)
        if bands and self.channels == DataConfig.channels and bands not in (1, 3):
            object.__setattr__(self, "channels", bands)
        fits = bands in (0, self.channels) or {bands, self.channels} == {1, 3}
        check(
            fits,
            f"{flag(self, 'bands')} names {bands} bands; {flag(self, 'channels')} is "
            f"{self.channels}: give {flag(self, 'channels')} {bands}",
        )
