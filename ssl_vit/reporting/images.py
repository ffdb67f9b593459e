"""Pictures inside the page, and those through a training."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_vit.reporting.story import Story

_WIDEST = 1500
_QUALITY = 88
_STAGES = 8


def data_uri(picture: Image.Image) -> str:
    """A picture as text to stand in a page: WebP, or PNG where that is smaller."""
    picture = picture.convert("RGB")
    if picture.width > _WIDEST:
        size = (_WIDEST, round(picture.height * _WIDEST / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    webp, png = _encoded(picture, "webp", quality=_QUALITY), _encoded(picture, "png", optimize=True)
    return min(webp, png, key=len)


def thumbnail_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The same of a thumbnail, of which there are very many."""
    return _encoded(Image.fromarray(picture), "webp", quality=_QUALITY)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    box = io.BytesIO()
    picture.save(box, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(box.getvalue()).decode()}"


def stages(story: Story) -> dict[str, list[dict[str, object]]]:
    """Of each kind of picture at most eight, evenly through the training, the last one included.

    One that cannot be read becomes a line of ``story.problems``.
    """
    found: dict[str, list[dict[str, object]]] = {}
    for kind, by_step in sorted(story.pictures.items(), key=lambda item: _rank(item[0])):
        steps = sorted(by_step)
        picks = np.linspace(0, len(steps) - 1, min(_STAGES, len(steps))).round().astype(int)
        made: list[dict[str, object]] = []
        for step in (steps[i] for i in picks):
            source = _read(by_step[step], story)
            if source:
                images = step * story.images_per_step
                made.append({"step": step, "images": images, "source": source})
        if made:
            found[kind] = made
    return found


def _rank(kind: str) -> tuple[bool, str]:
    """A method's own pictures first, then those that every run has."""
    return kind in ("pca", "neighbours"), kind


def _read(file: Path, story: Story) -> str:
    try:
        with Image.open(file) as picture:
            return data_uri(picture)
    except (OSError, ValueError, SyntaxError) as error:  # the last is Pillow's for a broken PNG
        story.problems.append(f"{file}: no picture ({type(error).__name__})")
        return ""
