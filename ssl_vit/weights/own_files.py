"""Our own encoder files: their names and metadata, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ssl_vit.common.errors import UserError, check

ENCODER_FILE, BEST_FILE = "encoder.safetensors", "encoder-best.safetensors"
# Networks of finetune and of detect.
MODEL_FILE, DETECTOR_FILE = "model.safetensors", "detector.safetensors"
# Formats of exports.
EXPORTS = ("timm", "huggingface", "onnx", "safetensors")
# Key of our metadata.
KEY = "ssl_vit"


def own_metadata(path: Path) -> dict[str, Any]:
    """Our metadata in a safetensors file; empty in files of other libraries.

    Raises:
        UserError: not a safetensors file, or our metadata key is damaged.
    """
    text = read_metadata(path).get(KEY, "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    check(isinstance(content, dict), f"{path}: metadata of another version of ssl_vit: {text:.60}")
    return dict(content)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file.

    Raises:
        UserError: not a safetensors file.
    """
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise not_safetensors(path, error) from None


def not_safetensors(path: Path, error: Exception) -> UserError:
    """Error of a file that is none; a pickle is reported as such."""
    start = _first_bytes(path)
    pickled = start[:1] == b"\x80" or start[:2] == b"PK"
    kind = "a pickle" if pickled else "damaged or another format"
    return UserError(f"{path}: not a safetensors file ({kind}): {error}")


def _first_bytes(path: Path) -> bytes:
    """First four bytes of a file; empty if it is not a file."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(4)
