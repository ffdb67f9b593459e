"""Source opening: one string names a source of any kind."""

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ssl_vit.common.addresses import ADDRESS, check_no_secret
from ssl_vit.common.errors import NothingFound, UserError, check, did_you_mean
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source, Subset, split_holdout
from ssl_vit.data.groups import group_count, groups_of
from ssl_vit.data.labels import labelled_by
from ssl_vit.data.mixed import Mixed, parts_of
from ssl_vit.data.remote import SCHEMES
from ssl_vit.data.scales import log_scales
from ssl_vit.data.slices import with_planes
from ssl_vit.data.tiles import is_cut, with_tiles

__all__ = ["Source", "Subset", "open_source", "split_holdout"]
log = logging.getLogger("ssl_vit")

# Imported on demand, so that no source needs another's libraries.
_OPENERS = {
    "digits": ("ssl_vit.data.sources", "open_digits"),
    "folder": ("ssl_vit.data.folder", "open_folder"),
    "flat": ("ssl_vit.data.folder", "open_flat"),
    "tar": ("ssl_vit.data.tar", "open_tar"),
    "pairs": ("ssl_vit.data.pairs", "open_pairs_source"),
    "depth": ("ssl_vit.data.depths", "open_depths_source"),
    "coco": ("ssl_vit.data.coco", "open_coco"),
    "torchvision": ("ssl_vit.data.torchvision_sets", "open_torchvision"),
    "hf": ("ssl_vit.data.huggingface", "open_hf"),
    **dict.fromkeys(SCHEMES, ("ssl_vit.data.remote_tar", "open_remote")),
}
_FORMS = (
    "digits[:train|:val], folder:PATH, flat:PATH, tar:PATTERN, s3:// gs:// https:// ....tar, "
    "torchvision:NAME:ROOT[:SPLIT], hf:NAME_OR_PATH[#CONFIG][:SPLIT], pairs:ROOT, depth:ROOT, "
    "coco:IMAGES:ANNOTATIONS.json, and of any of them kept:SOURCE, held:SOURCE; several as "
    "SOURCE*2,SOURCE"
)
# Parts of a source, in the order of split_holdout, and the share of the second: a fifth.
_PARTS, _FIFTH = ("kept", "held"), 5


def open_source(
    spec: str,
    reading: ReadConfig | None = None,
    channels: int | None = None,
    weighted: bool = False,
) -> Source:
    """Open the source that `spec` names; `reading`: how its files are read, if not as by default.

    `channels` that its images are decoded to, by default those of `reading`, or 3: what is a plane
    of a file and what a channel may depend on it. `weighted`: whether sources may have weights,
    which only training draws by.

    - `digits`, `digits:train`, `digits:val`: scikit-learn's 8x8 digits; all, 80 %, the other 20 %.
    - `folder:PATH`: class sub-folders; with many images directly in PATH all are unlabelled.
    - `flat:PATH`: the images at any depth, unlabelled; sub-folders are not classes.
    - `tar:PATTERN`: WebDataset shards; ranges `{000000..000146}`, lists, wildcards, or one file.
    - `s3://PATTERN`, `gs://`, `http://`, `https://`, and any of them after `tar:`: shards of the
      network, fetched into a cache.
    - `pairs:ROOT`, `depth:ROOT`: images with masks, or depth maps, beside them (`pairs.open_pairs`,
      `depths.open_depths`).
    - `coco:IMAGES:ANNOTATIONS.json`, `coco:ROOT`: images with annotated objects (`coco.open_coco`).
    - `torchvision:NAME:ROOT[:SPLIT]`: a torchvision data set that is already on disk.
    - `hf:NAME_OR_PATH[#CONFIG][:SPLIT]`: a Hugging Face data set, or the folder of a saved one.
    - `kept:SOURCE`, `held:SOURCE`: of any of these, four fifths and the other fifth, at random but
      always the same, so that options can be chosen without a validation set.
    - `SOURCE*2,SOURCE`: several of these, with weights (``mixed.parts_of``).

    Labels are the source's own, or those of `reading.labels`, a CSV file. Groups of images are
    those of `reading.group`.

    Raises:
        UserError: `spec` cannot be opened; the message lists the allowed forms.
        RunFailed: a server does not answer.
    """
    reading = reading or ReadConfig()
    parts = parts_of(spec, _OPENERS)
    if len(parts) == 1 and parts[0][0] == spec:
        return _open(spec, reading, channels)
    weights = [weight for _, weight in parts]
    check(
        weighted or all(weight == 1 for weight in weights),
        f"{spec!r} has weights, by which training images are drawn in pretrain and finetune; here "
        "give the sources without them",
    )
    missing: list[NothingFound] = []
    sources = [_open_part(part, reading, channels, missing) for part, _ in parts]
    for option in ("labels", "group"):
        if len(of := [error for error in missing if option in error.options]) == len(parts):
            raise of[0]
    source = Mixed(spec, sources, [name for name, _ in parts], weights, reading)
    log.info("%s: mixed: %s", spec, source.mix.about())
    return source


def _open_part(
    spec: str, reading: ReadConfig, channels: int | None, missing: list[NothingFound]
) -> Source:
    """Open one of several sources. It may have no line in the CSV, or no groups; ``missing`` takes
    in what it has not, which is reported."""
    try:
        return _open(spec, reading, channels)
    except NothingFound as error:
        missing.append(error)
        log.warning("warning: %s", error)
        dropped: dict[str, Any] = dict.fromkeys(error.options, "")
        if "labels" in dropped:
            dropped["label_column"] = ()
        return _open_part(spec, replace(reading, **dropped), channels, missing)


