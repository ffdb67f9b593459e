"""Files of a run folder: their names, and readers that need no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"
# A complete checkpoint's name as a pattern; not step-00001000-good: a user's own copy.
CHECKPOINT = "step-" + 8 * "[0-9]"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; lines that are truncated (by a killed run) or no rows are skipped."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [row for line in lines if (row := read_row(line)) is not None]


def read_row(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a metrics file; None if it is not a valid row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first. Interrupted saves have another name."""
    return sorted(path for path in folder.glob(CHECKPOINT) if is_whole(path))


def is_whole(path: Path) -> bool:
    """True if all files are there, with the sizes they were written with."""
    try:
        sizes = json.loads((path / STATE_FILE).read_text()).get("files", {})
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False
    except (ValueError, AttributeError, TypeError, RecursionError):
        return True  # damaged otherwise: reported when it is opened


def slug(spec: str) -> str:
    """Short name of a data set for a folder: the last part of its spec that has a letter."""
    parts = [re.sub(r"[^A-Za-z0-9]+", "-", p).strip("-") for p in re.split(r"[:/]", spec)]
    named = [p for p in parts if re.search("[A-Za-z]", p) and p not in ("train", "val", "test")]
    return named[-1] if named else "data"
