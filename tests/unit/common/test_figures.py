"""Titles and captions of pictures are there as a whole, whatever their length."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ssl_vit.common.figures import picture_rows

FONT = ImageFont.load_default(size=12)


def ink_of(text: str) -> int:
    """Dark pixels of a text written where there is room for all of it."""
    sheet = Image.new("L", (20 * len(text) + 20, 30), "white")
    ImageDraw.Draw(sheet).text((4, 4), text, fill="black", font=FONT)
    return int((np.asarray(sheet) < 128).sum())


def ink(picture: np.ndarray) -> int:
    return int((picture.min(-1) < 128).sum())


def white(count: int, size: tuple[int, int] = (96, 96), rows: int = 1) -> list[np.ndarray]:
    return [np.full((rows, *size, 3), 255, dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("wrap", [0, 1])
@pytest.mark.parametrize("size", [(96, 96), (96, 300)])
@pytest.mark.parametrize(
    "titles",
    [
        ("original", "reconstruction of hidden patches, visible ones pasted"),
        ("a title that goes on for several lines above its picture, and on", "b"),
        ("Donaudampfschiffahrtskapitaen", "short"),
        ("/data/folder/with/a/very/long/name/that/has/no/spaces/image_000001.png", "short"),
    ],
)
def test_titles_are_written_as_a_whole(titles, size, wrap):
    """All of their ink is there: none is cut by the edge, none lies on that of a neighbour."""
    picture = picture_rows(dict(zip(titles, white(2, size), strict=True)), "", wrap=wrap)
    words = [word for title in titles for word in title.split()]
    # Parts of a word, and letters at other places of the pixel grid, differ by some pixels.
    assert ink(picture) == pytest.approx(sum(map(ink_of, words)), rel=0.05)
    assert (picture[:, -1] == 255).all()


def test_images_stay_where_they_are_under_a_title_of_two_lines():
    columns = dict(zip(["more than one line", "b"], white(2, rows=2), strict=True))
    columns["b"][:] = 0
    picture = picture_rows(columns, "")
    black = (picture == 0).all(-1)
    assert black[32 : 32 + 96, 104:200].all()
    assert black[32 + 100 : 32 + 196, 104:200].all()
    assert not black[:18, 104:].any(), "the short title is next to its image"


def test_a_word_of_a_caption_that_is_wider_than_the_sheet_is_not_cut_off():
    path = "/data/" + 12 * "folder/"
    picture = picture_rows({"a": white(1)[0]}, path)
    assert ink(picture) == pytest.approx(ink_of("a") + ink_of(path), rel=0.05)
