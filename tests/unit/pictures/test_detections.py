"""Pictures of detections: labels can be read on any colour, and an empty column says so."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from ssl_vit.pictures.detections import Drawing, _fitting, drawn

GRAY = np.full((200, 300, 3), 120, np.uint8)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def colours(picture):
    return {tuple(c) for c in picture.reshape(-1, 3).tolist()}


@pytest.mark.parametrize(("number", "ink"), [(0, "white"), (6, "black")])
def test_labels_are_filled_with_the_colour_of_the_class(number, ink):
    """Above the box: blue has white text, yellow black."""
    fill = ImageColor.getrgb({0: "#0072B2", 6: "#F0E442"}[number])
    made = drawn(GRAY, Drawing(boxes([50, 60, 150, 160]), [number], ["a dog 93"]))
    above = made[40:60, 50:150]
    filled = (above == fill).all(-1)
    assert filled.sum() > 400
    assert ImageColor.getrgb(ink) in colours(above)
    assert (made[:35] == 120).all()
    assert (made[75:140, 70:130] == 120).all()


def test_labels_stay_in_the_picture():
    """Of a box in the corner at the right: within it, and moved to the left."""
    made = drawn(GRAY, Drawing(boxes([280, 2, 299, 100]), [1], ["elephant 55"]))
    fill = ImageColor.getrgb("#E69F00")
    rows, columns = (made == fill).all(-1).nonzero()
    assert columns.min() < 240
    assert rows.min() == 2
    assert (0, 0, 0) in colours(made[2:22, 215:])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("adenocarcinoma of the lung 93", "adenocarcin… 93"),
        ("adenocarcinoma of the lung", "adenocarcinoma…"),
        ("adenocarcinoma of 93", "adenocarcin… 93"),
        ("a dog 93", "a dog 93"),
        ("2024 9", "2024 9"),
    ],
)
def test_a_long_name_is_cut_and_its_score_stays(text, shown):
    assert _fitting(text, lambda some: len(some) <= 15) == shown


def test_a_long_label_is_as_wide_as_a_small_picture():
    """The score, at its end, is in it: the same pixels as of the label that is cut already."""
    small = np.full((64, 100, 3), 120, np.uint8)
    made = [
        drawn(small, Drawing(boxes([5, 40, 60, 60]), [0], [f"{name} 93"]))
        for name in ("adenocarcinoma of the lung", "adenocarcinoma of the liver")
    ]
    assert (made[0] == made[1]).all()
    assert (made[0][20:40, 60:] == 255).all(-1).any()


def test_the_first_label_is_uppermost():
    both = boxes([50, 60, 150, 160], [50, 60, 150, 160])
    made = drawn(GRAY, Drawing(both, [0, 6], ["same", "same"]))
    assert ImageColor.getrgb("#F0E442") not in colours(made)


def test_nothing_found_is_said():
    what = Drawing(boxes(), [], [], nothing="nothing with a score of 30 % or more")
    made = drawn(GRAY, what)
    assert {(255, 255, 255), (0, 0, 0)} <= colours(made[:20])
    assert (made[25:] == 120).all()
    assert (drawn(GRAY, Drawing(boxes(), [], [])) == 120).all()