def _open(spec: str, reading: ReadConfig, channels: int | None) -> Source:
    """Open one source, as :func:`open_source`."""
    check_no_secret(spec)
    scheme, _, rest = spec.partition(":")
    if scheme == "tar" and rest.partition("://")[0] in SCHEMES and "://" in rest:
        scheme, _, rest = rest.partition(":")
    if scheme in _PARTS and rest:
        return _part(_open(rest, reading, channels), spec, _PARTS.index(scheme))
    _refuse_address(spec, scheme, rest)
    if scheme not in _OPENERS:
        raise UserError(
            f"{spec!r} names no source of images{_hint(spec, scheme)}; allowed: {_FORMS}"
        )
    if not rest and scheme != "digits":
        raise UserError(f"{spec!r} lacks what follows '{scheme}:'; allowed: {_FORMS}")
    module, function = _OPENERS[scheme]
    own = replace(reading, label_column=()) if reading.labels else reading  # columns of the CSV
    source: Source = getattr(importlib.import_module(module), function)(spec, rest, own)
    source.reading = reading
    if reading.labels:
        source = labelled_by(source, Path(reading.labels).expanduser(), reading.label_column)
    if reading.group and source.groups is None:
        source.groups = groups_of(source)
    log_scales(source)
    channels = channels or int(getattr(reading, "channels", 3))
    return with_tiles(source, channels) if is_cut(reading) else with_planes(source, channels)


def _part(source: Source, spec: str, number: int) -> Source:
    """A fixed part of a source, under the name that the user gave it.

    Raises:
        UserError: it has too few images to be parted.
    """
    part = split_holdout(source, len(source), 0, _FIFTH)[number]
    count = f"{len(source)} images"
    count += f" in {groups} groups" if (groups := group_count(source)) else ""
    check(len(part) > 0, f"{spec!r}: {source.spec} has {count}, too few for a fifth")
    part.spec = spec
    return part


def _refuse_address(spec: str, scheme: str, rest: str) -> None:
    """Refuse an address of the network, a command, or joined patterns, where a path is needed.

    Raises:
        UserError: it is one; the line says what can be given.
    """
    given = rest if scheme in _OPENERS else spec
    found = ADDRESS.match(given)
    if found is None:
        joined = scheme == "tar" and "::" in given and not Path(given).exists()
        check(
            not joined,
            f"{spec!r} joins patterns by '::'; give one: with braces, as tar:PATH/{{a,b}}-"
            "{000..009}.tar, or a wildcard, as 'tar:PATH/*.tar'",
        )
        return
    if scheme == "hf" or "huggingface.co/" in given:
        raise UserError(f"{spec!r}: name a data set of Hugging Face as hf:OWNER/NAME")
    if found[0] == "file://":
        raise UserError(f"{spec!r}: give the path alone, without file://")
    kind = scheme if scheme in _OPENERS else "tar"
    last = "NAME.tar" if found[0] == "pipe:" else given.rpartition("/")[2]
    raise UserError(
        f"{spec!r}: of the network only tar shards are read, by s3://, gs:// and https://: copy "
        "images first, or mount them (rclone, gcsfuse, mount-s3), and give the path: "
        f"'{kind}:/PATH/{last}'"
    )


def _hint(spec: str, scheme: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return f" (did you mean 'folder:{spec}'?)"
    if ".tar" in path.name and ":" not in spec:
        return f" (did you mean 'tar:{spec}'?)"
    return did_you_mean(scheme.lower(), _OPENERS)


class DigitsSource(Source):
    """Digits source: scikit-learn's handwritten digits, (8, 8) uint8; `numbers` are its indices."""

    def __init__(self, spec: str, images: np.ndarray, labels: np.ndarray, numbers: np.ndarray):
        self.spec, self.classes = spec, tuple(str(digit) for digit in range(10))
        self.images, self.labels, self.numbers = images, labels, numbers
        self.labels_from = "scikit-learn"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> Item:
        return self.images[i], self.label(i)

    def name(self, i: int) -> str:
        return f"digits[{self.numbers[i]}]"


def open_digits(spec: str, part: str, reading: ReadConfig | None = None) -> DigitsSource:
    """Open `digits`, or its fixed stratified part `train` (80 %) or `val` (20 %)."""
    if part not in ("", "train", "val") or spec == "digits:":
        raise UserError(f"{spec!r}: allowed are digits, digits:train and digits:val")
    table = _digits()
    images, labels = table[:, :-1], table[:, -1]
    numbers = np.arange(len(labels))
    if part:
        numbers = np.flatnonzero(_held_out(labels) == (part == "val"))
    pixels = np.rint(images.reshape(-1, 8, 8)[numbers] * (255 / 16)).astype(np.uint8)
    return DigitsSource(spec, pixels, labels[numbers].astype(np.int64), numbers)


def _digits() -> Float[np.ndarray, "n 65"]:
    """Digits as scikit-learn has them, 8 x 8 values from 0 to 16 and the class of each: read from
    its file, as an import of it takes a second."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.origin is not None
    return np.loadtxt(Path(found.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Mark a fifth of each class, bool (n,); RandomState's stream is frozen across versions."""
    random = np.random.RandomState(0)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        held[members[: round(len(members) / 5)]] = True
    return held
