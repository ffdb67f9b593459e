"""Scenes: boxes, masks and depths agree with each other and with the camera."""

import json

import numpy as np
import pytest
from PIL import Image

from ssl_vit.benchmarks.scenes import DEPTH_SCALE, open_studio, run_lengths, write_scenes
from ssl_vit.commands.scenes_options import ScenesConfig, parse_options
from ssl_vit.common.errors import UserError

SIZE = 96


@pytest.fixture(scope="module")
def studio():
    return open_studio("digits:val", "", SIZE, 5, seed=3)


@pytest.mark.parametrize("start", [0, 1])
def test_run_lengths_are_columns_of_zeros_and_ones_in_turn(start):
    mask = np.array([[start, 1, 0], [1, 1, 0], [0, 1, start]], dtype=bool)
    rebuilt: list[bool] = []
    for n, run in enumerate(run_lengths(mask)):
        rebuilt += [n % 2 == 1] * run
    expected = [bool(mask[row, column]) for column in range(3) for row in range(3)]
    assert rebuilt == expected


def test_a_scene_is_a_function_of_its_number(studio):
    first, again, other = studio.scene(4), studio.scene(4), studio.scene(5)
    assert (first.image == again.image).all()
    assert (first.image != other.image).any()


def test_objects_stand_on_the_floor_where_they_are_as_far_away(studio):
    """The floor just below an object is as far as the object, and what it hides is further."""
    looked = 0
    for i in range(20):
        scene = studio.scene(i)
        owned = scene.visible.any(0)
        for seen in scene.visible:
            (distance,) = np.unique(scene.depth[seen])
            row = np.flatnonzero(seen.any(1))[-1]
            if row + 1 == SIZE or owned[row + 1].any():
                continue
            floor = scene.depth[row + 1, 0]
            # A row of pixels, and the ink of digits may end above the picture's lower edge.
            assert scene.depth[min(row + 5, SIZE - 1), 0] <= distance * 1.1
            assert floor >= distance * 0.8
            looked += 1
    assert looked > 10


def test_enough_is_seen_of_every_object(studio):
    for i in range(10):
        scene = studio.scene(i)
        assert scene.visible.sum(0).max(initial=0) <= 1
        assert len(scene.visible) == len(scene.classes)
        assert (scene.visible.sum((1, 2)) >= 30).all()


def test_files_agree(studio, tmp_path):
    names = [str(n) for n in range(10)]
    write_scenes(studio, 3, tmp_path / "s", names)
    found = json.loads((tmp_path / "s" / "annotations.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [f"00000{i}.png" for i in range(3)]
    assert [a["id"] for a in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
    assert (tmp_path / "s" / "classes.txt").read_text().split() == ["background", *names]
    for i in range(3):
        mask = np.array(Image.open(tmp_path / f"s/masks/00000{i}.png"))
        depth = np.array(Image.open(tmp_path / f"s/depth/00000{i}.png")) * DEPTH_SCALE
        np.testing.assert_allclose(depth, studio.scene(i).depth, atol=DEPTH_SCALE)
        union = np.zeros_like(mask)
        for annotation in found["annotations"]:
            if annotation["image_id"] != i:
                continue
            left, top, width, height = annotation["bbox"]
            runs = annotation["segmentation"]["counts"]
            flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            seen = flat.reshape(SIZE, SIZE).T
            assert annotation["area"] == seen.sum()
            inside = seen[top : top + height, left : left + width]
            assert inside.sum() == seen.sum()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            union[seen] = annotation["category_id"]
        assert (union == mask).all()


def test_mistakes_are_told(studio, tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="which is not empty; name a new folder"):
        write_scenes(studio, 1, tmp_path, ["0"])
    with pytest.raises(UserError, match="--count is 0"):
        parse_options(["--count", "0"])
    assert parse_options([]) == ScenesConfig()
    for i in range(256):
        (tmp_path / "many" / str(i)).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "many" / str(i) / "a.png")
    with pytest.raises(UserError, match="of 256 classes; masks have 254 at most"):
        open_studio(f"folder:{tmp_path}/many", "", SIZE, 2, 0)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="whose images have no labels"):
        open_studio(f"flat:{tmp_path}", "", SIZE, 2, 0)
