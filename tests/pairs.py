"""Images with masks to learn from, for tests of segmentation."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pairs(folder: Path) -> None:
    """Forty images whose bright half is the class of their masks."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(40):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, : rng.integers(2, 7) * 2] = 1
        image = np.where(mask, 200, 40) + rng.integers(-20, 20, mask.shape)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
