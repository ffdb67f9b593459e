"""Boundary pictures: what is outlined, against a loop, and a whole panel."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_vit.data.pairs import open_pairs
from ssl_vit.data.view import View
from ssl_vit.pictures.boundaries import Outlined, boundaries, boundaries_panel, evenly, outlined


def test_boundaries_are_pixels_beside_another_class():
    mask = np.random.RandomState(0).randint(0, 2, (7, 9)).repeat(2, 0)
    found = boundaries(mask)
    height, width = mask.shape
    for i in range(height):
        for j in range(width):
            beside = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            inside = [(y, x) for y, x in beside if 0 <= y < height and 0 <= x < width]
            assert found[i, j] == any(mask[y, x] != mask[i, j] for y, x in inside)
    assert not boundaries(np.ones((3, 4), int)).any()


def test_a_line_lies_within_a_black_one():
    image = np.full((9, 9, 3), 100, np.uint8)
    mask = np.zeros((9, 9), int)
    mask[:, 5:] = 1
    drawn = outlined(image, mask, (9, 8, 7))
    assert drawn[4].tolist() == (
        [[100] * 3] * 3 + [[0] * 3] + [[9, 8, 7]] * 2 + [[0] * 3] + [[100] * 3] * 2
    )


def test_some_of_many_are_spread():
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(80, 4) == [0, 20, 40, 60]


def test_a_panel_shows_both_boundaries_and_what_is_not_judged(tmp_path: Path):
    for name, array in (("images", np.full((40, 80, 3), 200)), ("masks", np.zeros((40, 80)))):
        (tmp_path / name).mkdir()
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / name / "a.png")
    truth = torch.zeros(40, 80, dtype=torch.long)
    truth[:, 40:] = 1
    truth[30:] = -1
    guess = torch.zeros(40, 80, dtype=torch.int64)
    guess[:, 20:] = 1
    view = View((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
    panel = boundaries_panel(open_pairs(f"pairs:{tmp_path}"), view, [Outlined(0, truth, guess)])
    blue, yellow = ((panel == colour).all(2) for colour in ((86, 180, 233), (240, 228, 66)))
    top = np.argwhere(blue)[:, 0].min()  # of the row of images
    assert set(np.argwhere(blue[top])[:, 0]) == {328 + 159, 328 + 160}
    assert set(np.argwhere(yellow[top])[:, 0]) == {652 + 79, 652 + 80}
    shown = panel[top + 5]
    assert shown[50].tolist() == shown[328 + 50].tolist() == [200] * 3
    assert panel[top + 150, 328 + 50].tolist() == [70] * 3
