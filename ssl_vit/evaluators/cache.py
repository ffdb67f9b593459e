"""Feature cache: features kept on disk, keyed by weights, images and preparation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ssl_vit import __version__
from ssl_vit.common.errors import UserError
from ssl_vit.common.files import cache_folder, write_atomically
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.fingerprint import content_of
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.weights.exchange import read_safetensors

log = logging.getLogger("ssl_vit")
ALL_UP_TO = 100_000
"""Up to this many images all are read; of larger sets this many, evenly spread."""
_LARGEST_CACHE = 50 << 30


def contents(source: Source, most: int = ALL_UP_TO) -> list[tuple[bytes, bool]]:
    """Content of each image, of more than ``most`` that many, evenly spread; and whether it can be
    read: what stands for an image that cannot is the reason."""
    n, found = len(source), []
    for i in np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist():
        try:
            found.append((content_of(source.read(i)[0]), True))
        except BadImage as error:
            found.append((content_of(f"unreadable: {error}".encode()), False))
    return found


def content_sha256(source: Source, found: list[tuple[bytes, bool]] | None = None) -> str:
    """SHA-256 of the content of a source, independent of its name: image bytes and labels.

    Of more than 100,000 images that many, evenly spread, are read; labels are read of all.
    ``found``: its :func:`contents`, if known already.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    for content, _ in contents(source) if found is None else found:
        digest.update(content)
    for known in (source.labels, source.targets):
        digest.update(b"none" if known is None else np.ascontiguousarray(known).data)
    return digest.hexdigest()


def cached(
    about: dict[str, object],
    make: Callable[[], FeatureSet],
    write: bool,
    anywhere: Callable[[bool], bool] = bool,
) -> FeatureSet:
    """Features described completely by ``about``: from the cache, or computed and stored there.

    Its "source" is for the log only: the name of a source changes no feature. On a full or
    read-only disk a warning is logged and the features are returned all the same. Beyond 50 GiB
    the least recently used files are deleted.

    Args:
        write: whether this process is the one that stores them.
        anywhere: whether a flag is true in any process. Features missing in one of them (each
            machine may have its own cache) are computed by all processes together.
    """
    parts = {key: value for key, value in about.items() if key != "source"}
    text = json.dumps(parts | {"version": __version__}, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = cache_folder() / "features" / f"{key}.safetensors"
    found = _kept(path)
    if not anywhere(found is None):
        assert found is not None
        log.info("features of %s: read from the cache", about["source"])
        return found
    made = make()
    if write:
        _keep(path, made)
    return made


def _kept(path: Path) -> FeatureSet | None:
    """Features in a cache file; None if missing or damaged."""
    if not path.is_file():
        return None
    try:
        found, metadata = read_safetensors(path)
        labels, index = found.pop("labels"), found.pop("index")
        kept = FeatureSet(found, labels, int(metadata["unreadable"]), index)
    except (UserError, OSError, KeyError) as error:
        log.warning("%s is damaged and will be recomputed: %s", path, error)
        return None
    with contextlib.suppress(OSError):  # a cache may be read-only
        path.touch()
    return kept


def _keep(path: Path, made: FeatureSet) -> None:
    tensors = {k: v.contiguous() for k, v in made.parts.items()}
    tensors |= {"labels": made.labels, "index": made.index}
    metadata = {"unreadable": str(made.unreadable)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in kept)
        while kept and total > _LARGEST_CACHE and kept[0] != path:
            total -= kept[0].stat().st_size
            kept.pop(0).unlink()
    except Exception as error:  # safetensors raises its own errors for a full disk
        log.warning("the features are not cached in %s: %s", path.parent, error)


def labels_sha256(labels: torch.Tensor) -> str:
    """SHA-256 of labels, in order."""
    return hashlib.sha256(labels.cpu().contiguous().numpy().tobytes()).hexdigest()
