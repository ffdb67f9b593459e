"""The protocol of a score: everything needed to make the number again, as JSON beside it."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssl_vit import __version__
from ssl_vit.common.config import RunFailed, check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.data.sources import Source
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.scores import Score

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")

# What must be the same for a result to be the same, what is then compared, and what may explain it.
_IDENTITIES = (
    ("encoder", "weights_sha256"),
    ("train", "content_sha256"),
    ("train", "masks_sha256"),
    ("val", "content_sha256"),
    ("val", "masks_sha256"),
    ("held_out", "content_sha256"),
)
_NUMBERS = ("metrics", "interval", "per_class")
_AROUND = ("device", "precision", "processes", "versions")


def split_card(source: Source, features: FeatureSet | None, content: str) -> dict[str, Any]:
    """Which images: what they were named, how many, what is in them, and how they are labelled.

    ``content`` is the source's ``content_sha256``; ``features`` None: they were not all looked at.
    """
    card: dict[str, Any] = {
        "source": source.spec,
        "images": len(source),
        "classes": None if source.classes is None else len(source.classes),
        "content_sha256": content,
    }
    if features is not None:
        card |= {"images": len(features.index), "unreadable": features.unreadable}
        card["labels_sha256"] = labels_sha256(features.labels)
    return card


def protocol_card(
    evaluator: str, encoder: dict[str, Any], view: View, splits: dict[str, Any], **rest: Any
) -> dict[str, Any]:
    """The whole protocol of one evaluation, ready for JSON."""
    transform = dataclasses.asdict(view) | {
        "crop_ratio": view.crop_ratio,
        "interpolation": "bicubic, antialiased",
    }
    versions = {"ssl_vit": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in _PACKAGES}
    return {
        "evaluator": evaluator,
        "encoder": encoder,
        "transform": transform,
        **splits,
        **rest,
        "versions": versions,
    }


def write_card(path: Path, card: dict[str, Any], scores: list[Score]) -> None:
    """The protocol with its scores, written whole or not at all."""
    result = card | {"scores": [dataclasses.asdict(score) for score in scores]}
    text = json.dumps(result, indent=1)
    write_text_atomically(path, text + "\n")


def read_card(path: str) -> dict[str, Any]:
    """A result as :func:`write_card` left it, its options set so that it can be done again.

    Precision is the one that was used, which on another machine ``auto`` may not mean.

    Raises:
        UserError: no such file, or no result.
    """
    try:
        card = json.loads(Path(path).expanduser().read_text())
        card["options"].pop("config", None)
        card["options"]["precision"] = {"bfloat16": "bf16", "float32": "fp32"}[card["precision"]]
        whole = isinstance(card["scores"], list) and isinstance(card["evaluator"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    check(whole, f"{path!r} is no result of an evaluation: a JSON file with its card and scores")
    return dict(card)


def check_same(path: str, before: dict[str, Any], now: dict[str, Any], scores: list[Score]) -> None:
    """Refuse a result done again with other weights, images or numbers than the card says.

    Raises:
        RunFailed: what differs, and what else was different around it.
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
        if old.get(key) != new[key]
    ]
    around = [
        f"{key} {before.get(key)} then, {now.get(key)} now"
        for key in _AROUND
        if before.get(key) != now.get(key)
    ]
    if different:
        raise RunFailed(f"{path}: the numbers differ: {'; '.join(different[:1] + around)}")
