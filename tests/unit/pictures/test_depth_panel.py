"""Depth panel: one scale for all, gray where no depth is known."""

import numpy as np
import torch

from ssl_vit.common.figures import heat
from ssl_vit.pictures.depth_panel import depth_panel


def test_depths_share_their_colours_and_holes_are_gray():
    images = np.zeros((2, 100, 100, 3), np.uint8)
    true = torch.full((2, 100, 100), 2.0)
    true[1], true[0, :50] = 4.0, 0.0
    guess = torch.full((2, 100, 100), 3.0)
    picture = depth_panel(images, true, guess)

    def at(row: int, column: int, y: int) -> list[int]:
        return picture[16 + 104 * row + y, 4 + 104 * column + 50].tolist()

    gray = [128] * 3
    assert at(0, 1, 20) == at(0, 3, 20) == gray
    assert at(0, 1, 80) == heat(np.array(0.5)).tolist()
    assert at(1, 1, 80) == heat(np.array(1.0)).tolist()
    assert at(0, 2, 20) == at(1, 2, 80) == heat(np.array(0.75)).tolist()
    assert at(0, 3, 80) == heat(np.array(1.0)).tolist()  # off by a half
    assert at(1, 3, 80) == heat(np.array(0.5)).tolist()  # by a quarter
