"""Protocol card: everything needed to reproduce a score, as JSON with it."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssl_vit import __version__
from ssl_vit.common.errors import RunFailed, check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.data.groups import group_count, shared_groups
from ssl_vit.data.sources import Source
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.score import Score

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")

# Reproduction: what must be identical, what is then compared, what may explain differences.
_IDENTITIES = (
    ("encoder", "weights_sha256"),
    ("train", "content_sha256"),
    ("train", "masks_sha256"),
    ("train", "depth_sha256"),
    ("val", "content_sha256"),
    ("val", "masks_sha256"),
    ("val", "depth_sha256"),
    ("train", "annotations_sha256"),
    ("val", "annotations_sha256"),
    ("model", "sha256"),
    ("held_out", "content_sha256"),
)
_NUMBERS = ("metrics", "interval", "per_class")
_AROUND = ("device", "precision", "processes", "versions")


def split_card(
    source: Source, features: FeatureSet | None, content: str, train: Source | None = None
) -> dict[str, Any]:
    """Card of a split: its source, number of images, content hash and label hash; its groups, and
    how many of them ``train`` has, too.

    ``content`` is the source's ``content_sha256``; ``features`` None: not extracted.
    """
    card: dict[str, Any] = {
        "source": source.spec,
        "images": len(source),
        "classes": None if source.classes is None else len(source.classes),
        "content_sha256": content,
    }
    if groups := group_count(source):
        card["groups"] = groups
        if train is not None and train is not source:
            card["groups_in_training"] = len(shared_groups(train, source))
    if features is not None:
        card |= {"images": len(features.index), "unreadable": features.unreadable}
        card["labels_sha256"] = labels_sha256(features.labels)
    return card


def protocol_card(
    evaluator: str, encoder: dict[str, Any], view: View, splits: dict[str, Any], **rest: Any
) -> dict[str, Any]:
    """Protocol card of one evaluation, ready for JSON."""
    transform = dataclasses.asdict(view) | {
        "crop_ratio": view.crop_ratio,
        "interpolation": "bicubic, antialiased",
    }
    return {
        "evaluator": evaluator,
        "encoder": encoder,
        "transform": transform,
        **splits,
        **rest,
        "versions": versions(),
    }


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the libraries that scores depend on; ``more``: of these, too."""
    own = {"ssl_vit": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in (*_PACKAGES, *more)}


def write_card(path: Path, card: dict[str, Any], scores: list[Score]) -> None:
    """Write the protocol card with its scores, atomically."""
    result = card | {"scores": [dataclasses.asdict(score) for score in scores]}
    text = json.dumps(result, indent=1)
    write_text_atomically(path, text + "\n")


def read_card(path: str) -> dict[str, Any]:
    """Read a result of :func:`write_card`, with options set for reproducing it.

    Precision is the one that was used, as ``auto`` may differ on another machine.

    Raises:
        UserError: no such file, or not a result.
    """
    try:
        card = json.loads(Path(path).expanduser().read_text())
        options = card["options"]
        options.pop("config", None)
        group = options.get("run", options)  # of a training run they are in groups
        group["precision"] = {"bfloat16": "bf16", "float32": "fp32"}[card["precision"]]
        whole = isinstance(card["scores"], list) and isinstance(card["evaluator"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    check(whole, f"{path!r} is not an evaluation result: a JSON file with its card and scores")
    return dict(card)


def check_same(path: str, before: dict[str, Any], now: dict[str, Any], scores: list[Score]) -> None:
    """Check a reproduced result: weights, images and numbers must equal those of the card.

    Raises:
        RunFailed: they differ; device, precision and versions that differ are named as well.
    """
    for part, key in _IDENTITIES:
        old, new = (made.get(part, {}).get(key) for made in (before, now))
        if old != new:
            raise RunFailed(f"{part} {key} was {old} in {path}, and is {new} now")
    made = json.loads(json.dumps([dataclasses.asdict(score) for score in scores]))
    if len(before["scores"]) != len(made):
        raise RunFailed(f"{path} has {len(before['scores'])} scores; there are {len(made)} now")
    different = [
        f"{old.get(key)} then, {new[key]} now"
        for old, new in zip(before["scores"], made, strict=True)
        for key in _NUMBERS
        if old.get(key) != _known(old, new, key)
    ]
    around = [
        f"{key} {before.get(key)} then, {now.get(key)} now"
        for key in _AROUND
        if before.get(key) != now.get(key)
    ]
    if different:
        raise RunFailed(f"{path}: the numbers differ: {'; '.join(different[:1] + around)}")


def _known(before: dict[str, Any], now: dict[str, Any], key: str) -> Any:
    """Numbers of a score; of metrics those that its card, of an earlier version, has as well."""
    if key != "metrics" or not isinstance(before.get(key), dict):
        return now[key]
    return {name: value for name, value in now[key].items() if name in before[key]}
