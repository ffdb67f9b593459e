"""Pictures inside the page, and those through a training."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_vit.figures import enlarged
from ssl_vit.reporting.story import Story

_WIDEST = 1500
_QUALITY = 88
_STAGES = 8
# A small picture on hover, in pixels of its longer side at least.
_HOVER = 96


def data_uri(picture: Image.Image) -> str:
    """A picture as text to stand in a page: WebP, or PNG where that is smaller."""
    picture = picture.convert("RGB")
    if picture.width > _WIDEST:
        size = (_WIDEST, round(picture.height * _WIDEST / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    made = []
    for kind, options in (("webp", {"quality": _QUALITY}), ("png", {"optimize": True})):
        box = io.BytesIO()
        picture.save(box, format=kind, **options)
        made.append((len(box.getvalue()), kind, box.getvalue()))
    _, kind, content = min(made)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def hover_picture(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A thumbnail as text, small ones enlarged with their pixels kept square."""
    return data_uri(Image.fromarray(enlarged(picture[None], _HOVER)[0]))


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
