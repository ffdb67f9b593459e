"""Panels: pictures kept in a run folder, and features kept for TensorBoard's projector."""

from __future__ import annotations

import shutil
from pathlib import Path

BOARD_FOLDER = "tensorboard"
PROJECTION = "features"
_PANELS = "panels"
_MOST_PANELS = 32


def panel_file(folder: Path, name: str, step: int) -> Path:
    """Path of the picture made after ``step`` steps."""
    return folder / _PANELS / name / f"step-{step:08d}.png"


def projections(folder: Path) -> dict[int, Path]:
    """TensorBoard projector data of a run: by step, a folder of ``tensors.tsv``,
    ``metadata.tsv`` and ``sprite.png``."""
    found = (folder / BOARD_FOLDER).glob(f"*/{PROJECTION}")
    return {int(path.parent.name): path for path in found if path.parent.name.isdecimal()}


def panels(folder: Path) -> dict[str, dict[int, Path]]:
    """Picture files of a run: by name, by step."""
    found: dict[str, dict[int, Path]] = {}
    for file in sorted((folder / _PANELS).glob("*/step-*.png")):
        step = file.stem.removeprefix("step-")
        if step.isdecimal():
            found.setdefault(file.parent.name, {})[int(step)] = file
    return found


def thin_panels(folder: Path) -> None:
    """Thin out the pictures of a kind to ``_MOST_PANELS``: those closest to their neighbours
    in step are removed; the first and the newest stay."""
    files = sorted(folder.glob("step-*.png"))
    while len(files) > _MOST_PANELS:
        steps = [int(file.stem.removeprefix("step-")) for file in files]
        gaps = [after - before for before, after in zip(steps, steps[2:], strict=False)]
        files.pop(1 + gaps.index(min(gaps))).unlink()


def printable(text: str) -> str:
    """Printable one-line text: line breaks and characters that UTF-8 cannot encode are replaced."""
    plain = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else " " for c in plain)


def drop_pictures(folder: Path, step: int) -> None:
    """Remove pictures and projections of steps after ``step``: a resumed run makes them again."""
    for by_step in panels(folder).values():
        for late in (file for made, file in by_step.items() if made > step):
            late.unlink()
    for late in (path for made, path in projections(folder).items() if made > step):
        shutil.rmtree(late.parent)
