"""The protocol of a score: everything needed to make the number again, as JSON beside it."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssl_vit import __version__
from ssl_vit.data.sources import Source
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.features import FeatureSet, View
from ssl_vit.evaluators.scores import Score
from ssl_vit.files import write_text_atomically

_PACKAGES = ("torch", "torchvision", "timm", "numpy")


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
