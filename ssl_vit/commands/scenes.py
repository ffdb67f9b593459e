"""Scenes command: ``python -m ssl_vit.benchmark scenes --out FOLDER``."""

from __future__ import annotations

from pathlib import Path

from ssl_vit.benchmarks.scenes import DEPTH_SCALE, class_names, open_studio, write_scenes
from ssl_vit.commands.scenes_options import ScenesConfig


def make(config: ScenesConfig) -> int:
    """Make the scenes; returns the exit status."""
    out = Path(config.out).expanduser()
    studio = open_studio(config.objects, config.surfaces, config.size, config.most, config.seed)
    write_scenes(studio, config.count, out, class_names(studio))
    print(f"{config.count:,} scenes: {out}; its depth maps need --scale {DEPTH_SCALE:g}")
    return 0
