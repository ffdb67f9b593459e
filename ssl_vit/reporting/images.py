"""Pictures of the page, and those of a training by step."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_vit.reporting.story import Story

# In pixels; WebP has no more than 16,383 a side.
_WIDEST, _HIGHEST, _LARGE = 1500, 12_000, 400_000
_QUALITY = 88
_STAGES = 8


def data_uri(picture: Image.Image) -> str:
    """A picture as text to stand in a page: WebP, or PNG where that is smaller."""
    picture = picture.convert("RGB")
    factor = min(1.0, _WIDEST / picture.width, _HIGHEST / picture.height)
    if factor < 1:
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    webp = _encoded(picture, "webp", quality=_QUALITY)
    if picture.width * picture.height > _LARGE:
        return webp  # PNG takes seconds there, and is far larger
    return min(webp, _encoded(picture, "png", optimize=True), key=len)


def thumbnail_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The same of a thumbnail, of which there are very many."""
    return _encoded(Image.fromarray(picture), "webp", quality=_QUALITY)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    box = io.BytesIO()
    picture.save(box, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(box.getvalue()).decode()}"


def stages(story: Story) -> dict[str, list[dict[str, object]]]:
    """Pictures of each kind, at most eight, evenly through the training, the last one included.

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
                size = story.run.images_per_step
                images = None if size is None else step * size
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError is what Pillow makes of a broken PNG.
        story.problems.append(f"{file}: no picture ({type(error).__name__})")
        return ""
